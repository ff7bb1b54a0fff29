package host

import (
	"context"
	"io"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func TestSessions(t *testing.T) {
	var ran Statement
	b := newBench(t, func(_ context.Context, s Statement, w io.Writer) (*posternv1.QueryOutcome, error) {
		ran = s
		return &posternv1.QueryOutcome{Transaction: "failed"}, proto.Errorf(proto.CodeSQL, "no such column")
	})
	who := &posternv1.Principal{Organization: "o", TokenId: "tok_1", TokenName: "ana", Role: "analyst"}
	open := func(r *posternv1.OpenSessionRequest) error {
		_, err := rpc{b.Host}.OpenSession(t.Context(), connect.NewRequest(r))
		return proto.FromConnect(err)
	}
	tests := []struct {
		name string
		r    *posternv1.OpenSessionRequest
		code proto.Code
		log  string
	}{
		{"good", &posternv1.OpenSessionRequest{SessionId: "s1", Source: "open", Principal: who}, 0, "allowed done"},
		{"refused", &posternv1.OpenSessionRequest{SessionId: "s1", Source: "closed", Principal: who}, proto.CodePolicyDenied, "denied denied"},
		{"unknown", &posternv1.OpenSessionRequest{SessionId: "s1", Source: "nope", Principal: who}, proto.CodeNotFound, "denied failed"},
		{"bad id", &posternv1.OpenSessionRequest{SessionId: "../x", Source: "open", Principal: who}, proto.CodeInvalid, ""},
		{"nobody", &posternv1.OpenSessionRequest{SessionId: "s1", Source: "open"}, proto.CodeInvalid, ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			b.audit.mu.Lock()
			before := len(b.audit.entries)
			b.audit.mu.Unlock()
			err := open(test.r)
			if test.code == 0 && err != nil || test.code != 0 && proto.CodeOf(err) != test.code {
				t.Fatalf("got %v, want %v", err, test.code)
			}
			got := ""
			for _, e := range b.audit.entries[before:] {
				got += e.Verdict + " " + e.Outcome
				if e.Action != "session.open" || e.SessionID != "s1" || e.Source != test.r.Source {
					t.Errorf("entry %+v", e)
				}
			}
			if got != test.log {
				t.Errorf("the log has %q, want %q", got, test.log)
			}
		})
	}
	_, resp, _ := b.query(t, func(r *posternv1.SQLRequest) { r.SessionId, r.Principal = "s1", who })
	if ran.Session != "s1" || !strings.Contains(ran.Owner, "tok_1") {
		t.Errorf("ran %+v", ran)
	}
	if resp.GetTransaction() != "failed" || resp.GetError().GetCode() != proto.CodeSQL {
		t.Errorf("the outcome is %v, want a failed transaction with the error", resp)
	}
	last := b.audit.entries[len(b.audit.entries)-1]
	if last.SessionID != "s1" || last.Action != "sql.run" {
		t.Errorf("the last entry is %+v", last)
	}
	for id, want := range map[string]proto.Code{"s1": 0, "s2": proto.CodeNotFound} {
		_, err := rpc{b.Host}.CloseSession(t.Context(), connect.NewRequest(&posternv1.CloseSessionRequest{SessionId: id, Principal: who}))
		if got := proto.FromConnect(err); want == 0 && err != nil || want != 0 && proto.CodeOf(got) != want {
			t.Errorf("close %s: got %v, want %v", id, got, want)
		}
	}
	all, err := rpc{b.Host}.CloseSession(t.Context(), connect.NewRequest(&posternv1.CloseSessionRequest{Principal: who}))
	if err != nil || all.Msg.Closed != 2 {
		t.Errorf("close all: got %v, %v, want 2", all, err)
	}
}
