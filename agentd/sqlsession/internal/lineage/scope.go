package lineage

import (
	pgquery "github.com/pganalyze/pg_query_go/v6"
)

// taint is what is known of a value; the zero value is clean.
type taint struct {
	on     bool // it may depend on a masked column
	plain  bool // it is a copy of one, masked by rule
	mixed  bool // of other rows it is a copy of something else
	null   bool // what is made of it becomes NULL
	rule   int
	source string
}

// derived is the taint of something made of the value.
func (t taint) derived() taint {
	t.plain, t.mixed = false, false
	return t
}

// mix is the taint of something made of both.
func mix(a, b taint) taint {
	switch {
	case !a.on:
		return b.derived()
	case !b.on:
		return a.derived()
	}
	a.plain, a.mixed, a.null = false, false, a.null || b.null
	return a
}

// either is the taint of a value that is one or the other.
func either(a, b taint) taint {
	switch {
	case !a.on:
		b.mixed = b.on && b.plain
		return b
	case !b.on:
		a.mixed = a.plain
		return a
	case a.plain && b.plain && a.rule == b.rule:
		a.mixed = a.mixed || b.mixed
		return a
	}
	return mix(a, b)
}

// col is a column of something in FROM, or of a result.
type col struct {
	name  string
	sure  bool // the name is certain
	taint taint
	from  origin
}

// item is an entry of FROM.
type item struct {
	schema, name string // as it may be called; name "": not at all
	cols         []col
	// open tells that there may be more columns than cols, with the taint rest.
	open bool
	rest taint
	// rel and unq tell whether NAME.COLUMN and COLUMN reach its columns.
	rel, unq bool
}

// whole is the taint of the item as a row.
func (it *item) whole() taint {
	t := it.rest
	for i := range it.cols {
		t = mix(t, it.cols[i].taint)
	}
	return t.derived()
}

func (it *item) column(name string) (taint, origin, bool) {
	var t taint
	var from origin
	found := 0
	for i := range it.cols {
		if it.cols[i].name != name {
			continue
		}
		if found++; found == 1 {
			t, from = it.cols[i].taint, it.cols[i].from
		} else {
			t, from = mix(t, it.cols[i].taint), origin{}
		}
	}
	return t, from, found > 0
}

// scope is where names are looked up: the FROM of one query level.
type scope struct {
	parent *scope
	items  []*item
	env    *env
	view   bool // inside a view's definition: how it uses columns is its owner's matter
	// windows are the taints of the orders of named windows.
	windows map[string]taint
}

// env is the CTEs that are in sight.
type env struct {
	parent *env
	names  map[string]*cte
}

func (e *env) find(name string) *cte {
	for ; e != nil; e = e.parent {
		if c := e.names[name]; c != nil {
			return c
		}
	}
	return nil
}

func isSystemColumn(name string) bool {
	switch name {
	case "ctid", "xmin", "xmax", "cmin", "cmax", "tableoid":
		return true
	}
	return false
}

// fields are the parts of a column's name; star tells that it ends in one.
func fields(ref *pgquery.ColumnRef) (parts []string, star bool) {
	for _, f := range ref.Fields {
		if f.GetAStar() != nil {
			star = true
			continue
		}
		parts = append(parts, f.GetString_().GetSval())
	}
	return parts, star
}

// unqualified looks a column up at all levels.
func (s *scope) unqualified(name string) (taint, origin, bool) {
	var rest taint
	open := false
	for ; s != nil; s = s.parent {
		var t taint
		var from origin
		found := 0
		for _, it := range s.items {
			if !it.unq {
				continue
			}
			if one, at, ok := it.column(name); ok {
				if found++; found == 1 {
					t, from = one, at
				} else {
					t, from = mix(t, one), origin{}
				}
			}
		}
		if found > 0 {
			if open {
				return mix(t, rest), origin{}, true
			}
			return t, from, true
		}
		for _, it := range s.items {
			if it.unq && it.open {
				open, rest = true, mix(rest, it.rest)
			}
		}
		if isSystemColumn(name) && len(s.items) > 0 {
			return rest, origin{}, true
		}
	}
	return rest, origin{}, open
}

// relation looks an entry of FROM up at all levels.
func (s *scope) relation(schema, name string) *item {
	for ; s != nil; s = s.parent {
		for _, it := range s.items {
			if it.rel && it.name == name && (schema == "" || it.schema == schema) {
				return it
			}
		}
	}
	return nil
}

// columnRef is the taint of a column's name, or of a row's.
func (a *analyzer) columnRef(s *scope, ref *pgquery.ColumnRef) (taint, origin) {
	parts, star := fields(ref)
	if star {
		return a.starTaint(s, ref, parts), origin{}
	}
	switch n := len(parts); {
	case n == 1:
		if t, from, ok := s.unqualified(parts[0]); ok {
			return t, from
		}
		if it := s.relation("", parts[0]); it != nil {
			return it.whole(), origin{}
		}
	case n >= 2 && n <= 4:
		schema := ""
		if n > 2 {
			schema = parts[n-3]
		}
		it := s.relation(schema, parts[n-2])
		if it == nil {
			break
		}
		if t, from, ok := it.column(parts[n-1]); ok {
			return t, from
		}
		if isSystemColumn(parts[n-1]) {
			return taint{}, origin{}
		}
		if it.open {
			return it.rest, origin{}
		}
		// A function of the row, written as a column.
	}
	name := ""
	if len(parts) > 0 {
		name = parts[len(parts)-1]
	}
	a.refuse(ref.Location, "%q is not understood as a column: the data source masks columns, and what can't be followed is refused", name)
	return taint{}, origin{}
}

// starTaint is for * where it is not a list of columns: count(t.*).
func (a *analyzer) starTaint(s *scope, ref *pgquery.ColumnRef, parts []string) taint {
	var t taint
	for _, it := range a.starItems(s, ref, parts) {
		t = mix(t, it.whole())
	}
	return t
}

func (a *analyzer) starItems(s *scope, ref *pgquery.ColumnRef, parts []string) []*item {
	switch n := len(parts); n {
	case 0:
		var items []*item
		for _, it := range s.items {
			if it.unq {
				items = append(items, it)
			}
		}
		return items
	case 1, 2, 3:
		schema := ""
		if n > 1 {
			schema = parts[n-2]
		}
		if it := s.relation(schema, parts[n-1]); it != nil {
			return []*item{it}
		}
	}
	a.refuse(ref.Location, "the table before .* is not understood: the data source masks columns, and what can't be followed is refused")
	return nil
}
