package lineage

import (
	"slices"
	"strings"

	pgquery "github.com/pganalyze/pg_query_go/v6"
)

// relationColumns are a relation's columns with what the rules, and for views
// their definitions, say of each. location is where it is named.
func (a *analyzer) relationColumns(r *Relation, location int32) []col {
	if cols, ok := a.views[r.OID]; ok {
		return cols
	}
	cols := make([]col, len(r.Columns))
	hidden := sensitive[Name{r.Schema, r.Name}]
	for i, c := range r.Columns {
		name := r.Schema + "." + r.Name + "." + c.Name
		cols[i] = col{name: c.Name, sure: true, from: origin{r.OID, c.Number}}
		if rule := a.ruleOf(r, c.Name); rule >= 0 {
			cols[i].taint = taint{on: true, plain: true, rule: rule, null: a.policy.Rules[rule].Null, source: name}
		} else if r.system() && slices.Contains(hidden, c.Name) || r.Kind == 't' && c.Name == "chunk_data" {
			cols[i].taint = taint{on: true, rule: -1, source: name}
		}
	}
	if tree := a.trees[r.OID]; tree != nil {
		a.definition(r, tree, cols, location)
	}
	a.generated(r, cols, location)
	a.views[r.OID] = cols
	if r.system() || r.Schema == "pg_temp" || strings.HasPrefix(r.Schema, "pg_temp_") {
		a.made[r.OID] = true
	}
	a.plan.known[r.OID] = true
	for _, c := range cols {
		if c.taint.on {
			a.plan.masked[c.from] = true
			a.touches = true
		}
	}
	return cols
}

// definition adds what a view's definition says of its columns.
func (a *analyzer) definition(r *Relation, tree *pgquery.Node, cols []col, location int32) {
	if a.under[r.OID] {
		a.refuse(location, "the view %s.%s reads itself: its masked columns can't be followed", r.Schema, r.Name)
	}
	a.under[r.OID] = true
	defer delete(a.under, r.OID)
	if a.at < 0 {
		// Positions in the definition are not the user's.
		a.at = max(0, int(location))
		defer func() { a.at = -1 }()
	}
	defer a.enter()()
	defined := a.query(tree, &scope{view: true})
	if len(defined) != len(cols) {
		a.refuse(location, "the definition of the view %s.%s is not understood, so its masked columns can't be followed", r.Schema, r.Name)
	}
	for i := range cols {
		own, inside := cols[i].taint, defined[i].taint
		switch {
		case !inside.on:
		case own.on && !inside.plain:
			cols[i].taint = mix(inside, own)
		default:
			cols[i].taint = inside
		}
	}
}

// generated follows columns that are made of others of their row.
func (a *analyzer) generated(r *Relation, cols []col, location int32) {
	for i, c := range r.Columns {
		if c.Generated == "" || cols[i].taint.on {
			continue
		}
		tree, err := a.parser.Parse(a.ctx, "SELECT "+c.Generated)
		if err != nil || len(tree.Stmts) != 1 || len(tree.Stmts[0].Stmt.GetSelectStmt().GetTargetList()) != 1 {
			a.refuse(location, "the expression of the generated column %s.%s.%s is not understood, so its masked columns can't be followed", r.Schema, r.Name, c.Name)
		}
		it := &item{name: r.Name, schema: r.Schema, cols: cols, rel: true, unq: true}
		s := &scope{items: []*item{it}, view: true}
		// Its functions are the table's own; what they make of a masked column
		// is masked.
		value := tree.Stmts[0].Stmt.GetSelectStmt().TargetList[0].GetResTarget().GetVal()
		cols[i].taint = a.mentions(s, value).derived()
	}
}

// mentions is the taint of all columns that an expression names.
func (a *analyzer) mentions(s *scope, n *pgquery.Node) taint {
	if ref := n.GetColumnRef(); ref != nil {
		t, _ := a.columnRef(s, ref)
		return t
	}
	var t taint
	if m := inner(n); m != nil {
		children(m, func(child *pgquery.Node) { t = mix(t, a.mentions(s, child)) })
	}
	return t
}

// from adds an entry of FROM to the scope.
func (a *analyzer) from(s *scope, n *pgquery.Node) {
	defer a.enter()()
	switch v := n.GetNode().(type) {
	case *pgquery.Node_RangeVar:
		s.items = append(s.items, a.rangeVar(s, v.RangeVar))
	case *pgquery.Node_RangeSubselect:
		r := v.RangeSubselect
		outer := &scope{parent: s.parent, env: s.env, view: s.view}
		if r.Lateral {
			outer.parent = s
		}
		s.items = append(s.items, named(r.Alias, "", a.query(r.Subquery, outer)))
	case *pgquery.Node_JoinExpr:
		a.join(s, v.JoinExpr)
	case *pgquery.Node_RangeFunction:
		s.items = append(s.items, a.rangeFunction(s, v.RangeFunction))
	case *pgquery.Node_RangeTableSample:
		a.from(s, v.RangeTableSample.Relation)
		for _, arg := range append(slices.Clone(v.RangeTableSample.Args), v.RangeTableSample.Repeatable) {
			a.control(s, arg, "TABLESAMPLE")
		}
	case *pgquery.Node_RangeTableFunc:
		r := v.RangeTableFunc
		var t taint
		for _, arg := range slices.Concat([]*pgquery.Node{r.Docexpr, r.Rowexpr}, r.Namespaces) {
			t = mix(t, a.source(s, arg))
		}
		var cols []col
		for _, c := range r.Columns {
			column := c.GetRangeTableFuncCol()
			one := t
			for _, arg := range []*pgquery.Node{column.GetColexpr(), column.GetColdefexpr()} {
				one = mix(one, a.source(s, arg))
			}
			cols = append(cols, col{name: column.GetColname(), sure: true, taint: one})
		}
		s.items = append(s.items, named(r.Alias, "xmltable", cols))
	case *pgquery.Node_JsonTable:
		r := v.JsonTable
		var t taint
		if m := r.ContextItem; m != nil {
			t = mix(a.source(s, m.RawExpr), a.source(s, m.FormattedExpr))
		}
		for _, arg := range r.Passing {
			t = mix(t, a.source(s, arg))
		}
		s.items = append(s.items, named(r.Alias, "json_table", jsonColumns(r.Columns, t)))
	default:
		a.refuse(locationOf(n), "this part of FROM is not understood: the data source masks columns, and what can't be followed is refused")
	}
}

// source is the taint of what a function in FROM works on. How many rows it
// makes of it can be counted, so it may only be masked where that is allowed.
func (a *analyzer) source(s *scope, n *pgquery.Node) taint {
	t, _ := a.expr(s, n)
	if t.on && a.strict(s) {
		a.refuse(locationOf(n), "a function in FROM makes rows of the masked column %s, which could be counted", t.source)
	}
	return t
}

func jsonColumns(columns []*pgquery.Node, t taint) []col {
	var cols []col
	for _, c := range columns {
		column := c.GetJsonTableColumn()
		if column == nil {
			continue
		}
		if column.Coltype == pgquery.JsonTableColumnType_JTC_NESTED {
			cols = append(cols, jsonColumns(column.Columns, t)...)
			continue
		}
		cols = append(cols, col{name: column.Name, sure: true, taint: t.derived()})
	}
	return cols
}

// named makes an entry of FROM of columns, under an alias.
func named(alias *pgquery.Alias, name string, cols []col) *item {
	it := &item{name: name, cols: slices.Clone(cols), rel: true, unq: true}
	if alias != nil {
		it.name = alias.Aliasname
		rename(it.cols, alias.Colnames)
	}
	return it
}

func rename(cols []col, names []*pgquery.Node) {
	for i, n := range names {
		if i < len(cols) {
			cols[i].name, cols[i].sure = n.GetString_().GetSval(), true
		}
	}
}

func (a *analyzer) rangeVar(s *scope, v *pgquery.RangeVar) *item {
	if v.Schemaname == "" {
		if c := s.env.find(v.Relname); c != nil {
			return named(v.Alias, v.Relname, a.cteColumns(c, v.Location))
		}
	}
	r := a.found.Relations[rangeName(v)]
	if r == nil {
		a.refuse(v.Location, "the table %q is not found in the catalog: the data source masks columns, and what can't be followed is refused", rangeName(v))
	}
	it := named(v.Alias, r.Name, a.relationColumns(r, v.Location))
	if v.Alias == nil {
		it.schema = r.Schema
	}
	return it
}

func (a *analyzer) rangeFunction(s *scope, r *pgquery.RangeFunction) *item {
	it := &item{rel: true, unq: true}
	for i, f := range r.Functions {
		parts := f.GetList().GetItems()
		if len(parts) == 0 {
			a.refuse(locationOf(f), "this function in FROM is not understood: the data source masks columns, and what can't be followed is refused")
		}
		t := a.source(s, parts[0])
		name, _ := figureName(parts[0])
		if i == 0 {
			it.name = name
		}
		definitions := r.Coldeflist
		if len(parts) > 1 && len(parts[1].GetList().GetItems()) > 0 {
			definitions = parts[1].GetList().GetItems()
		}
		cols, open := a.functionColumns(parts[0], name, definitions, r.Alias)
		for j := range cols {
			cols[j].taint = t.derived()
		}
		it.cols = append(it.cols, cols...)
		if open {
			it.open, it.rest = true, mix(it.rest, t)
		}
	}
	if r.Ordinality {
		it.cols = append(it.cols, col{name: "ordinality", sure: true, taint: it.whole()})
	}
	if r.Alias != nil {
		it.name = r.Alias.Aliasname
		rename(it.cols, r.Alias.Colnames)
	}
	return it
}

// functionColumns are the columns of a function in FROM; open means that there
// may be others.
func (a *analyzer) functionColumns(call *pgquery.Node, name string, definitions []*pgquery.Node, alias *pgquery.Alias) (cols []col, open bool) {
	if len(definitions) > 0 {
		for _, d := range definitions {
			cols = append(cols, col{name: d.GetColumnDef().GetColname(), sure: true})
		}
		return cols, false
	}
	f := call.GetFuncCall()
	if f == nil {
		return []col{{name: single(name, alias)}}, false
	}
	candidates := a.found.Functions[nameOf(f.Funcname)]
	if nameOf(f.Funcname).Name == "unnest" && len(f.Args) > 1 {
		for range f.Args {
			cols = append(cols, col{name: "unnest"})
		}
		return cols, false
	}
	for i, c := range candidates {
		if c.Composite || !slices.Equal(c.Out, candidates[0].Out) {
			return nil, true
		}
		if i == 0 {
			for _, out := range c.Out {
				cols = append(cols, col{name: out, sure: out != ""})
			}
		}
	}
	if len(candidates) == 0 {
		return nil, true
	}
	if len(cols) == 0 || len(cols) == 1 && cols[0].name == "" {
		return []col{{name: single(name, alias)}}, false
	}
	return cols, false
}

// single is the name of the one column of a function in FROM.
func single(name string, alias *pgquery.Alias) string {
	if alias != nil {
		return alias.Aliasname
	}
	return name
}

// join adds both sides and what is visible of them.
func (a *analyzer) join(s *scope, j *pgquery.JoinExpr) {
	start := len(s.items)
	a.from(s, j.Larg)
	middle := len(s.items)
	a.from(s, j.Rarg)
	left, right := s.items[start:middle], s.items[middle:]
	// ON sees the two sides and what is around the query.
	inside := &scope{parent: s.parent, env: s.env, view: s.view, items: s.items[start:], windows: s.windows}
	if j.Quals != nil {
		a.condition(inside, j.Quals, "JOIN")
	}
	leftCols, leftOpen, rest := visible(left)
	rightCols, rightOpen, more := visible(right)
	merged := &item{unq: true, open: leftOpen || rightOpen, rest: mix(rest, more)}
	var using []string
	for _, u := range j.UsingClause {
		using = append(using, u.GetString_().GetSval())
	}
	if j.IsNatural {
		if leftOpen || rightOpen {
			a.refuse(locationOf(j.Larg), "NATURAL JOIN with a function whose columns are not known: the data source masks columns, and what can't be followed is refused")
		}
		for _, c := range leftCols {
			if slices.ContainsFunc(rightCols, func(o col) bool { return o.name == c.name }) {
				using = append(using, c.name)
			}
		}
	}
	for _, name := range using {
		l, lok := pick(leftCols, leftOpen, rest, name)
		r, rok := pick(rightCols, rightOpen, more, name)
		if !lok || !rok {
			a.refuse(locationOf(j.Larg), "the column %q of USING is not found: the data source masks columns, and what can't be followed is refused", name)
		}
		for _, t := range []taint{l.taint, r.taint} {
			a.equal(s, t, locationOf(j.Larg), "JOIN")
		}
		if a.strict(s) && (l.taint.on && !a.comparable(r) || r.taint.on && !a.comparable(l)) {
			a.refuse(locationOf(j.Larg), "JOIN compares the masked column %s with values that the statement makes: only columns of tables may be joined with it", either(l.taint, r.taint).source)
		}
		merged.cols = append(merged.cols, col{name: name, sure: true, taint: either(l.taint, r.taint)})
	}
	shared := slices.Clone(merged.cols)
	for _, cols := range [][]col{leftCols, rightCols} {
		for _, c := range cols {
			if !slices.Contains(using, c.name) {
				merged.cols = append(merged.cols, c)
			}
		}
	}
	for _, it := range s.items[start:] {
		it.unq = false
		if j.Alias != nil {
			it.rel = false
		}
	}
	if j.Alias != nil {
		merged.name, merged.rel = j.Alias.Aliasname, true
		rename(merged.cols, j.Alias.Colnames)
	}
	s.items = append(s.items, merged)
	if j.JoinUsingAlias != nil {
		s.items = append(s.items, &item{name: j.JoinUsingAlias.Aliasname, cols: shared, rel: true})
	}
}

// visible are the columns that * would give.
func visible(items []*item) (cols []col, open bool, rest taint) {
	for _, it := range items {
		if it.unq {
			cols = append(cols, it.cols...)
			open, rest = open || it.open, mix(rest, it.rest)
		}
	}
	return cols, open, rest
}

func pick(cols []col, open bool, rest taint, name string) (col, bool) {
	for _, c := range cols {
		if c.name == name {
			return c, true
		}
	}
	return col{name: name, taint: rest}, open
}
