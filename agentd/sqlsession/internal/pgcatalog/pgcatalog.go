package pgcatalog

import (
	"fmt"
	"strings"

	pgquery "github.com/pganalyze/pg_query_go/v6"
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
}

// Judge looks at a tree of one statement, of which package pgplan knows all nodes.
// A statement that may run reads relations of the server's catalog alone, none
// that is not on the list, names no hidden column, and reads no relation as a
// whole that has one.
func Judge(tree *pgtree.Tree) Verdict {
	w := &walker{stars: -1, ctes: make(map[string]bool), columns: make(map[*pgquery.Alias]bool), names: make(map[string]bool)}
	w.walk(tree.GetStmts()[0].GetStmt().ProtoReflect())
	v := Verdict{Offset: -1}
	secretive := false
	for _, t := range w.tables {
		if t.Schemaname == "" && t.Catalogname == "" && w.ctes[t.Relname] {
			continue // or, out of its reach, a relation that the server says is ours or not
		}
		r, known := find(t)
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
	case w.stars >= 0:
		v.refuse(w.stars, "* is refused where only metadata is told: %s", instead)
	case w.natural:
		v.refuse(-1, "NATURAL JOIN is refused where only metadata is told: %s", instead)
	}
	for _, ref := range w.refs {
		if w.names[ref.text] {
			v.refuse(ref.offset, "%s may be a whole row, which is refused where only metadata is told: %s", ref.text, instead)
		}
	}
	return v
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
	stars       int // where the first * stands; -1: nowhere
	natural     bool
	locks       bool
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
	case *pgquery.CommonTableExpr:
		w.ctes[x.Ctename] = true
	case *pgquery.JoinExpr:
		w.natural = w.natural || x.IsNatural
	case *pgquery.LockingClause:
		w.locks = true
	case *pgquery.String:
		w.words = append(w.words, word{x.Sval, -1})
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

func (w *walker) column(x *pgquery.ColumnRef) {
	for i, f := range x.Fields {
		if f.GetAStar() != nil {
			w.stars = max(0, int(x.Location))
		}
		if s := f.GetString_(); s != nil {
			if hiddenColumns[s.Sval] {
				w.words = append(w.words, word{s.Sval, int(x.Location)})
			}
			if i == len(x.Fields)-1 {
				w.refs = append(w.refs, word{s.Sval, int(x.Location)})
			}
		}
	}
}
