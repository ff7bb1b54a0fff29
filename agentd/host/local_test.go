package host

import (
	"bytes"
	"context"
	"errors"
	"io"
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
