package pgguard

import (
	"fmt"
	"strings"

	pgquery "github.com/pganalyze/pg_query_go/v6"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// queryNodes are the kinds of nodes that a statement which only reads may have.
// Each was looked at: either it computes something, or what it calls is found by
// walker.note. What is in no list is refused.
var queryNodes = set(`Node List IntList OidList Integer Float Boolean String BitString A_Const ParamRef A_Star
 SelectStmt ResTarget ColumnRef A_Expr BoolExpr FuncCall NamedArgExpr A_Indices A_Indirection A_ArrayExpr RowExpr
 TypeCast TypeName CollateClause SortBy WindowDef GroupingSet GroupingFunc WithClause CommonTableExpr CTESearchClause CTECycleClause
 RangeVar Alias RangeSubselect RangeFunction RangeTableFunc RangeTableFuncCol RangeTableSample JoinExpr ColumnDef
 SubLink CaseExpr CaseWhen CoalesceExpr MinMaxExpr NullTest BooleanTest SQLValueFunction XmlExpr XmlSerialize
 JsonFormat JsonReturning JsonValueExpr JsonOutput JsonArgument JsonFuncExpr JsonTable JsonTableColumn JsonTablePathSpec JsonBehavior JsonIsPredicate
 JsonObjectConstructor JsonArrayConstructor JsonArrayQueryConstructor JsonAggConstructor JsonObjectAgg JsonArrayAgg
 JsonKeyValue JsonParseExpr JsonScalarExpr JsonSerializeExpr`)

// writeNodes are those that INSERT, UPDATE, DELETE and MERGE have besides.
var writeNodes = set(`InsertStmt UpdateStmt DeleteStmt MergeStmt MergeWhenClause OnConflictClause InferClause IndexElem MultiAssignRef SetToDefault
 CurrentOfExpr MergeSupportFunc LockingClause IntoClause`)

// names of nodes as users know them.
var nodeWords = map[string]string{
	"InsertStmt": "INSERT", "UpdateStmt": "UPDATE", "DeleteStmt": "DELETE", "MergeStmt": "MERGE", "LockingClause": "FOR UPDATE or FOR SHARE",
	"IntoClause": "SELECT INTO",
}

func set(words string) map[string]bool {
	m := make(map[string]bool)
	for _, word := range strings.Fields(words) {
		m[word] = true
	}
	return m
}

// use is one place where a statement names something.
type use struct {
	Name
	location int
	// row: x.name, which may be a function of one argument; scalar: x may be
	// something else than a row.
	row, scalar bool
	// args counts the arguments of a call.
	args int
	node *pgquery.FuncCall
}

// walker collects what a statement names.
type walker struct {
	version int
	// allowed are the kinds of nodes that may be met; nil: all.
	allowed   []map[string]bool
	location  int // the last one that was met
	refusal   *Refusal
	calls     []use
	operators []use
	types     []use
	relations []use
	writes    []write
	// makes is set by what makes values of the types of columns: functions that
	// make rows, and texts, NULLs and parameters, which take the type of what stands beside them.
	makes bool
	// scalars is set by functions in FROM: their alias may be a row or a value.
	scalars bool
}

// write is something that a statement writes to.
type write struct {
	kind     string // of policy's StatementKinds
	relation *pgquery.RangeVar
}

// fieldsOf caches the fields of each kind of node that can hold nodes, and its
// location.
type kindOfNode struct {
	name     string
	fields   []protoreflect.FieldDescriptor
	location protoreflect.FieldDescriptor
}

var kinds = func() map[protoreflect.FullName]*kindOfNode {
	all := make(map[protoreflect.FullName]*kindOfNode)
	messages := (&pgquery.Node{}).ProtoReflect().Descriptor().ParentFile().Messages()
	for i := range messages.Len() {
		d := messages.Get(i)
		k := &kindOfNode{name: nodeName(d)}
		for j := range d.Fields().Len() {
			switch f := d.Fields().Get(j); {
			case f.Message() != nil:
				k.fields = append(k.fields, f)
			case f.Name() == "location" && f.Kind() == protoreflect.Int32Kind:
				k.location = f
			}
		}
		all[d.FullName()] = k
	}
	return all
}()

func nodeName(d protoreflect.MessageDescriptor) string { return string(d.Name()) }

// walk visits a node and all that is in it.
func (w *walker) walk(m protoreflect.Message) {
	if w.refusal != nil || !m.IsValid() {
		return
	}
	k := kinds[m.Descriptor().FullName()]
	if k == nil {
		w.refuse(w.location, true, "it has something that is not understood")
		return
	}
	if k.name == "Node" {
		// A wrapper around one of its fields.
		if f := m.WhichOneof(m.Descriptor().Oneofs().Get(0)); f != nil {
			w.walk(m.Get(f).Message())
		}
		return
	}
	if k.location != nil {
		if at := int(m.Get(k.location).Int()); at > 0 {
			w.location = at
		}
	}
	if w.allowed != nil && !w.permits(k.name) {
		if into, ok := m.Interface().(*pgquery.IntoClause); ok && into.Rel != nil {
			w.location = int(into.Rel.Location)
		}
		if word := nodeWords[k.name]; word != "" {
			w.refuse(w.location, false, "the data source is read-only, and this has %s in it", word)
		} else {
			w.refuse(w.location, true, "it has something that is not understood (%s)", k.name)
		}
		return
	}
	w.note(m.Interface())
	for _, f := range k.fields {
		if !m.Has(f) {
			continue
		}
		if !f.IsList() {
			w.walk(m.Get(f).Message())
			continue
		}
		list := m.Get(f).List()
		for i := range list.Len() {
			w.walk(list.Get(i).Message())
		}
	}
}

func (w *walker) permits(name string) bool {
	for _, allowed := range w.allowed {
		if allowed[name] {
			return true
		}
	}
	return false
}

func (w *walker) refuse(location int, unknown bool, format string, args ...any) {
	if w.refusal == nil {
		w.refusal = &Refusal{Reason: fmt.Sprintf(format, args...), Position: location, Unknown: unknown}
	}
}

// note takes down what a node names.
func (w *walker) note(m proto.Message) {
	switch n := m.(type) {
	case *pgquery.FuncCall:
		w.call(n.Funcname, int(n.Location), n)
	case *pgquery.ColumnRef:
		// x.name may be a function that takes the row x.
		if len(n.Fields) > 1 {
			w.attribute(n.Fields[len(n.Fields)-1], int(n.Location), false)
		}
	case *pgquery.A_Indirection:
		for _, field := range n.Indirection {
			w.attribute(field, w.location, true)
		}
	case *pgquery.RangeFunction, *pgquery.RangeTableFunc, *pgquery.JsonTable:
		w.scalars = true
	case *pgquery.ParamRef:
		w.makes = true
	case *pgquery.A_Const:
		w.makes = w.makes || n.Isnull || n.GetSval() != nil
	case *pgquery.A_Expr:
		w.expression(n)
	case *pgquery.SubLink:
		if len(n.OperName) > 0 {
			w.operator(n.OperName, int(n.Location))
		} else if n.Testexpr != nil {
			w.operatorNamed("=", int(n.Location))
		}
	case *pgquery.SortBy:
		if len(n.UseOp) > 0 {
			w.operator(n.UseOp, int(n.Location))
		}
	case *pgquery.CaseExpr:
		if n.Arg != nil {
			w.operatorNamed("=", int(n.Location))
		}
	case *pgquery.JoinExpr:
		if n.IsNatural || len(n.UsingClause) > 0 {
			w.operatorNamed("=", w.location)
		}
	case *pgquery.TypeName:
		w.typeName(n)
	case *pgquery.RangeVar:
		w.relation(n)
	case *pgquery.RangeTableSample:
		name, ok := nameOf(n.Method)
		if !ok || (name.Schema != "" && name.Schema != "pg_catalog") || name.Name != "system" && name.Name != "bernoulli" {
			w.calls = append(w.calls, use{Name: name, location: int(n.Location)})
		}
	case *pgquery.SelectStmt:
		if n.IntoClause != nil {
			w.writes = append(w.writes, write{"ddl", n.IntoClause.Rel})
		}
	case *pgquery.InsertStmt:
		w.writes = append(w.writes, write{"insert", n.Relation})
		if c := n.OnConflictClause; c != nil && c.Action == pgquery.OnConflictAction_ONCONFLICT_UPDATE {
			w.writes = append(w.writes, write{"update", n.Relation})
		}
	case *pgquery.UpdateStmt:
		w.writes = append(w.writes, write{"update", n.Relation})
	case *pgquery.DeleteStmt:
		w.writes = append(w.writes, write{"delete", n.Relation})
	case *pgquery.MergeStmt:
		w.writes = append(w.writes, write{"merge", n.Relation})
	}
	w.newer(m)
}

// newer notes what is grammar to newer servers, and a function's name to older
// ones.
func (w *walker) newer(m proto.Message) {
	name, since, location := "", 17, w.location
	switch n := m.(type) {
	case *pgquery.JsonFuncExpr:
		switch n.Op {
		case pgquery.JsonExprOp_JSON_EXISTS_OP:
			name = "json_exists"
		case pgquery.JsonExprOp_JSON_QUERY_OP:
			name = "json_query"
		default:
			name = "json_value"
		}
		location = int(n.Location)
	case *pgquery.JsonTable:
		name, location = "json_table", int(n.Location)
	case *pgquery.JsonScalarExpr:
		name, location = "json_scalar", int(n.Location)
	case *pgquery.JsonSerializeExpr:
		name, location = "json_serialize", int(n.Location)
	case *pgquery.JsonParseExpr:
		name, location = "json", int(n.Location)
	case *pgquery.MergeSupportFunc:
		name, location = "merge_action", int(n.Location)
	case *pgquery.JsonObjectConstructor:
		name, since, location = "json_object", 16, int(n.Location)
	case *pgquery.JsonArrayConstructor:
		name, since, location = "json_array", 16, int(n.Location)
	case *pgquery.JsonArrayQueryConstructor:
		name, since, location = "json_array", 16, int(n.Location)
	case *pgquery.JsonObjectAgg:
		name, since = "json_objectagg", 16
	case *pgquery.JsonArrayAgg:
		name, since = "json_arrayagg", 16
	}
	if name != "" && w.version < since {
		w.calls = append(w.calls, use{Name: Name{Name: name}, location: location})
	}
}

func (w *walker) call(names []*pgquery.Node, location int, n *pgquery.FuncCall) {
	name, ok := nameOf(names)
	if !ok {
		w.refuse(location, true, "it calls a function by a name that is not understood")
		return
	}
	w.makes = w.makes || strings.Contains(name.Name, "populate_record")
	w.calls = append(w.calls, use{Name: name, location: location, args: len(n.Args), node: n})
	if len(n.Args) == 1 {
		w.types = append(w.types, use{Name: name, location: location}) // type(value) is a cast
	}
	if len(n.AggOrder) > 0 || n.AggDistinct {
		w.operatorNamed("=", location)
	}
}

func (w *walker) attribute(field *pgquery.Node, location int, scalar bool) {
	if s := field.GetString_(); s != nil {
		w.calls = append(w.calls, use{Name: Name{Name: s.Sval}, location: location, row: true, scalar: scalar})
	}
}

func (w *walker) expression(n *pgquery.A_Expr) {
	at := int(n.Location)
	switch n.Kind {
	case pgquery.A_Expr_Kind_AEXPR_BETWEEN, pgquery.A_Expr_Kind_AEXPR_NOT_BETWEEN, pgquery.A_Expr_Kind_AEXPR_BETWEEN_SYM, pgquery.A_Expr_Kind_AEXPR_NOT_BETWEEN_SYM:
		for _, name := range []string{"<", "<=", ">", ">="} {
			w.operatorNamed(name, at)
		}
	default:
		w.operator(n.Name, at)
	}
}

func (w *walker) operator(names []*pgquery.Node, location int) {
	name, ok := nameOf(names)
	if !ok {
		w.refuse(location, true, "it has an operator whose name is not understood")
		return
	}
	w.operators = append(w.operators, use{Name: name, location: location})
}

func (w *walker) operatorNamed(name string, location int) {
	w.operators = append(w.operators, use{Name: Name{Name: name}, location: location})
}

func (w *walker) typeName(n *pgquery.TypeName) {
	name, ok := nameOf(n.Names)
	switch {
	case n.PctType:
		if w.allowed != nil {
			w.refuse(int(n.Location), true, "%%TYPE is not understood here")
		}
		return
	case !ok && len(n.Names) > 0:
		w.refuse(int(n.Location), true, "it has a type whose name is not understood")
		return
	case len(n.Names) == 0:
		return
	}
	w.types = append(w.types, use{Name: name, location: int(n.Location)})
}

func (w *walker) relation(n *pgquery.RangeVar) {
	w.relations = append(w.relations, use{Name: Name{n.Schemaname, n.Relname}, location: int(n.Location)})
}

// nameOf reads a name of one to three parts; the first of three is the
// database's own.
func nameOf(names []*pgquery.Node) (Name, bool) {
	parts := make([]string, 0, 3)
	for _, n := range names {
		s := n.GetString_()
		if s == nil {
			return Name{}, false
		}
		parts = append(parts, s.Sval)
	}
	switch len(parts) {
	case 1:
		return Name{"", parts[0]}, true
	case 2:
		return Name{parts[0], parts[1]}, true
	case 3:
		return Name{parts[1], parts[2]}, true
	}
	return Name{}, false
}
