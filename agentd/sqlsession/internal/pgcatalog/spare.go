package pgcatalog

import (
	"slices"
	"strings"

	pgquery "github.com/pganalyze/pg_query_go/v6"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/sqltext"
)

// Hidden stands in an answer for what is there and not told.
const Hidden = "(hidden)"

// Spare makes of a statement of the catalog, which Judge refuses, one that tells the
// same less what holds data: psql's \d and others ask for names, types and keys in one
// statement with defaults and definitions. Where those stand it puts expressions of
// its own.
//
// sent is for the server. judged has in the same places calls that name the same
// columns and nothing else: it must be parsed and judged as any other text. Both are
// "" when there is nothing to put in place. text is what tree was made of.
func Spare(text string, tree *pgtree.Tree) (judged, sent string) {
	s := &sparer{text: text}
	s.walk(tree.GetStmts()[0].GetStmt().ProtoReflect())
	if len(s.cuts) == 0 {
		return "", ""
	}
	slices.SortStableFunc(s.cuts, func(a, b cut) int { return a.from - b.from })
	var j, o strings.Builder
	at := 0
	for _, c := range s.cuts {
		if c.from < at || c.to > len(text) {
			return "", "" // not understood
		}
		j.WriteString(text[at:c.from] + c.judged)
		o.WriteString(text[at:c.from] + c.sent)
		at = c.to
	}
	return j.String() + text[at:], o.String() + text[at:]
}

// cut is a piece of the text that something else takes the place of.
type cut struct {
	from, to     int
	judged, sent string
}

type sparer struct {
	text string
	cuts []cut
	// result: what is walked is part of what a SELECT returns, or is sorted by. A condition on what is
	// hidden would be answered wrongly, and stays for Judge to refuse.
	result bool
}

// definitions are the server's functions that tell definitions, with what they are
// put in place of them; ? is their first argument.
var definitions = map[string]string{
	"pg_get_expr":             `(CASE WHEN (?) IS NOT NULL THEN '(hidden)' END)`,
	"pg_get_viewdef":          `('(hidden)'::pg_catalog.text)`,
	"pg_get_functiondef":      `('(hidden)'::pg_catalog.text)`,
	"pg_get_function_sqlbody": `('(hidden)'::pg_catalog.text)`,
	"pg_get_triggerdef":       `('(hidden)'::pg_catalog.text)`,
	"pg_tablespace_location":  `('(hidden)'::pg_catalog.text)`,
	// Sizes tell of rows.
	"pg_table_size":                   `(NULL::pg_catalog.int8)`,
	"pg_total_relation_size":          `(NULL::pg_catalog.int8)`,
	"pg_relation_size":                `(NULL::pg_catalog.int8)`,
	"pg_indexes_size":                 `(NULL::pg_catalog.int8)`,
	"pg_database_size":                `(NULL::pg_catalog.int8)`,
	"pg_tablespace_size":              `(NULL::pg_catalog.int8)`,
	"pg_get_statisticsobjdef_columns": `('(hidden)'::pg_catalog.text)`,
	"pg_get_statisticsobjdef":         `('(hidden)'::pg_catalog.text)`,
	"pg_get_partkeydef":               `('(hidden)'::pg_catalog.text)`,
	"pg_get_partition_constraintdef":  `('(hidden)'::pg_catalog.text)`,
	// psql takes for granted how it begins.
	"pg_get_ruledef":            `('CREATE RULE (hidden)'::pg_catalog.text)`,
	"pg_get_function_arguments": `pg_catalog.pg_get_function_identity_arguments(?)`,
	// Keys are names; checks and exclusions are expressions.
	"pg_get_constraintdef": `(SELECT CASE WHEN postern_k.contype OPERATOR(pg_catalog.=) ANY ('{p,u,f}'::pg_catalog."char"[]) THEN pg_catalog.pg_get_constraintdef(postern_k.oid, true)
 WHEN postern_k.contype OPERATOR(pg_catalog.=) 'c'::pg_catalog."char" THEN 'CHECK (hidden)' ELSE '(hidden)' END
 FROM (SELECT ? AS postern_x) postern_v, pg_catalog.pg_constraint postern_k WHERE postern_k.oid OPERATOR(pg_catalog.=) postern_v.postern_x)`,
	"pg_get_indexdef": `(SELECT CASE WHEN postern_i.indexprs IS NULL AND postern_i.indpred IS NULL THEN pg_catalog.pg_get_indexdef(postern_i.indexrelid, #, true) ELSE '(hidden)' END
 FROM (SELECT ? AS postern_x) postern_v, pg_catalog.pg_index postern_i WHERE postern_i.indexrelid OPERATOR(pg_catalog.=) postern_v.postern_x)`,
}

// numbers are hidden columns of other types than text, with what takes their place:
// what the server itself says when it does not know.
var numbers = map[string]string{
	"reltuples": "((-1)::pg_catalog.float4)", "relpages": "(0::pg_catalog.int4)", "relallvisible": "(0::pg_catalog.int4)", "relallfrozen": "(0::pg_catalog.int4)",
}

func (s *sparer) walk(m protoreflect.Message) {
	was := s.result
	defer func() { s.result = was }()
	query := false
	switch x := m.Interface().(type) {
	case *pgquery.SelectStmt:
		query = true
	case *pgquery.FuncCall:
		if s.result && s.call(x) {
			return
		}
	case *pgquery.ColumnRef:
		if s.result {
			s.column(x)
		}
		return
	case *pgquery.ResTarget:
		// A column of a result keeps its name.
		if s.result && x.Name == "" && s.named(x) {
			return
		}
	}
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		if query {
			s.result = f.Name() == "target_list" || f.Name() == "sort_clause"
		}
		switch {
		case f.Message() == nil:
		case f.IsList():
			for i := range v.List().Len() {
				s.walk(v.List().Get(i).Message())
			}
		default:
			s.walk(v.Message())
		}
		return true
	})
}

// named spares a whole column of a result and keeps the name that it would have.
func (s *sparer) named(x *pgquery.ResTarget) bool {
	before := len(s.cuts)
	name := ""
	if call := x.GetVal().GetFuncCall(); call != nil && s.call(call) {
		name = call.Funcname[len(call.Funcname)-1].GetString_().GetSval()
	} else if ref := x.GetVal().GetColumnRef(); ref != nil {
		s.column(ref)
		if fields := ref.GetFields(); len(fields) > 0 {
			name = fields[len(fields)-1].GetString_().GetSval()
		}
	} else {
		return false
	}
	if len(s.cuts) == before+1 {
		c := &s.cuts[before]
		c.judged += " AS " + quote(name)
		c.sent += " AS " + quote(name)
	}
	return true
}

// call spares a call of one of definitions.
func (s *sparer) call(x *pgquery.FuncCall) bool {
	names := x.GetFuncname()
	if len(names) == 0 || len(names) == 2 && names[0].GetString_().GetSval() != "pg_catalog" || len(names) > 2 {
		return false
	}
	instead, ok := definitions[names[len(names)-1].GetString_().GetSval()]
	if !ok || len(x.GetArgs()) == 0 || len(x.GetArgs()) > 3 || x.GetAggFilter() != nil || x.GetOver() != nil || x.GetAggStar() || x.GetAggDistinct() || x.GetFuncVariadic() || len(x.GetAggOrder()) > 0 || x.GetAggWithinGroup() {
		return false
	}
	argument, ok := plain(x.Args[0])
	if !ok && strings.Contains(instead, "?") {
		return false
	}
	number := "0"
	for i, a := range x.Args[1:] {
		c := a.GetAConst()
		switch v := c.GetVal().(type) {
		case *pgquery.A_Const_Ival:
			if i == 0 && v.Ival.GetIval() > 0 && v.Ival.GetIval() < 10_000 {
				number = itoa(v.Ival.GetIval())
			}
		case *pgquery.A_Const_Boolval:
		default:
			if other, ok := plain(a); ok && i == 0 {
				number = other
				break
			}
			if _, ok := plain(a); !ok && strings.Contains(instead, "?") {
				return false
			}
		}
	}
	end := callEnd(s.text, int(x.Location))
	if end < 0 {
		return false
	}
	if names[len(names)-1].GetString_().GetSval() != "pg_get_indexdef" {
		number = "0"
	}
	judged := "pg_catalog.num_nulls(" + argument + ")"
	if !strings.Contains(instead, "?") {
		judged, number = "pg_catalog.num_nulls(NULL)", "0"
	}
	if number != "0" {
		judged = "pg_catalog.num_nulls(" + argument + ", " + number + ")"
	}
	if x.Args[0].GetColumnRef() != nil && hiddenColumns[lastField(x.Args[0].GetColumnRef())] {
		judged = "pg_catalog.num_nulls(NULL)"
	}
	s.cuts = append(s.cuts, cut{int(x.Location), end, judged, strings.NewReplacer("?", argument, "#", number).Replace(instead)})
	return true
}

// column spares a reference to a hidden column.
func (s *sparer) column(x *pgquery.ColumnRef) {
	name := lastField(x)
	if !hiddenColumns[name] {
		return
	}
	argument, ok := plain(&pgquery.Node{Node: &pgquery.Node_ColumnRef{ColumnRef: x}})
	end := namesEnd(s.text, int(x.Location), len(x.Fields))
	if !ok || end < 0 {
		return
	}
	instead, isNumber := numbers[name]
	if !isNumber {
		instead = "(CASE WHEN " + argument + " IS NOT NULL THEN '(hidden)' END)"
	}
	s.cuts = append(s.cuts, cut{int(x.Location), end, "pg_catalog.num_nulls(NULL)", instead})
}

func lastField(x *pgquery.ColumnRef) string {
	if n := len(x.GetFields()); n > 0 {
		return x.Fields[n-1].GetString_().GetSval()
	}
	return ""
}

// plain writes a reference to a column, a parameter or an object's number anew.
func plain(n *pgquery.Node) (string, bool) {
	if c := n.GetTypeCast(); c != nil {
		s := c.GetArg().GetAConst().GetSval()
		if s == nil || s.Sval == "" || strings.Trim(s.Sval, "0123456789") != "" {
			return "", false
		}
		return "'" + s.Sval + "'::pg_catalog.oid", true
	}
	if i, ok := n.GetAConst().GetVal().(*pgquery.A_Const_Ival); ok && i.Ival.GetIval() > 0 {
		return itoa(i.Ival.GetIval()), true
	}
	if p := n.GetParamRef(); p.GetNumber() > 0 {
		return "$" + itoa(p.GetNumber()), true
	}
	ref := n.GetColumnRef()
	if ref == nil || len(ref.Fields) == 0 || len(ref.Fields) > 3 {
		return "", false
	}
	var parts []string
	for _, f := range ref.Fields {
		name := f.GetString_()
		if name == nil || strings.ContainsAny(name.Sval, "?#") {
			return "", false
		}
		parts = append(parts, quote(name.Sval))
	}
	return strings.Join(parts, "."), true
}

func quote(name string) string { return `"` + strings.ReplaceAll(name, `"`, `""`) + `"` }

func itoa(n int32) string {
	var digits []byte
	for ; n > 0; n /= 10 {
		digits = append(digits, byte('0'+n%10))
	}
	slices.Reverse(digits)
	return string(digits)
}

// callEnd is where the call ends that begins at from; -1: it is not understood.
func callEnd(text string, from int) int {
	depth := 0
	if from < 0 || from > len(text) {
		return -1
	}
	for t := range sqltext.Tokens(text[from:]) {
		switch {
		case t.Kind != sqltext.Symbol:
		case t.Text == "(":
			depth++
		case t.Text == ")":
			if depth--; depth == 0 {
				return from + t.Start + len(t.Text)
			}
			if depth < 0 {
				return -1
			}
		case depth == 0 && t.Text != ".":
			return -1
		}
	}
	return -1
}

// namesEnd is where a reference ends that begins at from and has so many names.
func namesEnd(text string, from, names int) int {
	if from < 0 || from > len(text) {
		return -1
	}
	for t := range sqltext.Tokens(text[from:]) {
		switch t.Kind {
		case sqltext.Space:
		case sqltext.Word, sqltext.Quoted:
			if names--; names == 0 {
				return from + t.Start + len(t.Text)
			}
		default:
			if t.Text != "." {
				return -1
			}
		}
	}
	return -1
}
