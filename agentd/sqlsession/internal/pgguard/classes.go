package pgguard

import pgquery "github.com/pganalyze/pg_query_go/v6"

// statementKind is what is known of a kind of statement.
type statementKind struct {
	class Class
	// own: the node itself is no query, and may be met when only reading.
	own bool
	// refine tells the class of those that have several.
	refine func(*pgquery.Node) Class
}

// statements are all kinds that are known; others are refused.
var statements = func() map[string]statementKind {
	all := map[string]statementKind{
		"SelectStmt": {class: Select},
		"InsertStmt": {class: Insert}, "UpdateStmt": {class: Update}, "DeleteStmt": {class: Delete}, "MergeStmt": {class: Merge},
		"TruncateStmt": {class: Truncate}, "CallStmt": {class: Call}, "DoStmt": {class: Do},
		"VariableShowStmt": {class: Show, own: true}, "LockStmt": {class: Lock, own: true}, "NotifyStmt": {class: Notify}, "ExplainStmt": {class: Explain, own: true},
		"CopyStmt": {class: CopyOut, own: true, refine: func(n *pgquery.Node) Class {
			if c := n.GetCopyStmt(); c.IsFrom || c.IsProgram || c.Filename != "" {
				return CopyIn
			}
			return CopyOut
		}},
		"TransactionStmt": {class: Begin, own: true, refine: func(n *pgquery.Node) Class { return transactions[n.GetTransactionStmt().Kind] }},
		"VariableSetStmt": {class: Set, own: true, refine: func(n *pgquery.Node) Class {
			switch s := n.GetVariableSetStmt(); {
			case s.Kind == pgquery.VariableSetKind_VAR_SET_MULTI:
				return SetTx
			case s.Kind == pgquery.VariableSetKind_VAR_RESET || s.Kind == pgquery.VariableSetKind_VAR_RESET_ALL:
				return Reset
			}
			return Set
		}},
		"ConstraintsSetStmt": {class: SetTx, own: true},
		"PrepareStmt":        {class: Prepare, own: true}, "ExecuteStmt": {class: Execute, own: true}, "DeallocateStmt": {class: Deallocate, own: true},
		"DeclareCursorStmt": {class: Declare, own: true}, "FetchStmt": {class: Fetch, own: true}, "ClosePortalStmt": {class: Close, own: true},
		"ListenStmt": {class: Listen, own: true}, "UnlistenStmt": {class: Unlisten, own: true}, "DiscardStmt": {class: Discard, own: true},
	}
	for name := range set(`VacuumStmt ClusterStmt ReindexStmt RefreshMatViewStmt CheckPointStmt`) {
		all[name] = statementKind{class: Maintain}
	}
	for name := range set(`CreateSchemaStmt AlterTableStmt AlterCollationStmt AlterDomainStmt GrantStmt GrantRoleStmt AlterDefaultPrivilegesStmt
	 CreateStmt CreateTableSpaceStmt DropTableSpaceStmt AlterTableSpaceOptionsStmt AlterTableMoveAllStmt CreateExtensionStmt AlterExtensionStmt
	 AlterExtensionContentsStmt CreateFdwStmt AlterFdwStmt CreateForeignServerStmt AlterForeignServerStmt CreateForeignTableStmt CreateUserMappingStmt
	 AlterUserMappingStmt DropUserMappingStmt ImportForeignSchemaStmt CreatePolicyStmt AlterPolicyStmt CreateAmStmt CreateTrigStmt CreateEventTrigStmt
	 AlterEventTrigStmt CreatePLangStmt CreateRoleStmt AlterRoleStmt AlterRoleSetStmt DropRoleStmt CreateSeqStmt AlterSeqStmt DefineStmt CreateDomainStmt
	 CreateOpClassStmt CreateOpFamilyStmt AlterOpFamilyStmt DropStmt CommentStmt SecLabelStmt IndexStmt CreateStatsStmt AlterStatsStmt CreateFunctionStmt
	 AlterFunctionStmt RenameStmt AlterObjectDependsStmt AlterObjectSchemaStmt AlterOwnerStmt AlterOperatorStmt AlterTypeStmt RuleStmt CompositeTypeStmt
	 CreateEnumStmt CreateRangeStmt AlterEnumStmt ViewStmt CreatedbStmt AlterDatabaseStmt AlterDatabaseRefreshCollStmt AlterDatabaseSetStmt DropdbStmt
	 CreateTableAsStmt CreateConversionStmt CreateCastStmt CreateTransformStmt DropOwnedStmt ReassignOwnedStmt AlterTSDictionaryStmt AlterTSConfigurationStmt
	 CreatePublicationStmt AlterPublicationStmt CreateSubscriptionStmt AlterSubscriptionStmt DropSubscriptionStmt LoadStmt AlterSystemStmt`) {
		all[name] = statementKind{class: DDL}
	}
	return all
}()

var transactions = map[pgquery.TransactionStmtKind]Class{
	pgquery.TransactionStmtKind_TRANS_STMT_BEGIN:             Begin,
	pgquery.TransactionStmtKind_TRANS_STMT_START:             Begin,
	pgquery.TransactionStmtKind_TRANS_STMT_COMMIT:            Commit,
	pgquery.TransactionStmtKind_TRANS_STMT_ROLLBACK:          Rollback,
	pgquery.TransactionStmtKind_TRANS_STMT_SAVEPOINT:         Savepoint,
	pgquery.TransactionStmtKind_TRANS_STMT_RELEASE:           Release,
	pgquery.TransactionStmtKind_TRANS_STMT_ROLLBACK_TO:       RollbackTo,
	pgquery.TransactionStmtKind_TRANS_STMT_PREPARE:           Commit,
	pgquery.TransactionStmtKind_TRANS_STMT_COMMIT_PREPARED:   Commit,
	pgquery.TransactionStmtKind_TRANS_STMT_ROLLBACK_PREPARED: Rollback,
}
