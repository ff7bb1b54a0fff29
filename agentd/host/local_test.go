package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// A statement from a kernel meets what one from the control plane does.
func TestRunLocal(t *testing.T) {
	b := newBench(t, func(ctx context.Context, s Statement, w io.Writer) (*posternv1.QueryOutcome, error) {
		if s.Owner != `"org"/"tok"` || s.MaxRows != 5 {
			t.Errorf("got %+v", s)
		}
		_, err := io.WriteString(w, "rows")
		return &posternv1.QueryOutcome{Rows: 2}, err
	})
	principal := &posternv1.Principal{Organization: "org", TokenId: "tok", TokenName: "ann"}
	ask := func(source, sql string) (*posternv1.QueryOutcome, string) {
		var out bytes.Buffer
		o := b.RunLocal(t.Context(), &posternv1.SQLRequest{QueryId: "q1", Source: source, Sql: sql, Principal: principal}, "kernel k1", &out)
		return o, out.String()
	}
	if o, rows := ask("open", "select 1"); o.Error != nil || rows != "rows" || o.Rows != 2 || o.Duration == nil {
		t.Errorf("got %v, %q", o, rows)
	}
	for source, code := range map[string]posternv1.ErrorCode{"closed": proto.CodePolicyDenied, "nix": proto.CodeNotFound} {
		if o, _ := ask(source, "select 1"); o.GetError().GetCode() != code {
			t.Errorf("%s: got %v", source, o)
		}
	}
	if o, _ := ask("open", " "); o.GetError().GetCode() != proto.CodeInvalid {
		t.Errorf("an empty statement: %v", o)
	}
	if o, _ := ask("open", strings.Repeat("x", proto.MaxSQLRequest)); o.GetError().GetCode() != proto.CodeBodyTooLarge {
		t.Errorf("a long statement: %v", o.GetError())
	}
	if got := b.audit.actions(); got != "sql.begin, sql.run done, sql.run denied, sql.run failed" && got != "sql.begin, sql.run done, sql.run failed, sql.run denied" {
		t.Errorf("recorded: %s", got)
	}
	for _, e := range b.audit.entries {
		if e.Remote != "kernel k1" || e.Actor != "token ann" {
			t.Errorf("recorded %+v", e)
		}
	}
	// What can't be recorded is not run.
	b.audit.set(errors.New("the disk is full"))
	if o, rows := ask("open", "select 1"); o.Error == nil || rows != "" {
		t.Errorf("with no log: %v, %q", o, rows)
	}
}

// localLog is told of local statements.
type localLog struct {
	audit *fakeAudit
	said  []string
}

func (l *localLog) Began(id string) { l.said = append(l.said, "began "+id) }

func (l *localLog) Ended(id string, err *posternv1.ErrorDetail, kept *posternv1.KeptRows) {
	l.said = append(l.said, fmt.Sprintf("ended %s, code %d, %d rows kept, %s", id, err.GetCode(), kept.GetFirst(), l.audit.actions()))
}

// Who tells the control plane of a statement hears of its end when the log has it; and a
// statement that must not run any more is in the log as denied.
func TestLocalStatementsAreTold(t *testing.T) {
	b := newBench(t, func(ctx context.Context, s Statement, w io.Writer) (*posternv1.QueryOutcome, error) {
		if s.Kept != nil {
			s.Kept(&posternv1.KeptRows{First: uint32(s.KeepFirst)})
		}
		return &posternv1.QueryOutcome{Rows: 2, Error: &posternv1.ErrorDetail{Code: proto.CodeSQL, Message: "no"}}, nil
	})
	l := &localLog{audit: b.audit}
	b.cfg.Local = l
	b.cfg.Decide = func(*posternv1.SQLRequest) Verdict { return Verdict{Known: true, Allowed: true, KeepFirst: 7} }
	owner := &posternv1.Principal{Organization: "org", TokenId: "tok", TokenName: "ann"}
	b.RunLocal(t.Context(), &posternv1.SQLRequest{QueryId: "q1", Source: "open", Sql: "select 1", Principal: owner}, "kernel k1", io.Discard)
	revoked, revoke := context.WithCancelCause(t.Context())
	revoke(proto.Errorf(proto.CodePolicyDenied, "the token was revoked"))
	o := b.RunLocal(revoked, &posternv1.SQLRequest{QueryId: "q2", Source: "open", Sql: "select 2", Principal: owner}, "kernel k1", io.Discard)
	if o.GetError().GetCode() != proto.CodePolicyDenied || !strings.Contains(o.GetError().GetMessage(), "revoked") {
		t.Errorf("a kernel whose token was revoked is told %v", o)
	}
	want := []string{
		"began q1", fmt.Sprintf("ended q1, code %d, 7 rows kept, sql.begin, sql.run failed", proto.CodeSQL),
		"began q2", fmt.Sprintf("ended q2, code %d, 0 rows kept, sql.begin, sql.run failed, sql.begin, sql.run denied", proto.CodePolicyDenied),
	}
	if !slices.Equal(l.said, want) {
		t.Errorf("told %q\nwant %q", l.said, want)
	}
	last := b.audit.entries[len(b.audit.entries)-1]
	if last.Target != "tok" || last.Verdict != "denied" || last.Remote != "kernel k1" {
		t.Errorf("recorded %+v", last)
	}
}
