package child

import (
	"cmp"
	"context"
	"slices"
	"strconv"
	"strings"
	"time"

	gproto "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// The questions of introspection. information_schema tells an account no more than
// its rights let it see. Defaults, checks and sources are not asked for.
const (
	mysqlSystem = `('mysql', 'information_schema', 'performance_schema', 'sys')`

	mysqlTablesQuestion = `SELECT TABLE_SCHEMA, TABLE_NAME, TABLE_TYPE, TABLE_COMMENT, TABLE_ROWS, DATA_LENGTH + INDEX_LENGTH
 FROM information_schema.TABLES WHERE TABLE_SCHEMA = ?`

	mysqlNamesQuestion = `SELECT TABLE_SCHEMA, TABLE_NAME FROM information_schema.TABLES WHERE TABLE_SCHEMA NOT IN ` + mysqlSystem

	mysqlColumnsQuestion = `SELECT TABLE_NAME, COLUMN_NAME, COLUMN_TYPE, IS_NULLABLE, COLUMN_DEFAULT IS NOT NULL, EXTRA, COLUMN_COMMENT
 FROM information_schema.COLUMNS WHERE TABLE_SCHEMA = ? AND TABLE_NAME IN (?) ORDER BY TABLE_NAME, ORDINAL_POSITION`

	mysqlKeysQuestion = `SELECT TABLE_NAME, CONSTRAINT_NAME, CONSTRAINT_TYPE
 FROM information_schema.TABLE_CONSTRAINTS WHERE TABLE_SCHEMA = ? AND TABLE_NAME IN (?)`

	mysqlKeyColumnsQuestion = `SELECT TABLE_NAME, CONSTRAINT_NAME, COLUMN_NAME, REFERENCED_TABLE_SCHEMA, REFERENCED_TABLE_NAME, REFERENCED_COLUMN_NAME
 FROM information_schema.KEY_COLUMN_USAGE WHERE TABLE_SCHEMA = ? AND TABLE_NAME IN (?) ORDER BY TABLE_NAME, CONSTRAINT_NAME, ORDINAL_POSITION`

	mysqlIndexesQuestion = `SELECT TABLE_NAME, INDEX_NAME, NON_UNIQUE, COLUMN_NAME, INDEX_TYPE
 FROM information_schema.STATISTICS WHERE TABLE_SCHEMA = ? AND TABLE_NAME IN (?) ORDER BY TABLE_NAME, INDEX_NAME, SEQ_IN_INDEX`

	mysqlRoutinesQuestion = `SELECT ROUTINE_NAME, ROUTINE_TYPE, DTD_IDENTIFIER, ROUTINE_COMMENT
 FROM information_schema.ROUTINES WHERE ROUTINE_SCHEMA = ? ORDER BY ROUTINE_TYPE, ROUTINE_NAME`

	mysqlParametersQuestion = `SELECT ROUTINE_TYPE, SPECIFIC_NAME, PARAMETER_NAME, PARAMETER_MODE, DTD_IDENTIFIER
 FROM information_schema.PARAMETERS WHERE SPECIFIC_SCHEMA = ? AND ORDINAL_POSITION > 0 ORDER BY ROUTINE_TYPE, SPECIFIC_NAME, ORDINAL_POSITION`
)

// introspect is engine's. It keeps the names of all tables, and of one schema what is
// told of each table and routine but for columns, keys and indexes.
func (s *mysqlSession) introspect(r *frame.IntrospectRequest, st *statement) *proto.Error {
	limit := &frame.RunRequest{TimeoutMillis: r.TimeoutMillis}
	timer := time.AfterFunc(time.Duration(r.TimeoutMillis)*time.Millisecond, func() { st.stop(frame.TimedOut) })
	defer timer.Stop()
	// MariaDB prepares views to tell of them, and may call functions in them: what those
	// leave behind goes with the connection.
	s.spent = s.spent || s.mariadb
	c := &mysqlCatalog{mysqlSession: s, st: st, ctx: context.Background()}
	err := s.tell(c.ctx, "START TRANSACTION READ ONLY")
	if err == nil {
		err = pages(s.sink, r, c.walk)
	}
	switch {
	case err == nil:
		return nil
	case st.stopReason() != 0:
		return stopError(st.stopReason(), limit)
	case !isBroken(err):
		return proto.Errorf(proto.CodeSQL, "introspection failed: the database said: %s", clean(err.Error()))
	}
	return s.broken(err)
}

type mysqlCatalog struct {
	*mysqlSession
	st  *statement
	ctx context.Context
	// visible are the tables that the account can see, schema and name.
	visible map[[2]string]bool
}

func (c *mysqlCatalog) question(sql string, take func(row []string), args ...string) error {
	if c.st.isStopped() {
		return errStopped
	}
	return c.each(c.ctx, sql, args, func(row []string) error {
		for i := range row {
			row[i] = name(row[i])
		}
		take(row)
		return nil
	})
}

func (c *mysqlCatalog) walk(p *pager) error {
	c.visible = map[[2]string]bool{}
	err := c.question(mysqlNamesQuestion, func(row []string) { c.visible[[2]string{row[0], row[1]}] = true })
	if err != nil {
		return err
	}
	var schemas []string
	err = c.question("SELECT SCHEMA_NAME FROM information_schema.SCHEMATA WHERE SCHEMA_NAME NOT IN "+mysqlSystem, func(row []string) { schemas = append(schemas, row[0]) })
	if err != nil {
		return err
	}
	slices.Sort(schemas)
	for _, schema := range schemas {
		if !p.schema(schema) {
			continue
		}
		if err := c.tables(p, schema); err != nil {
			return err
		}
		if err := c.routines(p, schema); err != nil {
			return err
		}
	}
	return nil
}

var mysqlKinds = map[string]string{"BASE TABLE": "table", "VIEW": "view", "SYSTEM VIEW": "view", "SYSTEM VERSIONED": "table", "SEQUENCE": "table"}

func (c *mysqlCatalog) tables(p *pager, schema string) error {
	var tables []*posternv1.CatalogTable
	err := c.question(mysqlTablesQuestion, func(row []string) {
		kind, known := mysqlKinds[row[2]]
		if !known || p.hide.Object(row[0], row[1]) {
			return
		}
		t := &posternv1.CatalogTable{Schema: row[0], Name: row[1], Kind: kind}
		if kind != "view" {
			t.Comment = comment(row[3])
			if rows, err := strconv.ParseUint(row[4], 10, 64); err == nil {
				t.Rows = gproto.Uint64(p.roughly(rows))
			}
			if bytes, err := strconv.ParseUint(row[5], 10, 64); err == nil {
				t.Bytes = gproto.Uint64(p.roughly(bytes))
			}
		}
		tables = append(tables, t)
	}, schema)
	if err != nil {
		return err
	}
	slices.SortFunc(tables, func(a, b *posternv1.CatalogTable) int { return cmp.Compare(a.Name, b.Name) })
	for chunk := range slices.Chunk(tables, chunkTables) {
		if err := c.details(p, schema, chunk); err != nil {
			return err
		}
		for _, t := range chunk {
			p.table(t)
		}
	}
	return nil
}

// details asks for the columns, keys and indexes of tables.
func (c *mysqlCatalog) details(p *pager, schema string, tables []*posternv1.CatalogTable) error {
	of := map[string]*posternv1.CatalogTable{}
	args := []string{schema}
	for _, t := range tables {
		of[t.Name] = t
		args = append(args, t.Name)
	}
	ask := func(question string, take func(t *posternv1.CatalogTable, row []string)) error {
		marks := "(?" + strings.Repeat(",?", len(tables)-1) + ")"
		return c.question(strings.Replace(question, "(?)", marks, 1), func(row []string) {
			if t := of[row[0]]; t != nil {
				take(t, row[1:])
			}
		}, args...)
	}
	err := ask(mysqlColumnsQuestion, func(t *posternv1.CatalogTable, row []string) {
		column := &posternv1.CatalogColumn{
			Name: row[0], Type: frame.Clip(row[1], 4*maxComment), NotNull: row[2] == "NO", HasDefault: row[3] == "1", Comment: comment(row[5]),
		}
		switch extra := strings.ToUpper(row[4]); {
		case strings.Contains(extra, "AUTO_INCREMENT"):
			column.Generated = "identity"
		case strings.Contains(extra, "GENERATED") && !strings.Contains(extra, "DEFAULT_GENERATED"):
			column.Generated, column.HasDefault = "generated", false
		}
		t.Columns = append(t.Columns, column)
	})
	if err != nil {
		return err
	}
	keys := map[[2]string]*posternv1.CatalogKey{}
	kinds := map[string]string{"PRIMARY KEY": "primary", "UNIQUE": "unique", "FOREIGN KEY": "foreign", "CHECK": "check"}
	err = ask(mysqlKeysQuestion, func(t *posternv1.CatalogTable, row []string) {
		if kinds[row[1]] == "" {
			return
		}
		if len(t.Keys) >= maxKeys {
			t.Truncated = true
			return
		}
		k := &posternv1.CatalogKey{Name: row[0], Kind: kinds[row[1]]}
		keys[[2]string{t.Name, row[0]}] = k
		t.Keys = append(t.Keys, k)
	})
	if err != nil {
		return err
	}
	type target struct {
		schema, table string
		columns       []string
	}
	targets := map[*posternv1.CatalogKey]*target{}
	err = ask(mysqlKeyColumnsQuestion, func(t *posternv1.CatalogTable, row []string) {
		k := keys[[2]string{t.Name, row[0]}]
		if k == nil || len(k.Columns) >= maxKeyColumns {
			return
		}
		k.Columns = append(k.Columns, row[1])
		if row[3] != "" && k.Kind == "foreign" {
			if targets[k] == nil {
				targets[k] = &target{schema: row[2], table: row[3]}
			}
			targets[k].columns = append(targets[k].columns, row[4])
		}
	})
	if err != nil {
		return err
	}
	for k, to := range targets {
		p.foreign(k, to.schema, to.table, to.columns, c.visible[[2]string{to.schema, to.table}])
	}
	order := map[string]int{"primary": 0, "unique": 1, "foreign": 2, "check": 3}
	for _, t := range tables {
		for _, k := range t.Keys {
			if k.Kind == "foreign" && targets[k] == nil {
				k.Name, k.ReferencesHidden = "", true
			}
		}
		slices.SortStableFunc(t.Keys, func(a, b *posternv1.CatalogKey) int {
			return cmp.Or(cmp.Compare(order[a.Kind], order[b.Kind]), cmp.Compare(a.Name, b.Name), slices.Compare(a.Columns, b.Columns))
		})
	}
	return ask(mysqlIndexesQuestion, func(t *posternv1.CatalogTable, row []string) {
		column := row[2]
		if column == "" {
			column = "(expression)"
		}
		if n := len(t.Indexes); n > 0 && t.Indexes[n-1].Name == row[0] {
			t.Indexes[n-1].Columns = append(t.Indexes[n-1].Columns, column)
			return
		}
		if len(t.Indexes) >= maxIndexes {
			t.Truncated = true
			return
		}
		t.Indexes = append(t.Indexes, &posternv1.CatalogIndex{Name: row[0], Unique: row[1] == "0", Method: strings.ToLower(row[3]), Columns: []string{column}})
	})
}

func (c *mysqlCatalog) routines(p *pager, schema string) error {
	parameters := map[[2]string][]*posternv1.CatalogArgument{}
	err := c.question(mysqlParametersQuestion, func(row []string) {
		key := [2]string{row[0], row[1]}
		parameters[key] = append(parameters[key], &posternv1.CatalogArgument{Name: row[2], Mode: strings.ToLower(row[3]), Type: frame.Clip(row[4], 4*maxComment)})
	}, schema)
	if err != nil {
		return err
	}
	return c.question(mysqlRoutinesQuestion, func(row []string) {
		f := &posternv1.CatalogFunction{Schema: schema, Name: row[0], Kind: strings.ToLower(row[1]), Comment: comment(row[3])}
		if f.Kind != "function" && f.Kind != "procedure" {
			return
		}
		if f.Kind == "function" {
			f.Result = row[2]
		}
		f.Arguments = parameters[[2]string{row[1], row[0]}]
		for _, a := range f.Arguments {
			if a.Mode == "" {
				a.Mode = "in"
			}
		}
		p.function(f)
	}, schema)
}

func sortSchemas(schemas []*posternv1.CatalogSchema) {
	slices.SortFunc(schemas, func(a, b *posternv1.CatalogSchema) int { return cmp.Compare(a.Name, b.Name) })
}
