package pgproxy

import (
	"strconv"
	"strings"

	pgquery "github.com/pganalyze/pg_query_go/v6"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgverb"
)

// part is one statement of a text, with what was decided about it.
type part struct {
	// sql is the statement's own text.
	sql string
	// quiet ones are not in the log, unless they fail or are refused: they touch no
	// data (BEGIN, SET, SHOW, ... on a read-only source).
	quiet bool
	// write: the statement may write, and is not sent before its intent is in the log.
	write bool
	// describeOnly is why it may be parsed and described but not run.
	describeOnly *Refusal
	// bracket is why no value of a Bind may be an array, a row or a range.
	bracket *Refusal
	// hide masks its result; nil: nothing that it selects is a masked column.
	hide Hider
	// path: names may mean something else after it (search_path).
	path bool
	// explains: it is EXPLAIN.
	explains bool
	// ends: it ends a failed transaction, or goes back to before the failure.
	ends bool
	// data: it was held against the policy, in the light of what names mean.
	data bool
	// prepares and executes are names of prepared statements of SQL; forgets is one
	// that goes away, "*" is all of them.
	prepares, executes, forgets string
	// cursor is a name: of DECLARE, FETCH, MOVE.
	declares, fetches string
}

// view is what classify knows of the session.
type view struct {
	readWrite bool
	// narrowed: what may be written is limited to schemas or kinds of statements.
	narrowed bool
	masked   bool
	metadata bool
	// plans: EXPLAIN is answered.
	plans bool
	// pathNamesCatalog: an unqualified name may mean something else than pg_catalog's.
	pathNamesCatalog bool
	// ownPath: search_path was changed in the transaction under way.
	ownPath bool
}

// inner is a query inside a statement that the policy decides on.
type inner struct{ node *pgquery.Node }

// classify decides on a statement's frame: what is no query at all is decided here,
// and the queries inside are returned for the policy.
func classify(node *pgquery.Node, v view) (p part, inside []inner, refusal *Refusal) {
	p.quiet = !v.readWrite
	switch n := node.GetNode().(type) {
	case *pgquery.Node_SelectStmt:
		return classifySelect(node, n.SelectStmt, v)
	case *pgquery.Node_TransactionStmt:
		refusal = classifyTransaction(n.TransactionStmt, v)
		switch n.TransactionStmt.GetKind() {
		case pgquery.TransactionStmtKind_TRANS_STMT_BEGIN, pgquery.TransactionStmtKind_TRANS_STMT_START, pgquery.TransactionStmtKind_TRANS_STMT_SAVEPOINT:
			p.quiet = true
		case pgquery.TransactionStmtKind_TRANS_STMT_RELEASE:
		default:
			p.path, p.ends = v.ownPath, true
		}
	case *pgquery.Node_VariableSetStmt:
		p.quiet = true
		p.path, refusal = classifySet(n.VariableSetStmt, v)
	case *pgquery.Node_VariableShowStmt:
		p.quiet = true
		refusal = classifyShow(n.VariableShowStmt.GetName(), v)
	case *pgquery.Node_DiscardStmt:
		p.quiet = true
		if n.DiscardStmt.GetTarget() == pgquery.DiscardMode_DISCARD_ALL {
			p.forgets, p.path = "*", true
		}
	case *pgquery.Node_DeallocateStmt:
		p.quiet = true
		p.forgets = n.DeallocateStmt.GetName()
		if n.DeallocateStmt.GetIsall() {
			p.forgets = "*"
		}
	case *pgquery.Node_PrepareStmt:
		p.quiet, p.prepares, p.data = false, n.PrepareStmt.GetName(), true
		inside = append(inside, inner{node: n.PrepareStmt.GetQuery()})
	case *pgquery.Node_ExecuteStmt:
		p.quiet, p.executes, p.data = false, n.ExecuteStmt.GetName(), true
		if params := n.ExecuteStmt.GetParams(); len(params) > 0 {
			inside = append(inside, inner{node: selectOf(params)})
		}
	case *pgquery.Node_DeclareCursorStmt:
		p.quiet, p.data, p.declares = false, true, n.DeclareCursorStmt.GetPortalname()
		inside = append(inside, inner{node: n.DeclareCursorStmt.GetQuery()})
	case *pgquery.Node_FetchStmt:
		p.quiet, p.fetches = false, n.FetchStmt.GetPortalname()
	case *pgquery.Node_ClosePortalStmt:
		p.quiet = true
	case *pgquery.Node_ConstraintsSetStmt:
		p.quiet = true
	case *pgquery.Node_LockStmt:
		return classifyLock(n.LockStmt, v)
	case *pgquery.Node_UnlistenStmt:
		p.quiet = true
	case *pgquery.Node_ListenStmt:
		if !v.readWrite || v.masked {
			refusal = refuse(stateDenied, "LISTEN is refused: what other sessions send is no result that the log could tell of")
		}
	case *pgquery.Node_NotifyStmt:
		if !v.readWrite {
			refusal = refuse(stateReadOnly, "NOTIFY is refused: the data source is read-only")
		} else if v.narrowed {
			refusal = refuse(stateDenied, "NOTIFY is refused: the data source limits what may be written")
		}
		p.write = true
	case *pgquery.Node_CopyStmt:
		return classifyCopy(n.CopyStmt, v)
	case *pgquery.Node_ExplainStmt:
		p.explains = true // by ourselves: what is sent tells its plan
		if p.quiet = true; !v.plans {
			refusal = plansOff()
		}
	case *pgquery.Node_LoadStmt, *pgquery.Node_AlterSystemStmt:
		refusal = refuse(stateDenied, "this statement changes the server itself and is refused")
	default:
		p.quiet, p.data = false, true
		inside = append(inside, inner{node: node})
	}
	return p, inside, refusal
}

// classifySelect takes the well-known SELECT set_config(...) for the SET that it is,
// and leaves the rest of that query, like every other one, to the policy.
func classifySelect(node *pgquery.Node, s *pgquery.SelectStmt, v view) (part, []inner, *Refusal) {
	p := part{data: true}
	if len(s.GetTargetList()) != 1 || s.GetOp() != pgquery.SetOperation_SETOP_NONE {
		return p, []inner{{node: node}}, nil
	}
	target := s.TargetList[0].GetResTarget()
	if call := target.GetVal().GetFuncCall(); catalogFunction(call, "pg_advisory_unlock_all", v) && plainCall(call, 0) {
		// Pools end with it: it gives up what this session alone can hold.
		target.Val = pgquery.MakeAConstStrNode("", target.GetLocation())
		p.quiet = !v.readWrite
		return p, []inner{{node: node}}, nil
	}
	name, value, ok := setConfig(target.GetVal().GetFuncCall(), s.GetWhereClause(), v)
	if !ok {
		return p, []inner{{node: node}}, nil
	}
	if reason := checkSetting(name, &value, v.readWrite); reason != "" {
		return p, nil, refuse(stateDenied, "set_config: %s", reason)
	}
	p.path = strings.EqualFold(name, "search_path")
	// What is left: the same with a constant.
	target.Val = pgquery.MakeAConstStrNode(value, target.GetLocation())
	return p, []inner{{node: node}}, nil
}

// setConfig reads set_config('name', 'value', bool) of constants; the name may also be
// a column that the statement's WHERE holds to a constant, as pg_dump has it:
// SELECT set_config(name, ...) FROM pg_settings WHERE name = '...'.
func setConfig(call *pgquery.FuncCall, where *pgquery.Node, v view) (name, value string, ok bool) {
	if !catalogFunction(call, "set_config", v) || !plainCall(call, 3) {
		return "", "", false
	}
	var texts [2]string
	for i := range texts {
		c := call.Args[i].GetAConst()
		if i == 0 && c == nil && !v.pathNamesCatalog {
			c = heldTo(where, call.Args[0].GetColumnRef())
		}
		s, isText := c.GetVal().(*pgquery.A_Const_Sval)
		if c == nil || c.GetIsnull() || !isText {
			return "", "", false
		}
		texts[i] = s.Sval.GetSval()
	}
	if _, isBool := call.Args[2].GetAConst().GetVal().(*pgquery.A_Const_Boolval); !isBool {
		return "", "", false
	}
	return texts[0], texts[1], true
}

// catalogFunction tells whether a call is of pg_catalog's function of this name.
func catalogFunction(call *pgquery.FuncCall, name string, v view) bool {
	names := call.GetFuncname()
	switch len(names) {
	case 1:
		return !v.pathNamesCatalog && names[0].GetString_().GetSval() == name
	case 2:
		return names[0].GetString_().GetSval() == "pg_catalog" && names[1].GetString_().GetSval() == name
	}
	return false
}

// plainCall tells whether a call has so many arguments and nothing else.
func plainCall(call *pgquery.FuncCall, arguments int) bool {
	return len(call.GetArgs()) == arguments && call.GetAggFilter() == nil && call.GetOver() == nil && len(call.GetAggOrder()) == 0 &&
		!call.GetAggStar() && !call.GetAggDistinct() && !call.GetFuncVariadic() && !call.GetAggWithinGroup()
}

// heldTo is the constant that a condition, column = constant and nothing else, holds a
// column to; nil if it is none.
func heldTo(where *pgquery.Node, column *pgquery.ColumnRef) *pgquery.A_Const {
	e := where.GetAExpr()
	if column == nil || e.GetKind() != pgquery.A_Expr_Kind_AEXPR_OP || len(e.GetName()) != 1 || e.Name[0].GetString_().GetSval() != "=" {
		return nil
	}
	left := e.GetLexpr().GetColumnRef().GetFields()
	if len(left) != 1 || len(column.GetFields()) != 1 || left[0].GetString_().GetSval() == "" || left[0].GetString_().GetSval() != column.Fields[0].GetString_().GetSval() {
		return nil
	}
	return e.GetRexpr().GetAConst()
}

func classifyTransaction(t *pgquery.TransactionStmt, v view) *Refusal {
	switch t.GetKind() {
	case pgquery.TransactionStmtKind_TRANS_STMT_PREPARE, pgquery.TransactionStmtKind_TRANS_STMT_COMMIT_PREPARED,
		pgquery.TransactionStmtKind_TRANS_STMT_ROLLBACK_PREPARED:
		return refuse(stateUnsupported, "two-phase transactions are refused: they would outlive the session")
	case pgquery.TransactionStmtKind_TRANS_STMT_BEGIN, pgquery.TransactionStmtKind_TRANS_STMT_START:
		_, refusal := transactionModes(t.GetOptions(), v)
		return refusal
	case pgquery.TransactionStmtKind_TRANS_STMT_COMMIT, pgquery.TransactionStmtKind_TRANS_STMT_ROLLBACK, pgquery.TransactionStmtKind_TRANS_STMT_SAVEPOINT,
		pgquery.TransactionStmtKind_TRANS_STMT_RELEASE, pgquery.TransactionStmtKind_TRANS_STMT_ROLLBACK_TO:
		return nil
	}
	return refuse(stateDenied, "this statement is not understood and is refused")
}

// transactionModes reads the modes of BEGIN or SET TRANSACTION, as SQL of our own
// that leaves out only READ ONLY.
func transactionModes(options []*pgquery.Node, v view) (string, *Refusal) {
	var sql strings.Builder
	for _, o := range options {
		e := o.GetDefElem()
		c := e.GetArg().GetAConst()
		on := c.GetIval().GetIval() != 0
		switch e.GetDefname() {
		case "transaction_read_only":
			if !on && !v.readWrite {
				return "", &Refusal{SQLState: stateReadOnly, Message: "READ WRITE is refused: the data source is read-only", Position: 0}
			}
			if v.readWrite && on {
				sql.WriteString(" READ ONLY")
			} else if v.readWrite {
				sql.WriteString(" READ WRITE")
			}
		case "transaction_deferrable":
			if on {
				sql.WriteString(" DEFERRABLE")
			} else {
				sql.WriteString(" NOT DEFERRABLE")
			}
		case "transaction_isolation":
			level := strings.ToUpper(c.GetSval().GetSval())
			switch level {
			case "SERIALIZABLE", "REPEATABLE READ", "READ COMMITTED", "READ UNCOMMITTED":
				sql.WriteString(" ISOLATION LEVEL " + level)
			default:
				return "", refuse(stateValue, "the isolation level %q is none", clip(level, 64))
			}
		default:
			return "", refuse(stateDenied, "the transaction mode %q is not understood and is refused", clip(e.GetDefname(), 64))
		}
	}
	return sql.String(), nil
}

// classifySet decides on SET and RESET; path tells whether names may mean something
// else afterwards.
func classifySet(s *pgquery.VariableSetStmt, v view) (path bool, _ *Refusal) {
	name := strings.ToLower(s.GetName())
	switch s.GetKind() {
	case pgquery.VariableSetKind_VAR_RESET_ALL:
		return true, nil
	case pgquery.VariableSetKind_VAR_SET_MULTI:
		switch s.GetName() {
		case "TRANSACTION", "SESSION CHARACTERISTICS":
			_, refusal := transactionModes(s.GetArgs(), v)
			return false, refusal
		case "TRANSACTION SNAPSHOT":
			return false, nil // of another session's moment; it reads as much and no more
		}
	case pgquery.VariableSetKind_VAR_SET_DEFAULT, pgquery.VariableSetKind_VAR_RESET:
		if reason := checkSetting(name, nil, v.readWrite); reason != "" {
			return false, refuse(stateDenied, "%s", reason)
		}
		return name == "search_path", nil
	case pgquery.VariableSetKind_VAR_SET_VALUE:
		value := setValue(s.GetArgs())
		if reason := checkSetting(name, &value, v.readWrite); reason != "" {
			return false, refuse(stateDenied, "SET %s: %s", clip(name, 64), reason)
		}
		return name == "search_path", nil
	}
	return false, refuse(stateDenied, "this form of SET is not understood and is refused")
}

// setValue is a SET's value as text; of a list the items, with commas.
func setValue(args []*pgquery.Node) string {
	var items []string
	for _, a := range args {
		switch v := a.GetAConst().GetVal().(type) {
		case *pgquery.A_Const_Sval:
			items = append(items, v.Sval.GetSval())
		case *pgquery.A_Const_Ival:
			items = append(items, strconv.Itoa(int(v.Ival.GetIval())))
		case *pgquery.A_Const_Fval:
			items = append(items, v.Fval.GetFval())
		case *pgquery.A_Const_Boolval:
			items = append(items, strconv.FormatBool(v.Boolval.GetBoolval()))
		default:
			items = append(items, "?") // SET TIME ZONE INTERVAL '1' HOUR
		}
	}
	return strings.Join(items, ",")
}

// hiddenSettings hold secrets or commands; SHOW ALL shows them with the rest.
var hiddenSettings = map[string]bool{
	"all": true, "primary_conninfo": true, "archive_command": true, "restore_command": true, "archive_cleanup_command": true,
	"recovery_end_command": true, "ssl_passphrase_command": true, "krb_server_keyfile": true,
}

func classifyShow(name string, v view) *Refusal {
	name = strings.ToLower(name)
	if hiddenSettings[name] || pgverb.Secret(name) || v.metadata && strings.Contains(name, ".") {
		return refuse(stateDenied, "SHOW %s is refused: it may show what is not for this session", clip(name, 64))
	}
	return nil
}

// accessShare is LockStmt's weakest mode.
const accessShare = 1

func classifyLock(l *pgquery.LockStmt, v view) (part, []inner, *Refusal) {
	if !v.readWrite && l.GetMode() != accessShare {
		return part{}, nil, refuse(stateReadOnly, "LOCK TABLE is refused but in ACCESS SHARE MODE: the data source is read-only")
	}
	if v.narrowed && l.GetMode() != accessShare {
		return part{}, nil, refuse(stateDenied, "LOCK TABLE is refused but in ACCESS SHARE MODE: the data source limits what may be written")
	}
	if v.metadata {
		return part{}, nil, refuse(stateDenied, "LOCK TABLE is refused: the data source shows metadata only")
	}
	return part{quiet: !v.readWrite}, nil, nil
}

// classifyCopy decides on COPY. What is read or written is for the policy, as the
// SELECT or INSERT that it amounts to.
func classifyCopy(c *pgquery.CopyStmt, v view) (part, []inner, *Refusal) {
	p := part{data: true}
	switch {
	case c.GetIsProgram():
		return p, nil, refuse(stateDenied, "COPY with a program is refused: it would run on the database's server")
	case c.GetFilename() != "":
		return p, nil, refuse(stateDenied, "COPY with a file is refused: it would be the database server's: use STDIN or STDOUT")
	case v.masked:
		return p, nil, refuse(stateUnsupported, "COPY is refused: the data source has masks, which it would go around: use SELECT")
	case v.metadata:
		p.describeOnly = refuse(stateDenied, "COPY is refused: the data source shows metadata only")
	case c.GetIsFrom():
		if !v.readWrite {
			return p, nil, refuse(stateReadOnly, "COPY FROM is refused: the data source is read-only")
		}
		p.write = true
		insert := &pgquery.InsertStmt{Relation: c.GetRelation(), Override: pgquery.OverridingKind_OVERRIDING_NOT_SET}
		for _, column := range c.GetAttlist() {
			insert.Cols = append(insert.Cols, pgquery.MakeResTargetNodeWithName(column.GetString_().GetSval(), c.GetRelation().GetLocation()))
		}
		inside := []inner{{node: &pgquery.Node{Node: &pgquery.Node_InsertStmt{InsertStmt: insert}}}}
		if c.GetWhereClause() != nil {
			inside = append(inside, inner{node: selectFrom(c.GetRelation(), c.GetWhereClause())})
		}
		return p, inside, nil
	}
	if c.GetQuery() != nil {
		return p, []inner{{node: c.GetQuery()}}, nil
	}
	return p, []inner{{node: selectFrom(c.GetRelation(), nil)}}, nil
}

// selectFrom is SELECT * FROM a table.
func selectFrom(table *pgquery.RangeVar, where *pgquery.Node) *pgquery.Node {
	star := pgquery.MakeColumnRefNode([]*pgquery.Node{pgquery.MakeAStarNode()}, table.GetLocation())
	return &pgquery.Node{Node: &pgquery.Node_SelectStmt{SelectStmt: &pgquery.SelectStmt{
		TargetList:  []*pgquery.Node{pgquery.MakeResTargetNodeWithVal(star, table.GetLocation())},
		FromClause:  []*pgquery.Node{{Node: &pgquery.Node_RangeVar{RangeVar: table}}},
		WhereClause: where,
		LimitOption: pgquery.LimitOption_LIMIT_OPTION_DEFAULT, Op: pgquery.SetOperation_SETOP_NONE,
	}}}
}

// selectOf is a SELECT of expressions.
func selectOf(expressions []*pgquery.Node) *pgquery.Node {
	s := &pgquery.SelectStmt{LimitOption: pgquery.LimitOption_LIMIT_OPTION_DEFAULT, Op: pgquery.SetOperation_SETOP_NONE}
	for _, e := range expressions {
		s.TargetList = append(s.TargetList, pgquery.MakeResTargetNodeWithVal(e, 0))
	}
	return &pgquery.Node{Node: &pgquery.Node_SelectStmt{SelectStmt: s}}
}

// treeOf is a tree with one statement.
func treeOf(node *pgquery.Node, of *pgquery.RawStmt) *pgtree.Tree {
	return &pgtree.Tree{Stmts: []*pgquery.RawStmt{{Stmt: node, StmtLocation: of.GetStmtLocation(), StmtLen: of.GetStmtLen()}}}
}
