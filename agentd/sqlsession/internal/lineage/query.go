package lineage

import (
	"slices"

	pgquery "github.com/pganalyze/pg_query_go/v6"
)

// strict tells whether the use of masked columns is limited here.
func (a *analyzer) strict(s *scope) bool { return !s.view && a.policy.Filters != FiltersAllow }

// query gives the columns of a query's result; s is what is around it.
func (a *analyzer) query(n *pgquery.Node, s *scope) []col {
	switch v := n.GetNode().(type) {
	case *pgquery.Node_SelectStmt:
		return a.selectStmt(v.SelectStmt, s)
	case *pgquery.Node_InsertStmt:
		return a.insert(v.InsertStmt, s)
	case *pgquery.Node_UpdateStmt:
		return a.update(v.UpdateStmt, s)
	case *pgquery.Node_DeleteStmt:
		return a.delete(v.DeleteStmt, s)
	case *pgquery.Node_MergeStmt:
		return a.merge(v.MergeStmt, s)
	}
	a.refuse(locationOf(n), "this kind of query is not understood: the data source masks columns, and what can't be followed is refused")
	return nil
}

// cte is one query of a WITH.
type cte struct {
	node  *pgquery.CommonTableExpr
	scope *scope // what is around it
	cols  []col
	// state: analyzed, or under way, when cols are what is known so far.
	done, busy bool
	known      bool
}

// with brings the CTEs into sight; they are looked at when the query is, even
// if nothing reads them.
func (a *analyzer) with(w *pgquery.WithClause, s *scope) *env {
	if w == nil {
		return s.env
	}
	e := &env{parent: s.env, names: map[string]*cte{}}
	var all []*cte
	for _, n := range w.Ctes {
		c := &cte{node: n.GetCommonTableExpr()}
		around := *s
		around.env = e
		if !w.Recursive {
			// Each one sees those before it.
			before := &env{parent: e.parent, names: map[string]*cte{}}
			for _, earlier := range all {
				before.names[earlier.node.Ctename] = earlier
			}
			around.env = before
		}
		c.scope = &around
		all = append(all, c)
	}
	for _, c := range all {
		e.names[c.node.Ctename] = c
	}
	for _, c := range all {
		a.cteColumns(c, c.node.Location)
	}
	return e
}

// cteColumns are the columns of a CTE; of one that reads itself, what they are
// when nothing changes any more.
func (a *analyzer) cteColumns(c *cte, location int32) []col {
	defer a.enter()()
	if c.done {
		return c.cols
	}
	if c.busy {
		if !c.known {
			a.refuse(location, "the recursion of %q is not understood: the data source masks columns, and what can't be followed is refused", c.node.Ctename)
		}
		return c.cols
	}
	c.busy = true
	st := c.node.Ctequery.GetSelectStmt()
	if st != nil && st.Op == pgquery.SetOperation_SETOP_UNION && c.scope.env.find(c.node.Ctename) == c {
		inside := *c.scope
		if st.WithClause != nil {
			inside.env = a.with(st.WithClause, c.scope)
		}
		c.cols = a.cteNames(c, a.selectStmt(st.Larg, &inside))
		c.known = true
	}
	for round := 0; ; round++ {
		before := slices.Clone(c.cols)
		c.cols = a.cteNames(c, a.query(c.node.Ctequery, c.scope))
		if !c.known || slices.EqualFunc(before, c.cols, func(x, y col) bool { return x.taint == y.taint }) {
			break
		}
		if round == 20 {
			for i := range c.cols {
				c.cols[i].taint = c.cols[i].taint.derived()
			}
			break
		}
	}
	c.done, c.busy = true, false
	return c.cols
}

// cteNames gives the columns their names, and adds those of SEARCH and CYCLE.
func (a *analyzer) cteNames(c *cte, cols []col) []col {
	cols = slices.Clone(cols)
	rename(cols, c.node.Aliascolnames)
	of := func(names []*pgquery.Node) taint {
		var t taint
		for _, n := range names {
			if one, ok := pick(cols, false, taint{}, n.GetString_().GetSval()); ok {
				t = mix(t, one.taint)
			}
		}
		return t
	}
	if search := c.node.SearchClause; search != nil {
		t := of(search.SearchColList)
		a.order(c.scope, t, search.Location, "SEARCH")
		cols = append(cols, col{name: search.SearchSeqColumn, sure: true, taint: t})
	}
	if cycle := c.node.CycleClause; cycle != nil {
		t := of(cycle.CycleColList)
		a.order(c.scope, t, cycle.Location, "CYCLE")
		cols = append(cols, col{name: cycle.CycleMarkColumn, sure: true, taint: t}, col{name: cycle.CyclePathColumn, sure: true, taint: t})
	}
	return cols
}

// selectStmt gives the columns of a SELECT, VALUES or set operation.
func (a *analyzer) selectStmt(st *pgquery.SelectStmt, around *scope) []col {
	defer a.enter()()
	e := a.with(st.WithClause, around)
	s := &scope{parent: around.parent, env: e, view: around.view, windows: map[string]taint{}}
	if around.items != nil {
		s.parent = around
	}
	if st.Op != pgquery.SetOperation_SETOP_NONE && st.Larg != nil {
		return a.setOperation(st, s)
	}
	if len(st.ValuesLists) > 0 {
		return a.values(st, s)
	}
	for _, n := range st.FromClause {
		a.from(s, n)
	}
	if st.WhereClause != nil {
		a.condition(s, st.WhereClause, "WHERE")
	}
	for _, n := range st.WindowClause {
		w := n.GetWindowDef()
		s.windows[w.GetName()] = a.window(s, w)
	}
	cols := a.targets(s, st.TargetList)
	for _, n := range st.GroupClause {
		a.grouping(s, n, cols)
	}
	if st.HavingClause != nil {
		a.condition(s, st.HavingClause, "HAVING")
	}
	// DISTINCT alone is a list with one empty node.
	for _, n := range st.DistinctClause {
		if inner(n) == nil {
			for _, c := range cols {
				a.order(s, c.taint, firstLocation(st), "DISTINCT")
			}
			continue
		}
		a.sort(s, n, cols, "DISTINCT")
	}
	for _, n := range st.SortClause {
		a.sort(s, n, cols, "ORDER BY")
	}
	a.limits(s, st)
	return cols
}

func firstLocation(st *pgquery.SelectStmt) int32 {
	for _, n := range st.TargetList {
		if at := locationOf(n); at > 0 {
			return at
		}
	}
	return 0
}

func (a *analyzer) limits(s *scope, st *pgquery.SelectStmt) {
	for _, n := range []*pgquery.Node{st.LimitCount, st.LimitOffset} {
		a.control(s, n, "LIMIT")
	}
}

// control is for values that steer a statement: they can't be masked columns.
func (a *analyzer) control(s *scope, n *pgquery.Node, where string) {
	if n == nil {
		return
	}
	if t, _ := a.expr(s, n); t.on && a.strict(s) {
		a.refuse(locationOf(n), "%s uses the masked column %s", where, t.source)
	}
}

func (a *analyzer) setOperation(st *pgquery.SelectStmt, s *scope) []col {
	around := &scope{parent: s.parent, env: s.env, view: s.view}
	left, right := a.selectStmt(st.Larg, around), a.selectStmt(st.Rarg, around)
	if len(left) != len(right) {
		a.refuse(firstLocation(st.Larg), "the two sides of the set operation are not understood: the data source masks columns, and what can't be followed is refused")
	}
	cols := slices.Clone(left)
	for i := range cols {
		cols[i].taint, cols[i].from = either(left[i].taint, right[i].taint), origin{}
		if !st.All || st.Op != pgquery.SetOperation_SETOP_UNION {
			// Rows are compared, and come out in order.
			a.order(s, cols[i].taint, firstLocation(st.Larg), "a set operation other than UNION ALL")
		}
	}
	s.items = []*item{{cols: cols, unq: true}}
	for _, n := range st.SortClause {
		a.sort(s, n, cols, "ORDER BY")
	}
	a.limits(s, st)
	return cols
}

func (a *analyzer) values(st *pgquery.SelectStmt, s *scope) []col {
	var cols []col
	for i, row := range st.ValuesLists {
		for j, n := range row.GetList().GetItems() {
			t, from := a.value(s, n)
			if i == 0 {
				cols = append(cols, col{name: "column" + itoa(j+1), sure: true, taint: t, from: from})
			} else if j < len(cols) {
				cols[j].taint, cols[j].from = either(cols[j].taint, t), origin{}
			} else {
				a.refuse(locationOf(n), "rows of VALUES differ in length")
			}
		}
	}
	s.items = []*item{{cols: cols, unq: true}}
	for _, n := range st.SortClause {
		a.sort(s, n, cols, "ORDER BY")
	}
	a.limits(s, st)
	return cols
}

func itoa(n int) string {
	if n >= 10 {
		return itoa(n/10) + string(rune('0'+n%10))
	}
	return string(rune('0' + n))
}

// targets are the columns of a list of results.
func (a *analyzer) targets(s *scope, list []*pgquery.Node) []col {
	var cols []col
	for _, n := range list {
		target := n.GetResTarget()
		if target == nil {
			a.refuse(locationOf(n), "this column is not understood: the data source masks columns, and what can't be followed is refused")
		}
		if ref := target.Val.GetColumnRef(); ref != nil {
			if parts, star := fields(ref); star {
				cols = append(cols, a.expand(a.starItems(s, ref, parts), ref.Location)...)
				continue
			}
		}
		if ind := target.Val.GetAIndirection(); ind != nil && len(ind.Indirection) > 0 && ind.Indirection[len(ind.Indirection)-1].GetAStar() != nil {
			it := a.rowItem(s, ind.Arg)
			if it == nil || len(ind.Indirection) > 1 {
				a.refuse(target.Location, "the columns of this row are not known: write them one by one, as the data source masks columns")
			}
			cols = append(cols, a.expand([]*item{it}, target.Location)...)
			continue
		}
		t, from := a.value(s, target.Val)
		c := col{name: target.Name, sure: true, taint: t, from: from}
		if c.name == "" {
			var sure int
			c.name, sure = figureName(target.Val)
			c.sure = sure > 1 && target.Val.GetColumnRef() != nil
		}
		cols = append(cols, c)
	}
	return cols
}

// expand is what * stands for.
func (a *analyzer) expand(items []*item, location int32) []col {
	var cols []col
	for _, it := range items {
		if it.open {
			a.refuse(location, "the columns of %q are not known: write them one by one, as the data source masks columns", it.name)
		}
		cols = append(cols, it.cols...)
	}
	return cols
}

// rowItem is the entry of FROM that an expression is the row of, or nil.
func (a *analyzer) rowItem(s *scope, n *pgquery.Node) *item {
	ref := n.GetColumnRef()
	if ref == nil {
		return nil
	}
	parts, star := fields(ref)
	if star || len(parts) == 0 || len(parts) > 2 {
		return nil
	}
	schema, name := "", parts[len(parts)-1]
	if len(parts) == 2 {
		if it := s.relation("", parts[0]); it != nil {
			return nil // a column of it
		}
		schema = parts[0]
	} else if _, _, ok := s.unqualified(name); ok {
		return nil
	}
	return s.relation(schema, name)
}

// output is the column of the result that an item of ORDER BY, GROUP BY or
// DISTINCT ON names by number or name.
func output(n *pgquery.Node, cols []col) (col, bool) {
	if c := n.GetAConst(); c != nil {
		if i := c.GetIval(); i != nil && int(i.Ival) >= 1 && int(i.Ival) <= len(cols) {
			return cols[i.Ival-1], true
		}
		return col{}, true // a constant
	}
	if ref := n.GetColumnRef(); ref != nil {
		if parts, star := fields(ref); !star && len(parts) == 1 {
			for _, c := range cols {
				if c.name == parts[0] {
					return c, true
				}
			}
		}
	}
	return col{}, false
}

// sort is an item of ORDER BY or DISTINCT ON.
func (a *analyzer) sort(s *scope, n *pgquery.Node, cols []col, where string) {
	if by := n.GetSortBy(); by != nil {
		a.operatorKnown(nameOf(by.UseOp), locationOf(n))
		n = by.Node
	}
	if c, ok := output(n, cols); ok {
		a.order(s, c.taint, locationOf(n), where)
		return
	}
	t, _ := a.expr(s, n)
	a.order(s, t, locationOf(n), where)
}

// order is for a use that tells of the order of values.
func (a *analyzer) order(s *scope, t taint, location int32, where string) {
	if t.on && a.strict(s) {
		a.refuse(location, "%s tells of the order of the masked column %s, which the data source's mask_filters does not allow", where, t.source)
	}
}

// equal is for a use that tells which values are equal.
func (a *analyzer) equal(s *scope, t taint, location int32, where string) {
	if !t.on || !a.strict(s) {
		return
	}
	switch {
	case a.policy.Filters == FiltersRefuse:
		a.refuse(location, "%s uses the masked column %s, which the data source's mask_filters does not allow", where, t.source)
	case !t.plain || t.mixed:
		a.refuse(location, "%s uses something made of the masked column %s: the data source's mask_filters allows the column itself only", where, t.source)
	}
}

// grouping is an item of GROUP BY.
func (a *analyzer) grouping(s *scope, n *pgquery.Node, cols []col) {
	if set := n.GetGroupingSet(); set != nil {
		for _, item := range set.Content {
			a.grouping(s, item, cols)
		}
		return
	}
	if row := n.GetRowExpr(); row != nil {
		for _, item := range row.Args {
			a.grouping(s, item, cols)
		}
		return
	}
	if list := n.GetList(); list != nil {
		for _, item := range list.Items {
			a.grouping(s, item, cols)
		}
		return
	}
	if ref := n.GetColumnRef(); ref != nil {
		// A column of FROM comes before one of the result.
		if parts, star := fields(ref); !star && len(parts) == 1 {
			if t, _, ok := s.unqualified(parts[0]); ok {
				a.equal(s, t, ref.Location, "GROUP BY")
				return
			}
		}
	}
	if c, ok := output(n, cols); ok {
		a.equal(s, c.taint, locationOf(n), "GROUP BY")
		return
	}
	t, _ := a.expr(s, n)
	a.equal(s, t, locationOf(n), "GROUP BY")
}

// window looks at a window's definition and returns the taint of its order.
func (a *analyzer) window(s *scope, w *pgquery.WindowDef) taint {
	if w == nil {
		return taint{}
	}
	t := mix(s.windows[w.Refname], taint{})
	if w.Name != "" {
		t = mix(t, s.windows[w.Name])
	}
	for _, n := range w.PartitionClause {
		one, _ := a.expr(s, n)
		a.equal(s, one, locationOf(n), "PARTITION BY")
		if !one.plain {
			t = mix(t, one)
		}
	}
	for _, n := range w.OrderClause {
		one, _ := a.expr(s, n.GetSortBy().GetNode())
		a.order(s, one, locationOf(n), "ORDER BY of a window")
		t = mix(t, one)
	}
	for _, n := range []*pgquery.Node{w.StartOffset, w.EndOffset} {
		a.control(s, n, "the frame of a window")
	}
	return t
}
