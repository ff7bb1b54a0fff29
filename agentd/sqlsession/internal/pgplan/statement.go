package pgplan

import (
	"fmt"
	"slices"
	"strings"

	pgquery "github.com/pganalyze/pg_query_go/v6"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
)

// Kind is what a statement does.
type Kind string

// The kinds that have plans.
const (
	Select Kind = "SELECT" // VALUES, TABLE and WITH, too
	Insert Kind = "INSERT"
	Update Kind = "UPDATE"
	Delete Kind = "DELETE"
	Merge  Kind = "MERGE"
	// Index is CREATE INDEX, for hypothetical ones.
	Index Kind = "CREATE INDEX"
)

// Name is a function or an operator as the statement calls it.
type Name struct {
	// Schema is empty where the statement leaves it to the search path.
	Schema, Name string
	// Offset is in bytes of the text from 0; -1 is unknown.
	Offset int
}

// String implements fmt.Stringer.
func (n Name) String() string {
	if n.Schema == "" {
		return n.Name
	}
	return n.Schema + "." + n.Name
}

// Statement is what planning a statement may call.
type Statement struct {
	Kind Kind
	// Writes is set when the statement, or one within it, changes rows.
	Writes               bool
	Functions, Operators []Name
	// Composite is where the first literal stands that may be an array, a row or a
	// range, as Composite says; -1: nowhere.
	Composite int
	// Fields are the names behind a point: x.f may be a column or a call f(x).
	Fields []Name
}

// Refusal says what in a statement is not understood or has no plan.
type Refusal struct {
	// Offset is in bytes of the text from 0; -1 is unknown.
	Offset  int
	Message string
}

// Error implements error.
func (r *Refusal) Error() string { return r.Message }

// maxNames bounds the names of one statement.
const maxNames = 10_000

// Read walks the tree of one statement. What it does not know is a *Refusal.
func Read(tree *pgtree.Tree) (*Statement, error) {
	switch len(tree.GetStmts()) {
	case 0:
		return nil, &Refusal{-1, "the statement is empty"}
	case 1:
	default:
		return nil, &Refusal{int(tree.Stmts[1].StmtLocation), "the text has more than one statement: send them one by one"}
	}
	w := &walker{out: &Statement{Composite: -1}}
	for _, implied := range []string{"=", "<", "<=", ">="} { // of IN, BETWEEN, USING, CASE and others
		w.out.Operators = append(w.out.Operators, Name{Name: implied, Offset: -1})
	}
	node := tree.Stmts[0].GetStmt()
	switch {
	case node.GetSelectStmt() != nil:
		w.out.Kind = Select
	case node.GetInsertStmt() != nil:
		w.out.Kind = Insert
	case node.GetUpdateStmt() != nil:
		w.out.Kind = Update
	case node.GetDeleteStmt() != nil:
		w.out.Kind = Delete
	case node.GetMergeStmt() != nil:
		w.out.Kind = Merge
	case node.GetIndexStmt() != nil:
		w.out.Kind = Index
		if err := checkIndex(node.GetIndexStmt()); err != nil {
			return nil, err
		}
	default:
		return nil, &Refusal{0, "it is none of SELECT, VALUES, TABLE, WITH, INSERT, UPDATE, DELETE and MERGE"}
	}
	if err := w.walk(node.ProtoReflect(), 0); err != nil {
		return nil, err
	}
	for _, names := range [][]Name{w.out.Functions, w.out.Operators, w.out.Fields} {
		slices.SortStableFunc(names, func(a, b Name) int { return a.Offset - b.Offset })
	}
	return w.out, nil
}

// checkIndex lets CREATE INDEX through that names a table, columns and
// expressions, and nothing else.
func checkIndex(s *pgquery.IndexStmt) error {
	switch {
	case s.Concurrent || s.IfNotExists || s.TableSpace != "" || len(s.Options) > 0 || s.NullsNotDistinct:
		return &Refusal{0, "a hypothetical index is a plain CREATE INDEX ON table [USING method] (column, ...) [INCLUDE (...)] [WHERE ...]"}
	case s.Unique || s.Primary || s.Isconstraint || s.Deferrable || len(s.ExcludeOpNames) > 0:
		return &Refusal{0, "a hypothetical index enforces nothing: leave UNIQUE out"}
	case len(s.IndexParams) == 0 || len(s.IndexParams) > 32:
		return &Refusal{0, "an index has 1 to 32 columns"}
	}
	for _, p := range s.IndexParams {
		if e := p.GetIndexElem(); e == nil || len(e.Opclassopts) > 0 {
			return &Refusal{0, "a hypothetical index has no options"}
		}
	}
	return nil
}

type walker struct {
	out   *Statement
	names int
}

// maxDepth bounds the nesting of a tree; the parser's own limits are narrower.
const maxDepth = 20_000

func (w *walker) walk(m protoreflect.Message, depth int) error {
	kind := string(m.Descriptor().Name())
	if depth > maxDepth {
		return &Refusal{-1, "the statement is nested too deeply"}
	}
	if !known[kind] {
		return &Refusal{location(m), fmt.Sprintf("the statement has a part that is not understood (%s)", kind)}
	}
	if err := w.note(kind, m); err != nil {
		return err
	}
	var err error
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		if f.Message() == nil {
			return true
		}
		if f.IsList() {
			list := v.List()
			for i := range list.Len() {
				if err = w.walk(list.Get(i).Message(), depth+1); err != nil {
					return false
				}
			}
			return true
		}
		err = w.walk(v.Message(), depth+1)
		return err == nil
	})
	return err
}

// note takes the names in one node.
func (w *walker) note(kind string, m protoreflect.Message) error {
	if w.names++; w.names > 50*maxNames || len(w.out.Functions)+len(w.out.Operators)+len(w.out.Fields) > maxNames {
		return &Refusal{-1, "the statement is too complex"}
	}
	if name := plainCalls[kind]; name != "" {
		// Before PostgreSQL 16 and 17 these were calls of any function of that name.
		w.out.Functions = append(w.out.Functions, Name{Name: name, Offset: location(m)})
	}
	switch x := m.Interface().(type) {
	case *pgquery.SelectStmt:
		if x.IntoClause != nil {
			return &Refusal{location(x.IntoClause.ProtoReflect()), "SELECT INTO makes a table"}
		}
	case *pgquery.InsertStmt, *pgquery.UpdateStmt, *pgquery.DeleteStmt, *pgquery.MergeStmt:
		w.out.Writes = true
	case *pgquery.FuncCall:
		name, err := nameOf(x.Funcname, int(x.Location))
		if err != nil {
			return err
		}
		w.out.Functions = append(w.out.Functions, name)
	case *pgquery.A_Expr:
		if len(x.Name) == 0 {
			return nil
		}
		return w.operator(x.Name, int(x.Location))
	case *pgquery.A_Const:
		if s := x.GetSval(); s != nil && Composite(s.Sval) && w.out.Composite < 0 {
			w.out.Composite = max(0, int(x.Location))
		}
	case *pgquery.ColumnRef:
		if len(x.Fields) > 1 {
			w.field(x.Fields[len(x.Fields)-1], int(x.Location))
		}
	case *pgquery.A_Indirection:
		for _, field := range x.Indirection {
			w.field(field, -1)
		}
	case *pgquery.SubLink:
		if len(x.OperName) > 0 {
			return w.operator(x.OperName, int(x.Location))
		}
	case *pgquery.SortBy:
		if len(x.UseOp) > 0 {
			return w.operator(x.UseOp, int(x.Location))
		}
	case *pgquery.JsonFuncExpr:
		name := map[pgquery.JsonExprOp]string{
			pgquery.JsonExprOp_JSON_EXISTS_OP: "json_exists", pgquery.JsonExprOp_JSON_QUERY_OP: "json_query", pgquery.JsonExprOp_JSON_VALUE_OP: "json_value",
		}[x.Op]
		if name == "" {
			return &Refusal{int(x.Location), "the statement has a part that is not understood (JsonFuncExpr)"}
		}
		w.out.Functions = append(w.out.Functions, Name{Name: name, Offset: int(x.Location)})
	}
	return nil
}

// Composite tells whether a text may be read as an array, a row, a range or a
// multirange: it begins with a bracket.
func Composite(text string) bool {
	text = strings.TrimLeft(text, " \t\n\r\v\f")
	return text != "" && strings.IndexByte("{([", text[0]) >= 0
}

func (w *walker) field(n *pgquery.Node, offset int) {
	if s := n.GetString_(); s != nil {
		w.out.Fields = append(w.out.Fields, Name{Name: s.Sval, Offset: offset})
	}
}

func (w *walker) operator(parts []*pgquery.Node, offset int) error {
	name, err := nameOf(parts, offset)
	if err == nil {
		w.out.Operators = append(w.out.Operators, name)
	}
	return err
}

// nameOf reads [[database.]schema.]name.
func nameOf(parts []*pgquery.Node, offset int) (Name, error) {
	texts := make([]string, len(parts))
	for i, p := range parts {
		s := p.GetString_()
		if s == nil {
			return Name{}, &Refusal{offset, "a name is not understood"}
		}
		texts[i] = s.Sval
	}
	switch len(texts) {
	case 1:
		return Name{Name: texts[0], Offset: offset}, nil
	case 2, 3:
		return Name{Schema: texts[len(texts)-2], Name: texts[len(texts)-1], Offset: offset}, nil
	}
	return Name{}, &Refusal{offset, "a name is not understood"}
}

// location is where a node stands in the text; -1 if it does not say.
func location(m protoreflect.Message) int {
	f := m.Descriptor().Fields().ByName("location")
	if f == nil || f.Kind() != protoreflect.Int32Kind {
		return -1
	}
	return int(m.Get(f).Int())
}

// known are the nodes that a statement with a plan is made of, and those of CREATE
// INDEX. Of a node that is not here nobody knows what planning it does.
var known = set(`Node List Integer Float Boolean String BitString A_Const A_Star A_Expr A_Indices A_Indirection A_ArrayExpr
	Alias BoolExpr BooleanTest NullTest CaseExpr CaseWhen CoalesceExpr MinMaxExpr CollateClause ColumnRef ParamRef FuncCall
	GroupingFunc GroupingSet RowExpr SubLink SQLValueFunction TypeCast TypeName SetToDefault CurrentOfExpr MultiAssignRef
	XmlExpr XmlSerialize RangeVar RangeSubselect RangeFunction RangeTableFunc RangeTableFuncCol RangeTableSample JoinExpr
	ResTarget SortBy WindowDef WithClause CommonTableExpr CTESearchClause CTECycleClause LockingClause OnConflictClause InferClause
	SelectStmt InsertStmt UpdateStmt DeleteStmt MergeStmt MergeWhenClause MergeSupportFunc IntoClause
	JsonAggConstructor JsonArgument JsonArrayAgg JsonArrayConstructor JsonArrayQueryConstructor JsonBehavior JsonFormat JsonFuncExpr
	JsonIsPredicate JsonKeyValue JsonObjectAgg JsonObjectConstructor JsonOutput JsonParseExpr JsonReturning JsonScalarExpr
	JsonSerializeExpr JsonTable JsonTableColumn JsonTablePathSpec JsonValueExpr IndexStmt IndexElem`)

// plainCalls are the nodes that an older server takes for calls of a function.
var plainCalls = map[string]string{
	"JsonScalarExpr": "json_scalar", "JsonParseExpr": "json", "JsonSerializeExpr": "json_serialize", "JsonObjectConstructor": "json_object",
	"JsonArrayConstructor": "json_array", "JsonArrayQueryConstructor": "json_array", "JsonObjectAgg": "json_objectagg", "JsonArrayAgg": "json_arrayagg",
	"JsonTable": "json_table", "MergeSupportFunc": "merge_action",
}

func set(text string) map[string]bool {
	s := make(map[string]bool)
	for _, word := range strings.Fields(text) {
		s[word] = true
	}
	return s
}
