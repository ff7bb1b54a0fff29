package child

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgguard"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
)

// idleServer is a server that answers every question with nothing.
func idleServer(cycles int) []byte {
	return bytes.Repeat(encode(&pgproto3.ReadyForQuery{TxStatus: 'I'}), cycles)
}

func TestWarmAsksUntilARequestWaits(t *testing.T) {
	for waits, asked := range []int{0, 0, 1, 2} {
		conn := &script{Reader: bytes.NewReader(idleServer(6))}
		s := &session{wire: newWire(conn, map[string]string{}), network: "test", parser: known{}}
		looks := 0
		if err := s.warm(func() bool { looks++; return looks > waits }); err != nil {
			t.Fatal(err)
		}
		if got := bytes.Count(conn.wrote.Bytes(), []byte("BEGIN READ ONLY;SET LOCAL jit = off")); got != asked {
			t.Errorf("a request that waits after %d looks: %d questions, want %d", waits, got, asked)
		}
		if len(s.judged.verdicts)+len(s.judged.catalogs)+len(s.judged.trees) != 0 {
			t.Error("what was asked to warm is remembered")
		}
	}
}

func TestWarmGoesOnAfterARefusal(t *testing.T) {
	refused := encode(&pgproto3.ErrorResponse{Severity: "ERROR", Code: "57014", Message: "canceled"})
	conn := &script{Reader: io.MultiReader(bytes.NewReader(refused), bytes.NewReader(idleServer(6)))}
	s := &session{wire: newWire(conn, map[string]string{}), network: "test"}
	if err := s.warm(func() bool { return false }); err != nil {
		t.Fatal(err)
	}
	if got := bytes.Count(conn.wrote.Bytes(), []byte("ROLLBACK")); got != 2 {
		t.Errorf("%d questions, want 2", got)
	}
}

func TestWarmTellsOfADeadConnection(t *testing.T) {
	s := &session{wire: newWire(&script{Reader: bytes.NewReader(idleServer(2))}, map[string]string{}), network: "test"}
	var gone *lostError
	if err := s.warm(func() bool { return false }); !errors.As(err, &gone) {
		t.Errorf("the error is %v, want a lost connection", err)
	}
}

// TestQuestionsInsideATransaction: they are not compiled there either, and what they set
// is undone.
func TestQuestionsInsideATransaction(t *testing.T) {
	inside := bytes.Repeat(encode(&pgproto3.ReadyForQuery{TxStatus: 'T'}), 3)
	conn := &script{Reader: bytes.NewReader(inside)}
	s := &session{wire: newWire(conn, map[string]string{}), network: "test"}
	s.wire.tx = 'T'
	if _, err := s.ask(pgguard.Question{Functions: []pgguard.Name{{Name: "f"}}}); err != nil {
		t.Fatal(err)
	}
	wrote := conn.wrote.String()
	begin, question := strings.Index(wrote, "SAVEPOINT postern_question;SET LOCAL jit = off"), strings.Index(wrote, "pg_proc")
	end := strings.Index(wrote, "ROLLBACK TO SAVEPOINT postern_question;RELEASE SAVEPOINT postern_question")
	if begin < 0 || question < begin || end < question {
		t.Errorf("a question inside a transaction is %q", wrote)
	}
	if s.wire.tx != 'T' {
		t.Errorf("the transaction is %q", s.wire.tx)
	}
}

// deaf is a parser that does not answer.
type deaf struct{}

func (deaf) Parse(context.Context, string) (*pgtree.Tree, error) { return nil, pgtree.ErrUnavailable }

func TestWarmWithoutAParserDoesNotRehearse(t *testing.T) {
	conn := &script{Reader: bytes.NewReader(idleServer(6))}
	s := &session{wire: newWire(conn, map[string]string{}), network: "test", parser: deaf{}}
	if err := s.warm(func() bool { return false }); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(conn.wrote.String(), rehearsal) || !s.primed {
		t.Errorf("primed %v, wrote %q: want the questions alone", s.primed, conn.wrote.String())
	}
}
