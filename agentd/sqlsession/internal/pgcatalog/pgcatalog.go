package pgcatalog

import (
	"fmt"
	"slices"
	"strings"

	pgquery "github.com/pganalyze/pg_query_go/v6"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
)

// Verdict is what a statement reads.
type Verdict struct {
	// Catalog is set when it names relations, and all of them are the catalog's.
	Catalog bool
	// Reason says why a statement of the catalog must not run; "" if it may.
	Reason string
	// Offset is where, in bytes of the text from 0; -1 is unknown.
	Offset int
	// None is set when it names no relation at all.
	None bool
	// Relations are the names that must mean the catalog's own relations, and may be
	// nothing else.
	Relations []Relation
}

// Relation is a name in a statement. Schema is empty where the search path decides.
type Relation struct {
	Schema, Name string
	// Own is set for what is WITH's where it can be reached, and there must be no
	// relation of that name where it can't.
	Own bool
}

// Judge looks at a tree of one statement, of which package pgplan knows all nodes.
// A statement that may run reads relations of the server's catalog alone, none
// that is not on the list, names no hidden column, and reads no relation as a
// whole that has one.
func Judge(tree *pgtree.Tree) Verdict {
	w := &walker{ctes: make(map[string]bool), columns: make(map[*pgquery.Alias]bool), names: make(map[string]bool), parts: make(map[*pgquery.ColumnRef][]string)}
	w.walk(tree.GetStmts()[0].GetStmt().ProtoReflect())
	v := Verdict{Offset: -1, None: len(w.tables) == 0}
	secretive := false
	for _, t := range w.tables {
		own := t.Schemaname == "" && t.Catalogname == "" && w.ctes[t.Relname]
		v.Relations = append(v.Relations, Relation{Schema: t.Schemaname, Name: t.Relname, Own: own})
		if own {
			continue // or, out of its reach, a relation that the server says is ours or not
		}
		r, known := find(t)
		if !known && asksLimit(tree, t) {
			v.Catalog = true
			continue
		}
		if !known {
			if system(t) {
				v.Catalog = true
				v.refuse(int(t.Location), "%s is not told where only metadata is", name(t))
				continue
			}
			return Verdict{Offset: -1}
		}
		v.Catalog = true
		secretive = secretive || len(r.hidden) > 0
	}
	if !v.Catalog {
		return v
	}
	for cte := range w.ctes {
		if strings.HasPrefix(cte, "pg_") {
			v.refuse(-1, "WITH %s: a name beginning with pg_ is the catalog's", cte)
		}
	}
	if w.locks {
		v.refuse(-1, "the catalog is not locked where only metadata is told")
	}
	for _, s := range w.words {
		if hiddenColumns[s.text] {
			v.refuse(s.offset, "%s is not told where only metadata is: it may hold data", s.text)
		}
	}
	if !secretive {
		return v
	}
	const instead = "name the columns: some of the catalog's hold data and are not told"
	switch {
	case w.whole() != nil:
		v.refuse(max(0, int(w.whole().Location)), "* is refused where only metadata is told: %s", instead)
	case w.natural:
		v.refuse(-1, "NATURAL JOIN is refused where only metadata is told: %s", instead)
	}
	for _, ref := range w.refs {
		if ref.of != "" && ref.of != "pg_catalog" && ref.of != "information_schema" {
			continue // a column of what has that name: none of the schemas of what may be read
		}
		if w.names[ref.text] {
			v.refuse(ref.offset, "%s may be a whole row, which is refused where only metadata is told: %s", ref.text, instead)
		}
	}
	return v
}

// asksLimit tells whether the statement is SELECT setting FROM pg_settings WHERE name =
// 'one of limits', and nothing more: so JDBC asks what the server can.
func asksLimit(tree *pgtree.Tree, t *pgquery.RangeVar) bool {
	if t.Relname != "pg_settings" || t.Alias != nil || t.Catalogname != "" || t.Schemaname != "" && t.Schemaname != "pg_catalog" {
		return false
	}
	s := tree.GetStmts()[0].GetStmt().GetSelectStmt()
	where := s.GetWhereClause().GetAExpr()
	if s == nil || where == nil || len(s.FromClause) != 1 || s.FromClause[0].GetRangeVar() != t || len(s.TargetList) != 1 {
		return false
	}
	// Nothing else is in it: what is left when its parts are taken out is an empty one.
	rest := &pgquery.SelectStmt{TargetList: s.TargetList, FromClause: s.FromClause, WhereClause: s.WhereClause, LimitOption: s.LimitOption, Op: s.Op}
	return proto.Equal(rest, s) && s.Op == pgquery.SetOperation_SETOP_NONE && isColumn(s.TargetList[0].GetResTarget().GetVal(), "setting") &&
		where.Kind == pgquery.A_Expr_Kind_AEXPR_OP && len(where.Name) == 1 && where.Name[0].GetString_().GetSval() == "=" &&
		isColumn(where.Lexpr, "name") && limits[where.Rexpr.GetAConst().GetSval().GetSval()]
}

func isColumn(n *pgquery.Node, name string) bool {
	f := n.GetColumnRef().GetFields()
	return len(f) == 1 && f[0].GetString_().GetSval() == name
}

func (v *Verdict) refuse(offset int, format string, args ...any) {
	if v.Reason == "" {
		v.Reason, v.Offset = fmt.Sprintf(format, args...), offset
	}
}

func find(t *pgquery.RangeVar) (relation, bool) {
	if t.Catalogname != "" {
		return relation{}, false
	}
	schema := t.Schemaname
	if schema == "" {
		schema = "pg_catalog"
	}
	r, ok := relations[schema][t.Relname]
	return r, ok
}

// system tells whether a name can only be one of the server's own relations.
func system(t *pgquery.RangeVar) bool {
	return t.Schemaname == "pg_catalog" || t.Schemaname == "information_schema" || t.Schemaname == "pg_toast" ||
		t.Schemaname == "" && strings.HasPrefix(t.Relname, "pg_")
}

func name(t *pgquery.RangeVar) string {
	if t.Schemaname == "" {
		return t.Relname
	}
	return t.Schemaname + "." + t.Relname
}

// word is an identifier in the text.
type word struct {
	text   string
	offset int
	// of is the name before it, of two.
	of string
}

type walker struct {
	tables []*pgquery.RangeVar
	ctes   map[string]bool
	// columns are aliases of functions.
	columns map[*pgquery.Alias]bool
	// names are what a whole row can be called: relations and aliases.
	names map[string]bool
	// words are all identifiers, refs the last ones of references to columns.
	words, refs []word
	// stars are where * stands. Of parts are those that mean the columns of subqueries
	// alone, if WITH has made the names.
	stars   []*pgquery.ColumnRef
	parts   map[*pgquery.ColumnRef][]string
	natural bool
	locks   bool
}

func (w *walker) walk(m protoreflect.Message) {
	switch x := m.Interface().(type) {
	case *pgquery.A_Const:
		return // no identifier in it
	case *pgquery.RangeVar:
		w.tables = append(w.tables, x)
		w.names[x.Relname] = true
	case *pgquery.RangeFunction:
		// What a function returns is no row of the catalog's: its alias is a column.
		if x.Alias != nil {
			w.columns[x.Alias] = true
		}
	case *pgquery.Alias:
		if w.columns[x] {
			break
		}
		w.names[x.Aliasname] = true
	case *pgquery.SelectStmt:
		w.query(x)
	case *pgquery.CommonTableExpr:
		w.ctes[x.Ctename] = true
	case *pgquery.JoinExpr:
		w.natural = w.natural || x.IsNatural
	case *pgquery.LockingClause:
		w.locks = true
	case *pgquery.String:
		w.words = append(w.words, word{text: x.Sval, offset: -1})
	case *pgquery.ColumnRef:
		w.column(x)
	}
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.Message() == nil:
		case f.IsList():
			list := v.List()
			for i := range list.Len() {
				w.walk(list.Get(i).Message())
			}
		default:
			w.walk(v.Message())
		}
		return true
	})
}

// whole is a * that may mean all columns of a relation; nil: there is none.
func (w *walker) whole() *pgquery.ColumnRef {
	for _, star := range w.stars {
		with, ok := w.parts[star]
		if !ok || slices.ContainsFunc(with, func(name string) bool { return !w.ctes[name] }) {
			return star
		}
	}
	return nil
}

// query notes SELECT * FROM (SELECT ...): the columns are those that the subquery names.
func (w *walker) query(x *pgquery.SelectStmt) {
	with := []string{}
	for _, from := range x.FromClause {
		if !derived(from, &with) {
			return
		}
	}
	for _, target := range x.TargetList {
		ref := target.GetResTarget().GetVal().GetColumnRef()
		if len(ref.GetFields()) == 1 && ref.Fields[0].GetAStar() != nil {
			w.parts[ref] = with
		}
	}
}

// derived tells whether something in FROM is made of subqueries and functions, and of
// what WITH must have made.
func derived(n *pgquery.Node, with *[]string) bool {
	switch {
	case n.GetRangeVar() != nil && n.GetRangeVar().Schemaname == "" && n.GetRangeVar().Catalogname == "":
		*with = append(*with, n.GetRangeVar().Relname)
		return true
	case n.GetRangeSubselect() != nil, n.GetRangeFunction() != nil:
		return true
	case n.GetJoinExpr() != nil:
		return derived(n.GetJoinExpr().GetLarg(), with) && derived(n.GetJoinExpr().GetRarg(), with)
	}
	return false
}

func (w *walker) column(x *pgquery.ColumnRef) {
	for i, f := range x.Fields {
		if f.GetAStar() != nil {
			w.stars = append(w.stars, x)
		}
		if s := f.GetString_(); s != nil {
			if hiddenColumns[s.Sval] {
				w.words = append(w.words, word{text: s.Sval, offset: int(x.Location)})
			}
			if i == len(x.Fields)-1 {
				ref := word{text: s.Sval, offset: int(x.Location)}
				if len(x.Fields) == 2 {
					ref.of = x.Fields[0].GetString_().GetSval()
				}
				w.refs = append(w.refs, ref)
			}
		}
	}
}
