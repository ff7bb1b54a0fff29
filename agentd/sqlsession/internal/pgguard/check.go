package pgguard

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	pgquery "github.com/pganalyze/pg_query_go/v6"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgverb"
)

// Check decides on a text. Of a text with several statements (Input.Session) all
// are judged by what names mean before the first of them. Without a refusal the
// verdict has all statements of the text, which may be none.
//
// Nothing but the Resolver's answer is waited for, and that is asked only if the
// text names something beyond PostgreSQL's syntax.
func Check(ctx context.Context, in Input) (verdict Verdict, refusal *Refusal) {
	defer func() {
		// A tree that we don't expect is one that we don't understand.
		if p := recover(); p != nil {
			verdict, refusal = Verdict{}, &Refusal{Reason: "it is not understood", Unknown: true}
		}
	}()
	c := &checker{in: &in, writes: in.Guard.Mode == ModeReadWrite}
	c.narrowed = len(in.Guard.WriteSchemas) > 0 || len(in.Guard.WriteStatements) > 0
	if len(in.Tree.Stmts) > 1 && !in.Session {
		return Verdict{}, &Refusal{Reason: "the text has more than one statement: send them one by one"}
	}
	for _, raw := range in.Tree.Stmts {
		s, refusal := c.statement(raw)
		if refusal == nil {
			verdict.Statements = append(verdict.Statements, s)
			continue
		}
		return Verdict{}, c.placed(refusal)
	}
	if refusal := c.resolve(ctx); refusal != nil {
		return Verdict{}, c.placed(refusal)
	}
	return verdict, nil
}

// checker is one Check.
type checker struct {
	in       *Input
	writes   bool // the mode is read-write
	narrowed bool // ... and its write has limits

	question Question
	walkers  []*walker
	targets  []write
}

// placed turns the refusal's offset into a position.
func (c *checker) placed(r *Refusal) *Refusal {
	if r.Err != nil {
		return r
	}
	at := min(max(r.Position, 0), len(c.in.Text))
	r.Position = utf8.RuneCountInString(c.in.Text[:at]) + 1
	return r
}

// statement judges one statement by its tree alone, and notes what must be
// asked.
func (c *checker) statement(raw *pgquery.RawStmt) (Statement, *Refusal) {
	start := int(raw.StmtLocation)
	end := len(c.in.Text)
	if raw.StmtLen > 0 {
		end = start + int(raw.StmtLen)
	}
	if start < 0 || start > end || end > len(c.in.Text) || raw.Stmt == nil {
		return Statement{}, &Refusal{Reason: "it is not understood", Unknown: true}
	}
	first := skipSpace(c.in.Text, start, end)
	s := Statement{Node: raw.Stmt, Start: start, End: end}
	node := raw.Stmt.ProtoReflect()
	field := node.WhichOneof(node.Descriptor().Oneofs().Get(0))
	if field == nil {
		return s, &Refusal{Reason: "it is not understood", Position: first, Unknown: true}
	}
	k := statements[nodeName(field.Message())]
	if k.class == "" {
		return s, &Refusal{Reason: fmt.Sprintf("this kind of statement is not understood (%s)", nodeName(field.Message())), Position: first, Unknown: true}
	}
	s.Class = k.class
	if k.refine != nil {
		s.Class = k.refine(raw.Stmt)
	}
	if refusal := c.kind(&s, first); refusal != nil {
		return s, refusal
	}
	w := &walker{version: c.in.Version, location: first}
	switch {
	case !c.writes && k.own:
		// What carries the statement was looked at by kind; what is in it is a
		// query or an expression.
		w.allowed = []map[string]bool{queryNodes, {nodeName(field.Message()): true, "DefElem": true, "LockStmt": true}}
	case !c.writes:
		w.allowed = []map[string]bool{queryNodes}
	case s.Class == Select || s.Class == Insert || s.Class == Update || s.Class == Delete || s.Class == Merge:
		w.allowed = []map[string]bool{queryNodes, writeNodes}
	}
	w.walk(node.Get(field).Message())
	if w.refusal != nil {
		return s, w.refusal
	}
	if c.writes {
		if refusal := c.write(&s, w, first); refusal != nil {
			return s, refusal
		}
	}
	for _, u := range w.relations {
		s.Relations = append(s.Relations, Relation{Schema: u.Schema, Name: u.Name.Name, Location: u.location, Write: slices.ContainsFunc(w.writes, func(t write) bool {
			return t.relation != nil && int(t.relation.Location) == u.location && t.relation.Relname == u.Name.Name
		})})
	}
	for _, u := range w.calls {
		if !u.row {
			s.Functions = append(s.Functions, Function{Schema: u.Schema, Name: u.Name.Name, Location: u.location})
		}
	}
	s.Writes = s.Writes || len(w.writes) > 0
	c.walkers = append(c.walkers, w)
	return s, nil
}

// kind refuses statements by what they are.
func (c *checker) kind(s *Statement, at int) *Refusal {
	refuse := func(format string, args ...any) *Refusal {
		return &Refusal{Reason: fmt.Sprintf(format, args...), Position: at}
	}
	switch s.Class {
	case Select:
		return nil
	case Show:
		if name := strings.ToLower(s.Node.GetVariableShowStmt().GetName()); pgverb.Secret(name) {
			return refuse("SHOW of %s is refused: its value may hold a password", name)
		}
		return nil
	case Explain:
		return refuse("EXPLAIN is refused: leave it out of the text, and ask for the plan with postern sql --explain (or explain in the request), which the data source's policy decides on")
	case CopyOut:
		if !c.in.CopyOut {
			return refuse("COPY is not supported here: use SELECT with a result format")
		}
		return nil
	case CopyIn:
		return refuse("COPY FROM is not supported: use INSERT")
	case Begin, Commit, Rollback, Savepoint, Release, RollbackTo, SetTx, Set, Reset, Prepare, Execute, Deallocate, Declare, Fetch, Close, Listen, Unlisten, Discard:
		return c.session(s, at)
	case Lock:
		if lock := s.Node.GetLockStmt(); lock != nil && !c.writes && (!c.in.Session || lock.Mode != 1) {
			return refuse("LOCK TABLE is refused: the data source is read-only")
		}
		return nil
	}
	if !c.writes {
		return refuse("the data source is read-only, which allows SELECT, VALUES, TABLE and WITH ... SELECT")
	}
	return nil
}

// session judges what concerns the transaction or the session.
func (c *checker) session(s *Statement, at int) *Refusal {
	if !c.in.Session {
		reason := "each statement runs in a session of its own, so this would have no effect"
		switch s.Class {
		case Begin, Commit, Rollback, Savepoint, Release, RollbackTo, SetTx:
			reason = "each statement runs in a transaction of its own"
		}
		return &Refusal{Reason: reason, Position: at}
	}
	if c.writes {
		if t := s.Node.GetTransactionStmt(); t != nil && t.Gid != "" {
			return &Refusal{Reason: "prepared transactions are refused: they outlive the session", Position: at}
		}
		return nil
	}
	switch s.Class {
	case Listen, Discard:
		return &Refusal{Reason: "the data source is read-only", Position: at}
	case Begin, SetTx:
		if !readOnlyOptions(s.Node) {
			return &Refusal{Reason: "the data source is read-only: a transaction can't be READ WRITE", Position: at}
		}
	}
	if t := s.Node.GetTransactionStmt(); t != nil && t.Gid != "" {
		return &Refusal{Reason: "prepared transactions are refused: the data source is read-only", Position: at}
	}
	return nil
}

// readOnlyOptions tells whether BEGIN or SET TRANSACTION asks for nothing but
// reading.
func readOnlyOptions(n *pgquery.Node) bool {
	options := n.GetTransactionStmt().GetOptions()
	if set := n.GetVariableSetStmt(); set != nil {
		options = set.Args
	}
	for _, o := range options {
		d := o.GetDefElem()
		if d == nil {
			return false
		}
		if d.Defname == "transaction_read_only" {
			if v := d.Arg.GetAConst().GetIval(); v == nil || v.Ival != 1 {
				return false
			}
		}
	}
	return true
}

// skipSpace passes white space and comments.
func skipSpace(text string, at, end int) int {
	for at < end {
		switch c := text[at]; {
		case c == ' ' || c == '\t' || c == '\n' || c == '\r' || c == '\f' || c == '\v':
			at++
		case c == '-' && at+1 < end && text[at+1] == '-':
			for at < end && text[at] != '\n' && text[at] != '\r' {
				at++
			}
		case c == '/' && at+1 < end && text[at+1] == '*':
			depth := 0
			for at < end {
				switch {
				case at+1 < end && text[at] == '/' && text[at+1] == '*':
					depth++
					at += 2
				case at+1 < end && text[at] == '*' && text[at+1] == '/':
					depth--
					at += 2
				default:
					at++
				}
				if depth == 0 {
					break
				}
			}
		default:
			return at
		}
	}
	return at
}

// resolve asks for what names mean and judges that.
func (c *checker) resolve(ctx context.Context) *Refusal {
	q := &c.question
	var deep bool
	for _, w := range c.walkers {
		for _, u := range w.calls {
			if c.writes && !c.narrowed && !isWorldly(u.Name.Name) {
				continue
			}
			q.Functions = append(q.Functions, u.Name)
		}
		if c.writes && !c.narrowed {
			continue // nothing else is judged
		}
		for _, u := range w.operators {
			q.Operators = append(q.Operators, u.Name)
		}
		for _, u := range w.types {
			q.Casts = append(q.Casts, u.Name.Name)
			if u.Schema != "pg_catalog" {
				q.Types = append(q.Types, u.Name)
			}
		}
		for _, u := range w.relations {
			if serverFiles[u.Name.Name] && (u.Schema == "" || u.Schema == "pg_catalog") {
				return &Refusal{Reason: fmt.Sprintf("%s reads the server's files", u.Name.Name), Position: u.location}
			}
			if u.Schema != "pg_catalog" {
				q.Relations = append(q.Relations, u.Name)
			}
		}
		deep = deep || w.makes
	}
	q.Deep = deep
	for _, names := range []*[]Name{&q.Functions, &q.Operators, &q.Types, &q.Relations} {
		slices.SortFunc(*names, func(a, b Name) int {
			return cmp.Or(cmp.Compare(a.Schema, b.Schema), cmp.Compare(a.Name, b.Name))
		})
		*names = slices.Compact(*names)
	}
	slices.Sort(q.Casts)
	q.Casts = slices.Compact(q.Casts)
	if len(q.Functions)+len(q.Operators)+len(q.Types)+len(q.Relations) == 0 {
		return nil
	}
	catalog, err := c.in.Resolver.Resolve(ctx, *q)
	if err != nil {
		return &Refusal{Reason: "what it names could not be looked up", Err: err}
	}
	if refusal := c.schemas(catalog); refusal != nil {
		return refusal
	}
	for _, w := range c.walkers {
		if refusal := c.judge(w, catalog); refusal != nil {
			return refusal
		}
	}
	return nil
}

// serverFiles are PostgreSQL's own views of files of the server's. Its other views
// only look at the database.
var serverFiles = set("pg_file_settings pg_hba_file_rules pg_ident_file_mappings")

// judge holds what a statement names against the catalog.
func (c *checker) judge(w *walker, catalog *Catalog) *Refusal {
	places := make(map[Name]int)
	for _, uses := range [][]use{w.calls, w.operators, w.types, w.relations} {
		for _, u := range uses {
			if _, ok := places[u.Name]; !ok {
				places[u.Name] = u.location
			}
		}
	}
	for _, u := range w.calls {
		for _, p := range catalog.Functions[u.Name] {
			if u.row && !p.Row && (!p.One || !u.scalar && !w.scalars) {
				continue
			}
			if !u.row && p.Name == "set_config" && p.OID < systemOID && harmlessSetting(u.node) {
				continue
			}
			if reason := c.mayRun(p); reason != "" {
				return &Refusal{Reason: fmt.Sprintf("the function %s.%s %s; %s", p.Schema, p.Name, reason, advice(p)), Position: u.location}
			}
		}
	}
	for _, h := range catalog.Hidden {
		if reason := c.mayRun(h.Proc); reason != "" {
			return &Refusal{
				Reason:   fmt.Sprintf("through %s it would call the function %s.%s, which %s; %s", h.Via, h.Schema, h.Proc.Name, reason, advice(h.Proc)),
				Position: places[h.From],
			}
		}
	}
	return nil
}

// harmlessSetting tells whether set_config is called with the constant name of a
// setting that may be set: of the next statements it changes no more than their
// owner could ask for, and it is reset before anybody else's.
func harmlessSetting(n *pgquery.FuncCall) bool {
	if n == nil || len(n.Args) != 3 || n.FuncVariadic {
		return false
	}
	return n.Args[0].GetAConst().GetSval().GetSval() == "search_path"
}
