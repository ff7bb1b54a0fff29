package pgguard

import (
	"fmt"
	"path"
	"slices"
	"strings"

	pgquery "github.com/pganalyze/pg_query_go/v6"
)

// trusted are the languages whose functions can do no more than SQL can. Others
// reach the server's files and processes.
var trusted = set(`sql plpgsql plperl pltcl plv8 pljs plcoffee plls pllua plrust`)

// write judges a statement of a read-write source by its tree.
func (c *checker) write(s *Statement, w *walker, at int) *Refusal {
	refuse := func(format string, args ...any) *Refusal {
		return &Refusal{Reason: fmt.Sprintf(format, args...), Position: at}
	}
	s.Changes = s.Class == DDL || s.Class == Set || s.Class == Reset || s.Class == Do || s.Class == Call || s.Class == Discard
	switch n := s.Node.Node.(type) {
	case *pgquery.Node_AlterSystemStmt:
		return refuse("ALTER SYSTEM is refused: it acts on the whole server")
	case *pgquery.Node_LoadStmt:
		return refuse("LOAD is refused: it runs code from a file of the server")
	case *pgquery.Node_CheckPointStmt:
		return refuse("CHECKPOINT is refused: it acts on the whole server")
	case *pgquery.Node_CreateTableSpaceStmt, *pgquery.Node_DropTableSpaceStmt, *pgquery.Node_AlterTableSpaceOptionsStmt:
		return refuse("tablespaces are refused: they are directories of the server")
	case *pgquery.Node_CreateSubscriptionStmt, *pgquery.Node_AlterSubscriptionStmt, *pgquery.Node_DropSubscriptionStmt:
		return refuse("subscriptions are refused: they connect the server to another one")
	case *pgquery.Node_CreateFdwStmt, *pgquery.Node_AlterFdwStmt, *pgquery.Node_CreateForeignServerStmt, *pgquery.Node_AlterForeignServerStmt,
		*pgquery.Node_CreateUserMappingStmt, *pgquery.Node_AlterUserMappingStmt, *pgquery.Node_ImportForeignSchemaStmt, *pgquery.Node_CreateForeignTableStmt:
		return refuse("foreign tables and servers are refused: they reach files, programs and other servers")
	case *pgquery.Node_CreatePlangStmt:
		return refuse("CREATE LANGUAGE is refused: it runs code from a file of the server")
	case *pgquery.Node_DoStmt:
		if language, ok := optionOf(n.DoStmt.Args, "language"); ok && !trusted[language] {
			return refuse("DO in the language %q is refused: it is not one of the trusted ones", language)
		}
	case *pgquery.Node_CreateFunctionStmt:
		if language, ok := optionOf(n.CreateFunctionStmt.Options, "language"); ok && !trusted[language] {
			return refuse("functions in the language %q are refused: it is not one of the trusted ones", language)
		}
	case *pgquery.Node_DefineStmt:
		// A base type's functions are C already; what it makes is only a name.
	}
	kind := ""
	switch s.Class {
	case Insert, Update, Delete, Merge: // w.writes has them
	case Select:
	case Truncate:
		kind = "truncate"
		for _, r := range s.Node.GetTruncateStmt().GetRelations() {
			w.writes = append(w.writes, write{"truncate", r.GetRangeVar()})
		}
	case Call:
		kind = "call"
	case DDL:
		kind = "ddl"
		s.Writes = true
	case Show, Begin, Commit, Rollback, Savepoint, Release, RollbackTo, SetTx, Set, Reset, Prepare, Execute, Deallocate, Declare, Fetch, Close, Listen, Unlisten, Discard, CopyOut, Explain:
	default:
		s.Writes = true
		if c.narrowed {
			return refuse("%s is refused: the policy's write does not allow it", strings.ToUpper(string(s.Class)))
		}
	}
	if kind == "call" {
		s.Writes = true
	}
	if !c.narrowed {
		return nil
	}
	if kind != "" {
		if refusal := c.kindAllowed(kind, at); refusal != nil {
			return refusal
		}
	}
	if s.Class == DDL && len(c.in.Guard.WriteSchemas) > 0 {
		if refusal := c.ddl(s.Node, w, at); refusal != nil {
			return refusal
		}
	}
	for _, target := range w.writes {
		where := at
		if target.relation != nil && target.relation.Location > 0 {
			where = int(target.relation.Location)
		}
		if refusal := c.kindAllowed(target.kind, where); refusal != nil {
			return refusal
		}
		if target.relation == nil {
			return &Refusal{Reason: "what it writes to is not understood", Position: where, Unknown: true}
		}
		w.relations = append(w.relations, use{Name: Name{target.relation.Schemaname, target.relation.Relname}, location: where})
		c.targets = append(c.targets, target)
	}
	return nil
}

func (c *checker) kindAllowed(kind string, at int) *Refusal {
	kinds := c.in.Guard.WriteStatements
	if len(kinds) == 0 || slices.Contains(kinds, kind) {
		return nil
	}
	return &Refusal{Reason: fmt.Sprintf("%s is refused: the policy's write.statements allow %s", strings.ToUpper(kind), strings.Join(kinds, ", ")), Position: at}
}

// optionOf is the text of an option of a list, in lower case.
func optionOf(options []*pgquery.Node, name string) (string, bool) {
	for _, o := range options {
		if d := o.GetDefElem(); d != nil && d.Defname == name {
			return strings.ToLower(d.Arg.GetString_().GetSval()), true
		}
	}
	return "", false
}

// ddl finds the schemas that a statement of DDL changes. Where they can't be
// told, it is refused.
func (c *checker) ddl(n *pgquery.Node, w *walker, at int) *Refusal {
	add := func(relations ...*pgquery.RangeVar) *Refusal {
		for _, r := range relations {
			if r == nil {
				return &Refusal{Reason: "which schema it changes is not understood", Position: at, Unknown: true}
			}
			w.writes = append(w.writes, write{"ddl", r})
		}
		return nil
	}
	named := func(names []*pgquery.Node) *Refusal {
		name, ok := nameOf(names)
		if !ok {
			return &Refusal{Reason: "which schema it changes is not understood", Position: at, Unknown: true}
		}
		return add(&pgquery.RangeVar{Schemaname: name.Schema, Relname: name.Name, Location: int32(at)})
	}
	switch s := n.Node.(type) {
	case *pgquery.Node_CreateStmt:
		if s.CreateStmt.Tablespacename != "" {
			return &Refusal{Reason: "TABLESPACE is refused: the policy's write.schemas limits what may be changed", Position: at}
		}
		// Parents and the tables of foreign keys are changed, too.
		for _, parent := range s.CreateStmt.InhRelations {
			if refusal := add(parent.GetRangeVar()); refusal != nil {
				return refusal
			}
		}
		for _, element := range s.CreateStmt.TableElts {
			if refusal := referred(element, add); refusal != nil {
				return refusal
			}
		}
		return add(s.CreateStmt.Relation)
	case *pgquery.Node_ViewStmt:
		return add(s.ViewStmt.View)
	case *pgquery.Node_CreateTableAsStmt:
		return add(s.CreateTableAsStmt.GetInto().GetRel())
	case *pgquery.Node_IndexStmt:
		return add(s.IndexStmt.Relation)
	case *pgquery.Node_CreateSeqStmt:
		return add(s.CreateSeqStmt.Sequence)
	case *pgquery.Node_AlterSeqStmt:
		return add(s.AlterSeqStmt.Sequence)
	case *pgquery.Node_AlterTableStmt:
		for _, cmd := range s.AlterTableStmt.Cmds {
			if refusal := c.alteration(cmd.GetAlterTableCmd(), at, add); refusal != nil {
				return refusal
			}
		}
		return add(s.AlterTableStmt.Relation)
	case *pgquery.Node_RenameStmt:
		if s.RenameStmt.Relation != nil {
			return add(s.RenameStmt.Relation)
		}
	case *pgquery.Node_CompositeTypeStmt:
		return add(s.CompositeTypeStmt.Typevar)
	case *pgquery.Node_CreateEnumStmt:
		return named(s.CreateEnumStmt.TypeName)
	case *pgquery.Node_CreateDomainStmt:
		return named(s.CreateDomainStmt.Domainname)
	case *pgquery.Node_CreateSchemaStmt:
		schema := s.CreateSchemaStmt.Schemaname
		if schema != "" && len(s.CreateSchemaStmt.SchemaElts) == 0 && c.schemaAllowed(schema) {
			return nil
		}
	case *pgquery.Node_DropStmt:
		switch s.DropStmt.RemoveType {
		case pgquery.ObjectType_OBJECT_TABLE, pgquery.ObjectType_OBJECT_VIEW, pgquery.ObjectType_OBJECT_MATVIEW, pgquery.ObjectType_OBJECT_INDEX, pgquery.ObjectType_OBJECT_SEQUENCE:
			if s.DropStmt.Behavior == pgquery.DropBehavior_DROP_CASCADE {
				return &Refusal{Reason: "CASCADE is refused: it may reach schemas that the policy's write.schemas don't allow", Position: at}
			}
			for _, object := range s.DropStmt.Objects {
				if refusal := named(object.GetList().GetItems()); refusal != nil {
					return refusal
				}
			}
			return nil
		}
	case *pgquery.Node_CommentStmt:
		items := s.CommentStmt.GetObject().GetList().GetItems()
		switch s.CommentStmt.Objtype {
		case pgquery.ObjectType_OBJECT_TABLE, pgquery.ObjectType_OBJECT_VIEW, pgquery.ObjectType_OBJECT_MATVIEW, pgquery.ObjectType_OBJECT_INDEX, pgquery.ObjectType_OBJECT_SEQUENCE:
			return named(items)
		case pgquery.ObjectType_OBJECT_COLUMN:
			if len(items) > 1 {
				return named(items[:len(items)-1])
			}
		}
	}
	return &Refusal{Reason: "it is refused: which schema it changes can't be told, and the policy's write.schemas limits them", Position: at}
}

func (c *checker) schemaAllowed(schema string) bool {
	return slices.ContainsFunc(c.in.Guard.WriteSchemas, func(pattern string) bool {
		ok, err := path.Match(pattern, schema)
		return err == nil && ok
	})
}

// schemas holds what is written to against write.schemas.
func (c *checker) schemas(catalog *Catalog) *Refusal {
	if len(c.in.Guard.WriteSchemas) == 0 {
		return nil
	}
	for _, target := range c.targets {
		r := target.relation
		schema := r.Schemaname
		if schema == "" {
			// What is there; else what is to be made, in the first schema of the
			// search path.
			schema = catalog.CurrentSchema
			if found, ok := catalog.Relations[Name{"", r.Relname}]; ok {
				schema = found.Schema
			}
			if r.Relpersistence == "t" {
				schema = "pg_temp"
			}
		}
		if found, ok := catalog.Relations[Name{r.Schemaname, r.Relname}]; ok && found.Beyond != "" && target.kind != "ddl" {
			return &Refusal{
				Reason:   fmt.Sprintf("%s.%s is %s, so writing to it may write elsewhere, and the policy's write.schemas allow %s alone", found.Schema, found.Name, found.Beyond, strings.Join(c.in.Guard.WriteSchemas, ", ")),
				Position: int(r.Location),
			}
		}
		if schema == "pg_temp" || c.schemaAllowed(schema) {
			continue
		}
		return &Refusal{
			Reason:   fmt.Sprintf("writing to schema %s is refused: the policy's write.schemas allow %s", schema, strings.Join(c.in.Guard.WriteSchemas, ", ")),
			Position: int(r.Location),
		}
	}
	return nil
}

// alteration looks at what one part of an ALTER TABLE changes beside the table.
func (c *checker) alteration(cmd *pgquery.AlterTableCmd, at int, add func(...*pgquery.RangeVar) *Refusal) *Refusal {
	switch cmd.GetSubtype() {
	case pgquery.AlterTableType_AT_ChangeOwner, pgquery.AlterTableType_AT_SetTableSpace:
		return &Refusal{Reason: "OWNER TO and SET TABLESPACE are refused: the policy's write.schemas limits what may be changed", Position: at}
	}
	switch def := cmd.GetDef().GetNode().(type) {
	case *pgquery.Node_RangeVar: // INHERIT, NO INHERIT
		return add(def.RangeVar)
	case *pgquery.Node_PartitionCmd: // ATTACH PARTITION, DETACH PARTITION
		return add(def.PartitionCmd.Name)
	}
	return referred(cmd.GetDef(), add)
}

// referred adds the tables that foreign keys of a column or a constraint refer to:
// they get triggers.
func referred(element *pgquery.Node, add func(...*pgquery.RangeVar) *Refusal) *Refusal {
	constraints := element.GetColumnDef().GetConstraints()
	if element.GetConstraint() != nil {
		constraints = append(constraints, element)
	}
	for _, n := range constraints {
		if table := n.GetConstraint().GetPktable(); table != nil {
			if refusal := add(table); refusal != nil {
				return refusal
			}
		}
	}
	return nil
}
