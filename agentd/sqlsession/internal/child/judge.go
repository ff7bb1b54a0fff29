package child

import (
	"context"
	"errors"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgguard"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// verdictLife is how long a verdict counts for the same text: so long a
	// function that somebody else replaces by one that does more may still be
	// taken for the old one.
	verdictLife = 3 * time.Second
	// maxJudged bounds the texts whose trees and verdicts are kept, in bytes of
	// all of them, and maxJudgedText of one. A tree takes about 30 times its text;
	// judgedExtra is what the shortest one takes beside, in the same measure.
	maxJudged     = 128 << 10
	maxJudgedText = 8 << 10
	judgedExtra   = 64
	// maxCatalogs bounds the answers of the catalog that are kept, for texts
	// that name the same things.
	maxCatalogs = 64
)

// judged is what a session remembers of texts. It is emptied when it is full,
// when the policy changes, and after a statement that may change what names mean.
type judged struct {
	guard    frame.Guard
	trees    map[string]*pgtree.Tree
	verdicts map[string]judgedVerdict
	bytes    int
	catalogs map[string]judgedCatalog
}

type judgedVerdict struct {
	verdict pgguard.Verdict
	until   time.Time
}

type judgedCatalog struct {
	catalog *pgguard.Catalog
	until   time.Time
}

// changed is called when names may mean something else from now on.
func (j *judged) changed() {
	clear(j.verdicts)
	clear(j.catalogs)
}

// judge decides whether a text may run, before anything of it reaches the
// database. The connection must be idle or in a transaction. What the database
// must be asked for goes over it, in one or two round trips. lost means that it turned out
// dead. ctx bounds the wait for the parser. position turns a position in the text
// into the user's.
func (s *session) judge(ctx context.Context, text string, guard *frame.Guard, position func(int) int) (verdict pgguard.Verdict, failure *proto.Error, lost bool) {
	j := &s.judged
	if j.trees == nil || !reflect.DeepEqual(j.guard, *guard) {
		*j = judged{guard: *guard, trees: make(map[string]*pgtree.Tree), verdicts: make(map[string]judgedVerdict), catalogs: make(map[string]judgedCatalog)}
	}
	now := time.Now()
	if v, ok := j.verdicts[text]; ok && now.Before(v.until) {
		return v.verdict, nil, false
	}
	tree, failure := s.tree(ctx, text, position)
	if failure != nil {
		return verdict, failure, false
	}
	verdict, refusal := pgguard.Check(ctx, pgguard.Input{
		Tree: tree, Text: text, Guard: guard, Version: s.majorVersion(), Resolver: s,
	})
	if refusal == nil {
		if slices.ContainsFunc(verdict.Statements, func(s pgguard.Statement) bool { return s.Changes }) {
			j.changed()
		} else if len(text) <= maxJudgedText {
			j.verdicts[text] = judgedVerdict{verdict, now.Add(verdictLife)}
		}
		return verdict, nil, false
	}
	var (
		asked *askError
		gone  *lostError
	)
	switch {
	case errors.As(refusal.Err, &gone):
		return pgguard.Verdict{}, proto.Errorf(proto.CodeSourceUnreachable, "the connection to PostgreSQL at %s was lost", s.network), true
	case errors.As(refusal.Err, &asked):
		return pgguard.Verdict{}, sqlError(asked.refusal, nil), false
	case refusal.Err != nil:
		return pgguard.Verdict{}, proto.Errorf(proto.CodeUnavailable, "%s: %w", refusal.Reason, refusal.Err), false
	}
	return pgguard.Verdict{}, denied(position(refusal.Position), "the statement is refused: %s", refusal.Reason), false
}

// tree parses a text, or remembers it.
func (s *session) tree(ctx context.Context, text string, position func(int) int) (*pgtree.Tree, *proto.Error) {
	j := &s.judged
	if tree := j.trees[text]; tree != nil {
		return tree, nil
	}
	if s.parser == nil {
		return nil, proto.Errorf(proto.CodeUnavailable, "%w", pgtree.ErrUnavailable)
	}
	tree, err := s.parser.Parse(ctx, text)
	var (
		syntax *pgtree.SyntaxError
		much   *pgtree.TooComplexError
	)
	switch {
	case err == nil:
	case errors.As(err, &syntax):
		return nil, syntaxFailure(syntax, position)
	case errors.As(err, &much):
		return nil, denied(0, "the statement is refused: %s", much.Reason)
	default:
		return nil, proto.Errorf(proto.CodeUnavailable, "%w", err)
	}
	if len(text) <= maxJudgedText {
		if j.bytes += len(text) + judgedExtra; j.bytes > maxJudged {
			j.bytes = len(text) + judgedExtra
			clear(j.trees)
			clear(j.verdicts)
		}
		if j.trees != nil {
			j.trees[text] = tree
		}
	}
	return tree, nil
}

// syntaxFailure is what the server would have said.
func syntaxFailure(e *pgtree.SyntaxError, position func(int) int) *proto.Error {
	state := stateSyntaxError
	if strings.HasPrefix(e.Message, "invalid byte sequence") {
		state = stateNotInRepertoire
	}
	failure := &proto.Error{Code: proto.CodeSQL, SQL: &posternv1.SQLErrorDetail{Sqlstate: state, Position: int32(position(e.Position))}}
	failure.Message = "the statement is not understood: " + clean(e.Message) + " (SQLSTATE " + state
	if failure.SQL.Position > 0 {
		failure.Message += ", position " + strconv.Itoa(int(failure.SQL.Position))
	}
	failure.Message += ")"
	return failure
}

// Resolve implements pgguard.Resolver, from memory where it can.
func (s *session) Resolve(_ context.Context, q pgguard.Question) (*pgguard.Catalog, error) {
	key, now := questionKey(q), time.Now()
	if c, ok := s.judged.catalogs[key]; ok && now.Before(c.until) {
		return c.catalog, nil
	}
	catalog, err := s.ask(q)
	if err == nil && s.judged.catalogs != nil {
		if len(s.judged.catalogs) >= maxCatalogs || len(key) > maxJudgedText {
			clear(s.judged.catalogs)
		}
		s.judged.catalogs[key] = judgedCatalog{catalog, now.Add(verdictLife)}
	}
	return catalog, err
}

// questionKey is a text that is the same for the same question.
func questionKey(q pgguard.Question) string {
	b := make([]byte, 0, 256)
	for _, names := range [][]pgguard.Name{q.Functions, q.Operators, q.Types, q.Relations} {
		for _, n := range names {
			b = append(b, n.Schema...)
			b = append(b, 0)
			b = append(b, n.Name...)
			b = append(b, 0)
		}
		b = append(b, 1)
	}
	for _, cast := range q.Casts {
		b = append(append(b, cast...), 0)
	}
	if q.Deep {
		b = append(b, 2)
	}
	return string(b)
}

// words is a set.
func words(text string) map[string]bool {
	set := make(map[string]bool)
	for _, word := range strings.Fields(text) {
		set[word] = true
	}
	return set
}
