package pgtree

import (
	"context"
	"errors"
	"testing"
)

func TestParse(t *testing.T) {
	tree, err := InProcess().Parse(context.Background(), "SELECT a FROM b; TABLE c")
	if err != nil || len(tree.Stmts) != 2 || tree.Stmts[0].Stmt.GetSelectStmt() == nil {
		t.Fatalf("got %v, %v", tree, err)
	}
	_, err = InProcess().Parse(context.Background(), "SELECT é FROM FROM b")
	var complaint *SyntaxError
	if !errors.As(err, &complaint) || complaint.Position != 15 {
		t.Fatalf("got %#v", err)
	}
}
