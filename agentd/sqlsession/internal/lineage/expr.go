package lineage

import (
	pgquery "github.com/pganalyze/pg_query_go/v6"
)

// risk is a part of an expression that may fail, take long or make rows
// depending on the values that it is given. In an expression over a masked
// column that would tell of it, although the result is masked.
type risk struct {
	location int32
	what     string
}

func first(a, b *risk) *risk {
	if a != nil {
		return a
	}
	return b
}

// value is an expression whose result is kept: a column of a result, a row of
// VALUES.
func (a *analyzer) value(s *scope, n *pgquery.Node) (taint, origin) {
	if ref := n.GetColumnRef(); ref != nil {
		return a.columnRef(s, ref)
	}
	if n == nil {
		return taint{}, origin{}
	}
	if link := n.GetSubLink(); link != nil && link.Testexpr == nil {
		// Its own parts are looked at by themselves.
		t, _ := a.expr(s, n)
		return t, origin{}
	}
	t, r := a.expr(s, n)
	if t.on && !t.plain && r != nil && a.strict(s) {
		a.refuse(r.location, "%s in an expression over the masked column %s: whether it fails would tell of the value; select the column itself", r.what, t.source)
	}
	return t, origin{}
}

// expr is the taint of an expression, and the first risk in it.
func (a *analyzer) expr(s *scope, n *pgquery.Node) (t taint, r *risk) {
	if n == nil || n.Node == nil {
		return taint{}, nil
	}
	defer a.enter()()
	switch v := n.Node.(type) {
	case *pgquery.Node_ColumnRef:
		t, _ := a.columnRef(s, v.ColumnRef)
		return t, nil
	case *pgquery.Node_AConst, *pgquery.Node_ParamRef, *pgquery.Node_SetToDefault, *pgquery.Node_SqlvalueFunction, *pgquery.Node_MergeSupportFunc,
		*pgquery.Node_String_, *pgquery.Node_Integer, *pgquery.Node_Float, *pgquery.Node_Boolean, *pgquery.Node_BitString, *pgquery.Node_CurrentOfExpr:
		return taint{}, nil
	case *pgquery.Node_FuncCall:
		return a.call(s, v.FuncCall)
	case *pgquery.Node_AExpr:
		return a.operator(s, v.AExpr)
	case *pgquery.Node_SubLink:
		return a.subLink(s, v.SubLink)
	case *pgquery.Node_TypeCast:
		t, r = a.expr(s, v.TypeCast.Arg)
		switch {
		case castToText(v.TypeCast.TypeName):
			if len(v.TypeCast.TypeName.Typmods) > 0 {
				t = t.derived()
			}
		case constant(v.TypeCast.Arg):
		default:
			t, r = t.derived(), first(r, &risk{locationOf(n), "a cast"})
		}
		return t, r
	case *pgquery.Node_CollateClause:
		return a.expr(s, v.CollateClause.Arg)
	case *pgquery.Node_AIndirection:
		return a.indirection(s, v.AIndirection)
	case *pgquery.Node_NamedArgExpr:
		return a.expr(s, v.NamedArgExpr.Arg)
	case *pgquery.Node_JsonObjectAgg:
		return a.jsonAggregate(s, n, v.JsonObjectAgg.Constructor)
	case *pgquery.Node_JsonArrayAgg:
		return a.jsonAggregate(s, n, v.JsonArrayAgg.Constructor)
	case *pgquery.Node_JsonArrayQueryConstructor:
		for _, c := range a.query(v.JsonArrayQueryConstructor.Query, s) {
			t = mix(t, c.taint)
		}
		return t, nil
	case *pgquery.Node_XmlExpr:
		switch v.XmlExpr.Op {
		case pgquery.XmlExprOp_IS_XMLFOREST, pgquery.XmlExprOp_IS_XMLELEMENT, pgquery.XmlExprOp_IS_XMLCONCAT:
		default:
			r = &risk{v.XmlExpr.Location, "XML made of text"}
		}
	case *pgquery.Node_JsonFuncExpr, *pgquery.Node_JsonParseExpr, *pgquery.Node_XmlSerialize, *pgquery.Node_JsonSerializeExpr:
		r = &risk{locationOf(n), "a function of JSON or XML"}
	case *pgquery.Node_BoolExpr, *pgquery.Node_NullTest, *pgquery.Node_BooleanTest, *pgquery.Node_CoalesceExpr, *pgquery.Node_MinMaxExpr,
		*pgquery.Node_CaseExpr, *pgquery.Node_CaseWhen, *pgquery.Node_AArrayExpr, *pgquery.Node_RowExpr, *pgquery.Node_List, *pgquery.Node_ResTarget,
		*pgquery.Node_GroupingFunc, *pgquery.Node_AIndices, *pgquery.Node_JsonObjectConstructor, *pgquery.Node_JsonArrayConstructor,
		*pgquery.Node_JsonValueExpr, *pgquery.Node_JsonKeyValue, *pgquery.Node_JsonIsPredicate, *pgquery.Node_JsonScalarExpr,
		*pgquery.Node_JsonArgument, *pgquery.Node_TypeName, *pgquery.Node_JsonOutput, *pgquery.Node_JsonFormat, *pgquery.Node_JsonReturning,
		*pgquery.Node_JsonBehavior, *pgquery.Node_SortBy:
	default:
		a.refuse(locationOf(n), "this expression is not understood: the data source masks columns, and what can't be followed is refused")
	}
	children(inner(n), func(child *pgquery.Node) {
		one, bad := a.expr(s, child)
		t, r = mix(t, one), first(r, bad)
	})
	return t, r
}

func (a *analyzer) jsonAggregate(s *scope, n *pgquery.Node, c *pgquery.JsonAggConstructor) (t taint, r *risk) {
	m := inner(n)
	if field := m.Descriptor().Fields().ByName("arg"); field != nil && m.Has(field) {
		children(m.Get(field).Message(), func(child *pgquery.Node) {
			one, bad := a.expr(s, child)
			t, r = mix(t, one), first(r, bad)
		})
		if node, ok := m.Get(field).Message().Interface().(*pgquery.Node); ok {
			one, bad := a.expr(s, node)
			t, r = mix(t, one), first(r, bad)
		}
	}
	if c == nil {
		return t, r
	}
	return a.aggregate(s, t, r, c.AggOrder, c.AggFilter, c.Over)
}

// aggregate adds what belongs to an aggregate or window call.
func (a *analyzer) aggregate(s *scope, t taint, r *risk, by []*pgquery.Node, filter *pgquery.Node, over *pgquery.WindowDef) (taint, *risk) {
	for _, n := range by {
		one, bad := a.expr(s, n.GetSortBy().GetNode())
		a.order(s, one, locationOf(n), "ORDER BY of an aggregate")
		t, r = mix(t, one), first(r, bad)
	}
	if filter != nil {
		a.condition(s, filter, "FILTER")
		if !a.strict(s) {
			one, _ := a.expr(s, filter)
			t = mix(t, one)
		}
	}
	if over != nil {
		t = mix(t, a.window(s, over))
	}
	return t, r
}

func (a *analyzer) indirection(s *scope, v *pgquery.A_Indirection) (taint, *risk) {
	// (t).column
	if it := a.rowItem(s, v.Arg); it != nil && !it.open && len(v.Indirection) == 1 {
		if name := v.Indirection[0].GetString_(); name != nil {
			if t, _, ok := it.column(name.Sval); ok {
				return t, nil
			}
			if isSystemColumn(name.Sval) {
				return taint{}, nil
			}
			a.refuse(locationOf(v.Arg), "%q is not understood as a column: the data source masks columns, and what can't be followed is refused", name.Sval)
		}
	}
	t, r := a.expr(s, v.Arg)
	for _, n := range v.Indirection {
		if n.GetAIndices() == nil {
			continue
		}
		one, bad := a.expr(s, n)
		t, r = mix(t, one), first(r, bad)
	}
	return t.derived(), r
}

// subLink is a subquery in an expression.
func (a *analyzer) subLink(s *scope, v *pgquery.SubLink) (t taint, r *risk) {
	cols := a.query(v.Subselect, s)
	switch v.SubLinkType {
	case pgquery.SubLinkType_EXISTS_SUBLINK:
		// Its columns are not looked at.
		return taint{}, &risk{v.Location, "a subquery"}
	case pgquery.SubLinkType_EXPR_SUBLINK:
		if len(cols) == 1 {
			return cols[0].taint, &risk{v.Location, "a subquery"}
		}
	}
	for _, c := range cols {
		t = mix(t, c.taint)
	}
	if v.Testexpr != nil {
		one, bad := a.expr(s, v.Testexpr)
		t, r = mix(t, one), bad
		a.operatorKnown(nameOf(v.OperName), v.Location)
	}
	return t.derived(), first(r, &risk{v.Location, "a subquery"})
}

// constant tells whether an expression is the same for all rows and known
// before any is read.
func constant(n *pgquery.Node) bool {
	switch v := n.GetNode().(type) {
	case nil, *pgquery.Node_AConst, *pgquery.Node_ParamRef:
		return true
	case *pgquery.Node_TypeCast:
		return constant(v.TypeCast.Arg)
	case *pgquery.Node_NamedArgExpr:
		return constant(v.NamedArgExpr.Arg)
	case *pgquery.Node_AExpr:
		return v.AExpr.Kind == pgquery.A_Expr_Kind_AEXPR_OP && constant(v.AExpr.Lexpr) && constant(v.AExpr.Rexpr)
	case *pgquery.Node_AArrayExpr:
		return allConstant(v.AArrayExpr.Elements)
	}
	return false
}

func allConstant(list []*pgquery.Node) bool {
	for _, n := range list {
		if !constant(n) {
			return false
		}
	}
	return true
}

func castToText(t *pgquery.TypeName) bool {
	if t == nil || len(t.ArrayBounds) > 0 || t.Setof || t.PctType {
		return false
	}
	switch nameOf(t.Names) {
	case Name{"", "text"}, Name{"pg_catalog", "text"}, Name{"", "varchar"}, Name{"pg_catalog", "varchar"}, Name{"", "name"}, Name{"pg_catalog", "name"}:
		return true
	}
	return false
}

// condition is WHERE, ON, HAVING or FILTER.
func (a *analyzer) condition(s *scope, n *pgquery.Node, where string) {
	if n == nil {
		return
	}
	defer a.enter()()
	if b := n.GetBoolExpr(); b != nil {
		for _, arg := range b.Args {
			a.condition(s, arg, where)
		}
		return
	}
	t, _ := a.expr(s, n)
	if !t.on || !a.strict(s) {
		return
	}
	if a.policy.Filters == FiltersRefuse {
		a.refuse(locationOf(n), "%s uses the masked column %s, which the data source's mask_filters does not allow", where, t.source)
	}
	// With values that the statement makes itself (generate_series, VALUES, a
	// subquery without a table) a comparison would find out any value, or be a
	// range: only constants and columns of tables are compared with.
	var sides []*pgquery.Node
	good := false
	switch v := n.Node.(type) {
	case *pgquery.Node_ColumnRef:
		sides, good = []*pgquery.Node{n}, true
	case *pgquery.Node_NullTest:
		sides, good = []*pgquery.Node{v.NullTest.Arg}, true
	case *pgquery.Node_BooleanTest:
		sides, good = []*pgquery.Node{v.BooleanTest.Arg}, true
	case *pgquery.Node_AExpr:
		e := v.AExpr
		equality := isEquality(e.Name)
		switch e.Kind {
		case pgquery.A_Expr_Kind_AEXPR_OP:
			sides, good = []*pgquery.Node{e.Lexpr, e.Rexpr}, equality && e.Lexpr != nil && e.Rexpr != nil
		case pgquery.A_Expr_Kind_AEXPR_DISTINCT, pgquery.A_Expr_Kind_AEXPR_NOT_DISTINCT:
			sides, good = []*pgquery.Node{e.Lexpr, e.Rexpr}, true
		case pgquery.A_Expr_Kind_AEXPR_IN:
			sides, good = append([]*pgquery.Node{e.Lexpr}, e.Rexpr.GetList().GetItems()...), equality
		case pgquery.A_Expr_Kind_AEXPR_OP_ANY, pgquery.A_Expr_Kind_AEXPR_OP_ALL:
			sides, good = []*pgquery.Node{e.Lexpr}, equality && a.fixed(e.Rexpr)
		}
	case *pgquery.Node_SubLink:
		link := v.SubLink
		switch link.SubLinkType {
		case pgquery.SubLinkType_ANY_SUBLINK, pgquery.SubLinkType_ALL_SUBLINK:
			good = len(link.OperName) == 0 || isEquality(link.OperName)
			sides = []*pgquery.Node{link.Testexpr}
			for _, c := range a.query(link.Subselect, s) {
				good = good && (c.taint.on && c.taint.plain && !c.taint.mixed || !c.taint.on && a.comparable(c))
			}
		case pgquery.SubLinkType_EXPR_SUBLINK: // a boolean
			good = t.plain && !t.mixed
		}
	}
	for _, side := range sides {
		good = good && a.bare(s, side)
	}
	if !good {
		a.refuse(locationOf(n), "%s uses the masked column %s in another way than =, IN or IS NULL of the column itself, which the data source's mask_filters does not allow", where, t.source)
	}
}

// bare tells whether one side of a comparison is a column of a table, masked or
// not, a value that is the same for all rows, or a row of such.
func (a *analyzer) bare(s *scope, n *pgquery.Node) bool {
	if row := n.GetRowExpr(); row != nil {
		for _, arg := range row.Args {
			if !a.bare(s, arg) {
				return false
			}
		}
		return true
	}
	if n.GetTypeCast() != nil && castToText(n.GetTypeCast().TypeName) {
		return a.bare(s, n.GetTypeCast().Arg)
	}
	if ref := n.GetColumnRef(); ref != nil {
		t, from := a.columnRef(s, ref)
		return t.on && t.plain && !t.mixed || !t.on && a.comparable(col{from: from})
	}
	return a.fixed(n)
}

// comparable tells whether a clean column is one of a table, and so may be
// compared with a masked one.
func (a *analyzer) comparable(c col) bool {
	return c.taint.on || c.from.relation != 0 && !a.made[c.from.relation]
}

// fixed tells whether an expression names no column and asks no table: it has one
// value.
func (a *analyzer) fixed(n *pgquery.Node) bool {
	switch v := n.GetNode().(type) {
	case *pgquery.Node_ColumnRef, *pgquery.Node_SubLink:
		return false
	case *pgquery.Node_FuncCall:
		for _, c := range a.found.Functions[nameOf(v.FuncCall.Funcname)] {
			if c.Set {
				return false
			}
		}
	case nil:
		return true
	}
	fixed := true
	children(inner(n), func(child *pgquery.Node) { fixed = fixed && a.fixed(child) })
	return fixed
}

func isEquality(name []*pgquery.Node) bool {
	n := nameOf(name)
	return (n.Schema == "" || n.Schema == "pg_catalog") && (n.Name == "=" || n.Name == "<>" || n.Name == "!=")
}

// operatorKnown refuses operators that are not PostgreSQL's own and whose
// function is not known to look at its arguments only.
func (a *analyzer) operatorKnown(name Name, location int32) (ok bool) {
	for _, o := range a.found.Operators {
		if o.Name == name.Name && o.Function.Extension == "" && o.Function.OID >= firstUser && !a.harmless(o.Function) {
			if a.at < 0 {
				a.refuse(location, "the operator %s calls the function %s.%s, which may read masked columns: the data source's policy does not list it under functions", name.Name, o.Function.Schema, o.Function.Name)
			}
			return false
		}
	}
	return true
}

// unknown is the taint of what may have read anything.
func unknown(what string) taint { return taint{on: true, rule: -1, source: what} }

func (a *analyzer) operator(s *scope, e *pgquery.A_Expr) (t taint, r *risk) {
	left, lr := a.expr(s, e.Lexpr)
	right, rr := a.expr(s, e.Rexpr)
	t, r = mix(left, right), first(lr, rr)
	name := nameOf(e.Name)
	if !a.operatorKnown(name, e.Location) {
		t = mix(t, unknown("read by the operator "+name.Name))
	}
	if r == nil && !a.total(s, e, name.Name, left, right) {
		r = &risk{e.Location, "the operator " + name.Name}
	}
	return t, r
}

// call is a function call.
func (a *analyzer) call(s *scope, f *pgquery.FuncCall) (t taint, r *risk) {
	name := nameOf(f.Funcname)
	safe, bare := true, true
	for _, arg := range f.Args {
		one, bad := a.expr(s, arg)
		bare = bare && (!one.on || one.plain)
		t, r = mix(t, one), first(r, bad)
	}
	candidates := a.found.Functions[name]
	if len(candidates) == 0 {
		// A column of a row, written as a function of it.
		if len(f.Args) != 1 {
			a.refuse(f.Location, "the function %s is not found in the catalog: the data source masks columns, and what can't be followed is refused", name)
		}
		if it := a.rowItem(s, f.Args[0]); it != nil {
			if one, _, ok := it.column(name.Name); ok {
				return one, nil
			}
		}
		return t, &risk{f.Location, "a function"}
	}
	builtin := true
	var set bool
	for _, c := range candidates {
		if !a.harmless(c) {
			if a.at < 0 {
				a.refuse(f.Location, "the function %s.%s may read masked columns by itself: the data source's policy does not list it under functions", c.Schema, c.Name)
			}
			t = mix(t, unknown("read by the function "+c.Schema+"."+c.Name))
		}
		if t.on && c.Volatile && a.at < 0 && !matches(a.policy.Functions, c) && !matches(a.policy.Safe, c) {
			a.refuse(f.Location, "the function %s is given the masked column %s and could pass it on", name.Name, t.source)
		}
		builtin = builtin && c.OID < firstUser
		safe = safe && (matches(a.policy.Safe, c) || c.OID < firstUser && c.Name == "count")
		set = set || c.Set
	}
	if safe && bare {
		t = taint{}
	}
	if r == nil && !(safe && len(candidates) > 0) {
		switch {
		case set:
			r = &risk{f.Location, "a function that makes rows"}
		case !builtin || !a.totalCall(s, f, name.Name):
			r = &risk{f.Location, "the function " + name.Name}
		}
	}
	return a.aggregate(s, t, r, f.AggOrder, f.AggFilter, f.Over)
}
