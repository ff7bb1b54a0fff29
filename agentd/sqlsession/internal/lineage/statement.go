package lineage

import (
	pgquery "github.com/pganalyze/pg_query_go/v6"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// statement looks at a whole statement and makes the plan.
func (a *analyzer) statement(n *pgquery.Node) {
	switch v := n.GetNode().(type) {
	case *pgquery.Node_SelectStmt, *pgquery.Node_InsertStmt, *pgquery.Node_UpdateStmt, *pgquery.Node_DeleteStmt, *pgquery.Node_MergeStmt:
		cols := a.query(n, &scope{})
		if into(n.ProtoReflect()) {
			a.keep(cols, "SELECT INTO")
			cols = nil
		}
		_, reads := n.Node.(*pgquery.Node_SelectStmt)
		a.plan.Touches = !reads
		a.plan.Known = true
		for _, c := range cols {
			t := c.taint
			a.plan.Columns = append(a.plan.Columns, Output{
				Name: c.name, Named: c.sure, Masked: t.on, Plain: t.on && t.plain, Null: t.null, Rule: t.rule, Source: t.source,
				Relation: c.from.relation, Number: c.from.number,
			})
		}
	case *pgquery.Node_CreateTableAsStmt:
		a.keep(a.query(v.CreateTableAsStmt.Query, &scope{}), "CREATE TABLE AS")
		a.plan.Touches = true
	case *pgquery.Node_ExplainStmt:
		a.query(v.ExplainStmt.Query, &scope{})
		a.plan.Touches = true
	case *pgquery.Node_ExecuteStmt:
		// Its values; the query that they are for is a statement of its own.
		for _, p := range v.ExecuteStmt.Params {
			if t, _ := a.expr(&scope{}, p); t.on {
				a.refuse(locationOf(p), "a value for the prepared statement is made of the masked column %s", t.source)
			}
		}
		a.plan.Touches = true
	case *pgquery.Node_CreateStmt:
		if len(v.CreateStmt.InhRelations) > 0 || v.CreateStmt.Partbound != nil || v.CreateStmt.OfTypename != nil {
			a.other(n, "CREATE TABLE with INHERITS, PARTITION OF or OF")
		}
		a.plan.Touches = true
	case *pgquery.Node_IndexStmt, *pgquery.Node_DropStmt, *pgquery.Node_TruncateStmt, *pgquery.Node_CommentStmt, *pgquery.Node_CreateSeqStmt,
		*pgquery.Node_AlterSeqStmt, *pgquery.Node_CreateSchemaStmt, *pgquery.Node_VacuumStmt:
		if s, ok := v.(*pgquery.Node_CreateSchemaStmt); ok && len(s.CreateSchemaStmt.SchemaElts) > 0 {
			a.other(n, "CREATE SCHEMA with objects in it")
		}
		a.plan.Touches = true
	case *pgquery.Node_TransactionStmt, *pgquery.Node_VariableSetStmt, *pgquery.Node_VariableShowStmt, *pgquery.Node_DiscardStmt,
		*pgquery.Node_DeallocateStmt, *pgquery.Node_ClosePortalStmt, *pgquery.Node_ListenStmt, *pgquery.Node_UnlistenStmt, *pgquery.Node_NotifyStmt,
		*pgquery.Node_LockStmt, *pgquery.Node_ConstraintsSetStmt, *pgquery.Node_CheckPointStmt:
	default:
		a.other(n, "this kind of statement")
	}
}

// other refuses what could pass masked columns on, or take the masks off.
func (a *analyzer) other(n *pgquery.Node, what string) {
	a.refuse(locationOf(n), "%s is refused on a data source that masks columns: it could show them under another name, or make what does", what)
}

// keep is for a result that becomes a table.
func (a *analyzer) keep(cols []col, what string) {
	for _, c := range cols {
		if c.taint.on {
			a.refuse(0, "%s would copy the masked column %s to where it is not masked", what, c.taint.source)
		}
	}
}

// into tells whether a SELECT INTO is in the tree.
func into(m protoreflect.Message) bool {
	if _, ok := m.Interface().(*pgquery.IntoClause); ok {
		return true
	}
	found := false
	m.Range(func(field protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		switch {
		case field.Kind() != protoreflect.MessageKind:
		case field.IsList():
			for i := range value.List().Len() {
				found = found || into(value.List().Get(i).Message())
			}
		default:
			found = found || into(value.Message())
		}
		return !found
	})
	return found
}

// target is the table that a statement writes to, as an entry of FROM.
func (a *analyzer) target(s *scope, v *pgquery.RangeVar) *item {
	r := a.found.Relations[rangeName(v)]
	if r == nil {
		a.refuse(v.Location, "the table %q is not found in the catalog: the data source masks columns, and what can't be followed is refused", rangeName(v))
	}
	it := named(v.Alias, r.Name, a.relationColumns(r, v.Location))
	it.schema = r.Schema
	return it
}

// assign is a value that is written to a column.
func (a *analyzer) assign(t taint, to *item, column string, location int32) {
	if !t.on {
		return
	}
	if old, _, ok := to.column(column); ok && old.on && old.plain && t.plain && old.rule == t.rule {
		return // masked there as it is here
	}
	a.refuse(location, "this would copy the masked column %s to %q, where it is not masked in the same way", t.source, column)
}

func (a *analyzer) writeScope(w *pgquery.WithClause, around *scope) *scope {
	s := &scope{parent: around.parent, env: a.with(w, around), view: around.view, windows: map[string]taint{}}
	if around.items != nil {
		s.parent = around
	}
	return s
}

// assignments are the list of an UPDATE.
func (a *analyzer) assignments(s *scope, to *item, list []*pgquery.Node) {
	for _, n := range list {
		target := n.GetResTarget()
		val := target.GetVal()
		if m := val.GetMultiAssignRef(); m != nil {
			val = m.Source
			if row := m.Source.GetRowExpr(); row != nil && int(m.Colno) >= 1 && int(m.Colno) <= len(row.Args) {
				val = row.Args[m.Colno-1]
			}
		}
		for _, i := range target.GetIndirection() {
			a.control(s, i, "a subscript")
		}
		t, _ := a.value(s, val)
		a.assign(t, to, target.GetName(), target.GetLocation())
	}
}

// returning are the columns of RETURNING.
func (a *analyzer) returning(s *scope, to *item, list []*pgquery.Node) []col {
	if len(list) == 0 {
		return nil
	}
	inside := *s
	inside.items = append([]*item{}, s.items...)
	for _, name := range []string{"old", "new"} {
		inside.items = append(inside.items, &item{name: name, cols: to.cols, rel: true})
	}
	return a.targets(&inside, list)
}

func (a *analyzer) insert(v *pgquery.InsertStmt, around *scope) []col {
	s := a.writeScope(v.WithClause, around)
	to := a.target(s, v.Relation)
	var into []string
	for _, n := range v.Cols {
		into = append(into, n.GetResTarget().GetName())
	}
	if len(into) == 0 {
		for _, c := range to.cols {
			into = append(into, c.name)
		}
	}
	if v.SelectStmt != nil {
		for i, c := range a.query(v.SelectStmt, &scope{parent: s.parent, env: s.env, view: s.view}) {
			column := ""
			if i < len(into) {
				column = into[i]
			}
			a.assign(c.taint, to, column, v.Relation.Location)
		}
	}
	s.items = []*item{to}
	if c := v.OnConflictClause; c != nil {
		excluded := &item{name: "excluded", cols: to.cols, rel: true}
		inside := *s
		inside.items = []*item{to, excluded}
		a.assignments(&inside, to, c.TargetList)
		a.condition(&inside, c.WhereClause, "WHERE")
		if c.Infer != nil {
			a.condition(s, c.Infer.WhereClause, "WHERE")
		}
	}
	return a.returning(s, to, v.ReturningList)
}

func (a *analyzer) update(v *pgquery.UpdateStmt, around *scope) []col {
	s := a.writeScope(v.WithClause, around)
	to := a.target(s, v.Relation)
	s.items = []*item{to}
	for _, n := range v.FromClause {
		a.from(s, n)
	}
	a.assignments(s, to, v.TargetList)
	a.condition(s, v.WhereClause, "WHERE")
	return a.returning(s, to, v.ReturningList)
}

func (a *analyzer) delete(v *pgquery.DeleteStmt, around *scope) []col {
	s := a.writeScope(v.WithClause, around)
	to := a.target(s, v.Relation)
	s.items = []*item{to}
	for _, n := range v.UsingClause {
		a.from(s, n)
	}
	a.condition(s, v.WhereClause, "WHERE")
	return a.returning(s, to, v.ReturningList)
}

func (a *analyzer) merge(v *pgquery.MergeStmt, around *scope) []col {
	s := a.writeScope(v.WithClause, around)
	to := a.target(s, v.Relation)
	s.items = []*item{to}
	a.from(s, v.SourceRelation)
	a.condition(s, v.JoinCondition, "ON")
	for _, n := range v.MergeWhenClauses {
		when := n.GetMergeWhenClause()
		a.condition(s, when.Condition, "WHEN")
		if len(when.Values) > 0 {
			for i, value := range when.Values {
				column := ""
				switch {
				case i < len(when.TargetList):
					column = when.TargetList[i].GetResTarget().GetName()
				case len(when.TargetList) == 0 && i < len(to.cols):
					column = to.cols[i].name
				}
				t, _ := a.value(s, value)
				a.assign(t, to, column, locationOf(value))
			}
			continue
		}
		a.assignments(s, to, when.TargetList)
	}
	// RETURNING * gives the source's columns first.
	if len(s.items) > 1 {
		s.items = append(s.items[1:len(s.items):len(s.items)], to)
	}
	return a.returning(s, to, v.ReturningList)
}
