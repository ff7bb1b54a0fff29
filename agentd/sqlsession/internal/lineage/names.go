package lineage

import (
	pgquery "github.com/pganalyze/pg_query_go/v6"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// names are those in a tree that the catalog is asked for.
type names struct {
	relations, functions map[Name]bool
	operators            map[string]bool
}

// collect walks through a whole tree, whatever it is made of.
func (n *names) collect(m protoreflect.Message, depth int) {
	if depth > 10000 {
		panic(failure{&Refusal{Reason: "the statement is nested too deeply to follow its masked columns"}})
	}
	switch v := m.Interface().(type) {
	case *pgquery.RangeVar:
		n.relations[rangeName(v)] = true
	case *pgquery.FuncCall:
		n.functions[nameOf(v.Funcname)] = true
	case *pgquery.A_Expr:
		n.operators[nameOf(v.Name).Name] = true
	case *pgquery.SubLink:
		n.operators[nameOf(v.OperName).Name] = true
	case *pgquery.SortBy:
		n.operators[nameOf(v.UseOp).Name] = true
	}
	m.Range(func(field protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		switch {
		case field.Kind() != protoreflect.MessageKind:
		case field.IsList():
			for i := range value.List().Len() {
				n.collect(value.List().Get(i).Message(), depth+1)
			}
		default:
			n.collect(value.Message(), depth+1)
		}
		return true
	})
}

// less returns what is not in seen, and adds it there.
func (n *names) less(seen names) (relations, functions []Name, operators []string) {
	for name := range n.relations {
		if !seen.relations[name] {
			seen.relations[name] = true
			relations = append(relations, name)
		}
	}
	for name := range n.functions {
		if !seen.functions[name] {
			seen.functions[name] = true
			functions = append(functions, name)
		}
	}
	for name := range n.operators {
		if name != "" && !seen.operators[name] {
			seen.operators[name] = true
			operators = append(operators, name)
		}
	}
	return relations, functions, operators
}

func rangeName(v *pgquery.RangeVar) Name { return Name{v.Schemaname, v.Relname} }

// nameOf reads a name of one, two or three parts.
func nameOf(parts []*pgquery.Node) Name {
	var texts []string
	for _, p := range parts {
		texts = append(texts, p.GetString_().GetSval())
	}
	switch n := len(texts); n {
	case 0:
		return Name{}
	case 1:
		return Name{"", texts[0]}
	default:
		return Name{texts[n-2], texts[n-1]}
	}
}

// children calls visit with the nodes right below a message, through messages
// that are not nodes.
func children(m protoreflect.Message, visit func(*pgquery.Node)) {
	m.Range(func(field protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		one := func(child protoreflect.Message) {
			if node, ok := child.Interface().(*pgquery.Node); ok {
				visit(node)
				return
			}
			children(child, visit)
		}
		switch {
		case field.Kind() != protoreflect.MessageKind:
		case field.IsList():
			for i := range value.List().Len() {
				one(value.List().Get(i).Message())
			}
		default:
			one(value.Message())
		}
		return true
	})
}

// inner is the message in a node; nil of an empty one.
func inner(n *pgquery.Node) protoreflect.Message {
	var m protoreflect.Message
	if n == nil {
		return nil
	}
	n.ProtoReflect().Range(func(_ protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		m = value.Message()
		return false
	})
	return m
}

// locationOf is where a node is in the text; 0 or below: unknown.
func locationOf(n *pgquery.Node) int32 {
	m := inner(n)
	if m == nil {
		return 0
	}
	if field := m.Descriptor().Fields().ByName("location"); field != nil && field.Kind() == protoreflect.Int32Kind {
		if at := int32(m.Get(field).Int()); at > 0 {
			return at
		}
	}
	var at int32
	children(m, func(child *pgquery.Node) {
		if at == 0 {
			at = locationOf(child)
		}
	})
	return at
}

// figureName is the name that the server gives to a column without one; sure
// is how much better a name is than that of its type.
func figureName(n *pgquery.Node) (name string, sure int) {
	last := func(parts []*pgquery.Node) string {
		name := ""
		for _, p := range parts {
			if s := p.GetString_(); s != nil {
				name = s.Sval
			}
		}
		return name
	}
	switch v := n.GetNode().(type) {
	case *pgquery.Node_ColumnRef:
		if name := last(v.ColumnRef.Fields); name != "" {
			return name, 2
		}
	case *pgquery.Node_AIndirection:
		if name := last(v.AIndirection.Indirection); name != "" {
			return name, 2
		}
		return figureName(v.AIndirection.Arg)
	case *pgquery.Node_FuncCall:
		return last(v.FuncCall.Funcname), 2
	case *pgquery.Node_AExpr:
		if v.AExpr.Kind == pgquery.A_Expr_Kind_AEXPR_NULLIF {
			return "nullif", 2
		}
	case *pgquery.Node_TypeCast:
		if name, sure := figureName(v.TypeCast.Arg); sure > 1 {
			return name, sure
		}
		if name := last(v.TypeCast.TypeName.GetNames()); name != "" {
			return name, 1
		}
	case *pgquery.Node_CollateClause:
		return figureName(v.CollateClause.Arg)
	case *pgquery.Node_GroupingFunc:
		return "grouping", 2
	case *pgquery.Node_MergeSupportFunc:
		return "merge_action", 2
	case *pgquery.Node_SubLink:
		switch v.SubLink.SubLinkType {
		case pgquery.SubLinkType_EXISTS_SUBLINK:
			return "exists", 2
		case pgquery.SubLinkType_ARRAY_SUBLINK:
			return "array", 2
		case pgquery.SubLinkType_EXPR_SUBLINK:
			st := v.SubLink.Subselect.GetSelectStmt()
			for st != nil && st.Larg != nil {
				st = st.Larg
			}
			if st != nil && len(st.TargetList) > 0 {
				t := st.TargetList[0].GetResTarget()
				if t.GetName() != "" {
					return t.Name, 2
				}
				return figureName(t.GetVal())
			}
			if st != nil && len(st.ValuesLists) > 0 {
				return "column1", 2
			}
		}
	case *pgquery.Node_CaseExpr:
		if name, sure := figureName(v.CaseExpr.Defresult); sure > 1 {
			return name, sure
		}
		return "case", 1
	case *pgquery.Node_AArrayExpr:
		return "array", 2
	case *pgquery.Node_RowExpr:
		return "row", 2
	case *pgquery.Node_CoalesceExpr:
		return "coalesce", 2
	case *pgquery.Node_MinMaxExpr:
		if v.MinMaxExpr.Op == pgquery.MinMaxOp_IS_LEAST {
			return "least", 2
		}
		return "greatest", 2
	case *pgquery.Node_SqlvalueFunction:
		return map[pgquery.SQLValueFunctionOp]string{
			pgquery.SQLValueFunctionOp_SVFOP_CURRENT_DATE:        "current_date",
			pgquery.SQLValueFunctionOp_SVFOP_CURRENT_TIME:        "current_time",
			pgquery.SQLValueFunctionOp_SVFOP_CURRENT_TIME_N:      "current_time",
			pgquery.SQLValueFunctionOp_SVFOP_CURRENT_TIMESTAMP:   "current_timestamp",
			pgquery.SQLValueFunctionOp_SVFOP_CURRENT_TIMESTAMP_N: "current_timestamp",
			pgquery.SQLValueFunctionOp_SVFOP_LOCALTIME:           "localtime",
			pgquery.SQLValueFunctionOp_SVFOP_LOCALTIME_N:         "localtime",
			pgquery.SQLValueFunctionOp_SVFOP_LOCALTIMESTAMP:      "localtimestamp",
			pgquery.SQLValueFunctionOp_SVFOP_LOCALTIMESTAMP_N:    "localtimestamp",
			pgquery.SQLValueFunctionOp_SVFOP_CURRENT_ROLE:        "current_role",
			pgquery.SQLValueFunctionOp_SVFOP_CURRENT_USER:        "current_user",
			pgquery.SQLValueFunctionOp_SVFOP_USER:                "user",
			pgquery.SQLValueFunctionOp_SVFOP_SESSION_USER:        "session_user",
			pgquery.SQLValueFunctionOp_SVFOP_CURRENT_CATALOG:     "current_catalog",
			pgquery.SQLValueFunctionOp_SVFOP_CURRENT_SCHEMA:      "current_schema",
		}[v.SqlvalueFunction.Op], 2
	case *pgquery.Node_XmlExpr:
		name := map[pgquery.XmlExprOp]string{
			pgquery.XmlExprOp_IS_XMLCONCAT: "xmlconcat", pgquery.XmlExprOp_IS_XMLELEMENT: "xmlelement", pgquery.XmlExprOp_IS_XMLFOREST: "xmlforest",
			pgquery.XmlExprOp_IS_XMLPARSE: "xmlparse", pgquery.XmlExprOp_IS_XMLPI: "xmlpi", pgquery.XmlExprOp_IS_XMLROOT: "xmlroot",
		}[v.XmlExpr.Op]
		if name != "" {
			return name, 2
		}
	case *pgquery.Node_XmlSerialize:
		return "xmlserialize", 2
	case *pgquery.Node_JsonObjectConstructor:
		return "json_object", 2
	case *pgquery.Node_JsonArrayConstructor, *pgquery.Node_JsonArrayQueryConstructor:
		return "json_array", 2
	case *pgquery.Node_JsonObjectAgg:
		return "json_objectagg", 2
	case *pgquery.Node_JsonArrayAgg:
		return "json_arrayagg", 2
	case *pgquery.Node_JsonParseExpr:
		return "json", 2
	case *pgquery.Node_JsonScalarExpr:
		return "json_scalar", 2
	case *pgquery.Node_JsonSerializeExpr:
		return "json_serialize", 2
	case *pgquery.Node_JsonFuncExpr:
		return map[pgquery.JsonExprOp]string{
			pgquery.JsonExprOp_JSON_EXISTS_OP: "json_exists", pgquery.JsonExprOp_JSON_QUERY_OP: "json_query", pgquery.JsonExprOp_JSON_VALUE_OP: "json_value",
		}[v.JsonFuncExpr.Op], 2
	}
	return "?column?", 0
}
