package sqlsession_test

import (
	"context"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/prototext"
	gproto "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// catalogDatabase has an object of every kind, and canaries in what must not be told.
func catalogDatabase(t testing.TB, name string) {
	t.Helper()
	ctx := context.Background()
	if err := server.CreateDatabase(ctx, name, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.SQL(context.Background(), "DROP DATABASE "+name+" WITH (FORCE)"); err != nil {
			t.Error(err)
		}
	})
	if err := server.SQLIn(ctx, name,
		`CREATE SCHEMA shop`, `COMMENT ON SCHEMA shop IS 'what we sell'`,
		`CREATE SCHEMA canary_schema`,
		`CREATE SCHEMA norights`,
		`CREATE TYPE shop.mood AS ENUM ('so so', 'good')`, `ALTER TYPE shop.mood ADD VALUE 'bad' BEFORE 'good'`, `COMMENT ON TYPE shop.mood IS 'how one feels'`,
		`CREATE TYPE canary_schema.canary_type AS (a int)`, `CREATE TYPE canary_schema.canary_enum AS ENUM ('canary_label')`,
		`CREATE TYPE shop.place AS (street text, points numeric(4,1)[], secret canary_schema.canary_type, mood shop.mood)`,
		`CREATE DOMAIN shop.price AS numeric(10,2) NOT NULL DEFAULT 42424242 CONSTRAINT canary_check CHECK (VALUE < 42424242)`, `CREATE DOMAIN shop.masked AS canary_schema.canary_enum`,
		`CREATE TYPE shop.hours AS RANGE (subtype = time)`, `CREATE TYPE shop.ungranted AS ENUM ('canary_ungranted')`, `REVOKE ALL ON TYPE shop.ungranted FROM PUBLIC`,
		`CREATE SEQUENCE shop.numbers AS integer START 42424242`, `COMMENT ON SEQUENCE shop.numbers IS 'of invoices'`, `CREATE SEQUENCE shop.canary_sequence`,
		`CREATE TABLE canary_schema.vault (id int PRIMARY KEY)`,
		`CREATE TABLE norights.unseen (id int PRIMARY KEY)`,
		`CREATE TABLE shop.canary_table (id int PRIMARY KEY)`,
		`CREATE TABLE shop.customers (
			id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
			email varchar(80) NOT NULL UNIQUE,
			mood shop.mood DEFAULT 'so so',
			doubled int GENERATED ALWAYS AS (42424242 * 2) STORED,
			price numeric(10,2)[] DEFAULT '{1.5}',
			secret canary_schema.canary_type[],
			CONSTRAINT price_check CHECK (cardinality(price) < 42424242))`,
		`COMMENT ON TABLE shop.customers IS 'who buys'`,
		`COMMENT ON COLUMN shop.customers.email IS 'where to write'`,
		`CREATE INDEX by_email ON shop.customers (lower(email || 'canary_literal'), id) INCLUDE (mood) WHERE email <> 'canary_literal'`,
		`CREATE TABLE shop.orders (
			id int, customer bigint REFERENCES shop.customers, vault int REFERENCES canary_schema.vault, hidden int, unseen int REFERENCES norights.unseen,
			CONSTRAINT canary_constraint FOREIGN KEY (hidden) REFERENCES shop.canary_table,
			EXCLUDE USING btree (id WITH =))`,
		`INSERT INTO shop.orders (id) SELECT generate_series(1, 12345)`,
		`CREATE TABLE shop.events (at date NOT NULL, what text) PARTITION BY RANGE (at)`,
		`CREATE TABLE shop.events_2026 PARTITION OF shop.events FOR VALUES FROM ('2026-01-01') TO ('2027-01-01')`,
		`CREATE VIEW shop.recent AS SELECT id, 'canary_literal'::text AS note FROM shop.orders`,
		`CREATE MATERIALIZED VIEW shop.totals AS SELECT count(*) AS n FROM shop.orders`,
		`CREATE FOREIGN DATA WRAPPER nothing`,
		`CREATE SERVER elsewhere FOREIGN DATA WRAPPER nothing OPTIONS (host 'canary_host')`,
		`CREATE FOREIGN TABLE shop.far (a int) SERVER elsewhere OPTIONS (t 'canary_option')`,
		`CREATE FUNCTION shop.add(a int, b int DEFAULT 42424242, OUT total int) LANGUAGE sql AS 'SELECT a + b -- canary_source'`,
		`CREATE FUNCTION shop.takes(x canary_schema.canary_type) RETURNS SETOF canary_schema.canary_type LANGUAGE sql AS 'SELECT x'`,
		`CREATE FUNCTION canary_schema.hidden_function() RETURNS int LANGUAGE sql AS 'SELECT 1'`,
		`CREATE PROCEDURE shop.tidy(VARIADIC names text[]) LANGUAGE sql AS ''`,
		`CREATE AGGREGATE shop.total(int) (SFUNC = int4pl, STYPE = int)`,
		`CREATE FUNCTION canary_schema.canary_trigger() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'`,
		`CREATE TRIGGER watch BEFORE INSERT ON shop.customers FOR EACH ROW WHEN (NEW.id = 42424242) EXECUTE FUNCTION canary_schema.canary_trigger('canary_argument')`,
		`CREATE TRIGGER "an other" AFTER UPDATE ON shop.customers FOR EACH STATEMENT EXECUTE FUNCTION canary_schema.canary_trigger()`,
		`CREATE TABLE shop.columns_only (seen int, canary_column int)`,
		`ANALYZE`,
		`GRANT USAGE ON SCHEMA shop, canary_schema TO reader`,
		`GRANT SELECT ON ALL TABLES IN SCHEMA shop, canary_schema, norights TO reader`,
		`GRANT SELECT ON ALL SEQUENCES IN SCHEMA shop TO reader`, `REVOKE ALL ON shop.canary_sequence FROM reader`,
		`REVOKE ALL ON shop.columns_only FROM reader`, `GRANT SELECT (seen) ON shop.columns_only TO reader`,
		`CREATE TABLE shop.canary_ungranted (a int)`,
	); err != nil {
		t.Fatal(err)
	}
}

func catalogSource(database string) sqlsession.Source {
	return sqlsession.Source{Name: "db", Engine: "postgres", DSN: server.DSN("reader", database), Password: password(readerPassword)}
}

// catalogOf reads a catalog as one page.
func catalogOf(t testing.TB, m *sqlsession.Manager, i sqlsession.Introspection) *posternv1.CatalogPage {
	t.Helper()
	all := &posternv1.CatalogPage{}
	if err := m.Introspect(t.Context(), i, func(page *posternv1.CatalogPage) error {
		if size := gproto.Size(page); size > 1<<20 {
			t.Errorf("a page of %d bytes", size)
		}
		gproto.Merge(all, page)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if !all.Complete {
		t.Fatal("the catalog is not complete")
	}
	return all
}

var hide = []string{"canary_schema", "*.canary_table"}

func TestIntrospect(t *testing.T) {
	catalogDatabase(t, "catalog")
	m := newManager(t, sqlsession.Config{}, catalogSource("catalog"))
	page := catalogOf(t, m, sqlsession.Introspection{Source: "db", Hide: hide})
	text := prototext.Format(page)
	for _, canary := range []string{"canary", "42424242", "84848484", "norights", "unseen_", "vault_"} {
		if strings.Contains(text, canary) {
			t.Errorf("%q is told: %s", canary, text)
		}
	}
	var lines []string
	for _, s := range page.Schemas {
		lines = append(lines, fmt.Sprintf("schema %s %q %d", s.Name, s.Comment, len(s.Fingerprint)))
	}
	for _, x := range page.Tables {
		lines = append(lines, describe(x))
	}
	for _, f := range page.Functions {
		line := fmt.Sprintf("%s %s.%s", f.Kind, f.Schema, f.Name)
		for _, a := range f.Arguments {
			line += fmt.Sprintf(" [%s %s %s]", a.Mode, a.Name, a.Type)
		}
		lines = append(lines, fmt.Sprintf("%s -> %s %v", line, f.Result, f.ReturnsSet))
	}
	for _, x := range page.Types {
		line := fmt.Sprintf("%s type %s.%s %q of %q %v", x.Kind, x.Schema, x.Name, x.Labels, x.Base, x.NotNull)
		for _, c := range x.Attributes {
			line += fmt.Sprintf(" [%s %s]", c.Name, c.Type)
		}
		lines = append(lines, line+" "+x.Comment)
	}
	for _, x := range page.Sequences {
		lines = append(lines, fmt.Sprintf("sequence %s.%s %s of %s.%s.%s %s", x.Schema, x.Name, x.Type, x.Owner.GetSchema(), x.Owner.GetName(), x.OwnerColumn, x.Comment))
	}
	const want = `schema public "standard public schema" 16
schema shop "what we sell" 16
table shop.columns_only rows=0 bytes=0; seen integer
table shop.customers rows=0 bytes=25000 (who buys); id bigint not null identity always; email character varying(80) not null (where to write); mood shop.mood default; doubled integer generated; price numeric(10,2)[] default; secret (hidden); primary customers_pkey [id]; unique customers_email_key [email]; check price_check [price]; index by_email btree [(expression) id] partial; index customers_email_key btree [email] unique; index customers_pkey btree [id] unique; trigger an other; trigger watch
partitioned table shop.events rows=0; at date not null; what text
table shop.events_2026 rows=0 bytes=0 of shop.events; at date not null; what text
foreign table shop.far; a integer
table shop.orders rows=12000 bytes=750000; id integer; customer bigint; vault integer; hidden integer; unseen integer; foreign  [hidden] hidden; foreign orders_customer_fkey [customer] -> shop.customers [id]; foreign  [unseen] hidden; foreign  [vault] hidden; exclusion orders_id_excl [id]; index orders_id_excl btree [id]
view shop.recent; id integer; note text
materialized view shop.totals rows=1 bytes=8200; n bigint
function shop.add [in a integer] [in b integer] [out total integer] -> integer false
function shop.hours [in  time without time zone] [in  time without time zone] -> shop.hours false
function shop.hours [in  time without time zone] [in  time without time zone] [in  text] -> shop.hours false
function shop.hours_multirange -> shop.hours_multirange false
function shop.hours_multirange [in  shop.hours] -> shop.hours_multirange false
function shop.hours_multirange [variadic  shop.hours[]] -> shop.hours_multirange false
function shop.takes [in x (hidden)] -> (hidden) true
procedure shop.tidy [variadic names text[]] ->  false
aggregate shop.total [in  integer] -> integer false
range type shop.hours [] of "time without time zone" false 
domain type shop.masked [] of "(hidden)" false 
enum type shop.mood ["so so" "bad" "good"] of "" false how one feels
composite type shop.place [] of "" false [street text] [points numeric(4,1)[]] [secret (hidden)] [mood shop.mood] 
domain type shop.price [] of "numeric(10,2)" true 
sequence shop.customers_id_seq bigint of shop.customers.id 
sequence shop.numbers integer of .. of invoices`
	if got := strings.Join(lines, "\n"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// TestIntrospectCoarsely looks at the estimates of a source that tells metadata alone.
func TestIntrospectCoarsely(t *testing.T) {
	catalogDatabase(t, "coarse")
	src := catalogSource("coarse")
	src.Guard.Mode = "metadata"
	m := newManager(t, sqlsession.Config{}, src)
	got := map[string]string{}
	for _, x := range catalogOf(t, m, sqlsession.Introspection{Source: "db", Hide: hide}).Tables {
		if x.Rows != nil && x.Bytes != nil {
			got[x.Name] = fmt.Sprint(*x.Rows, *x.Bytes)
		}
	}
	for name, want := range map[string]string{"orders": "10000 700000", "totals": "100 8000", "columns_only": "0 0"} {
		if got[name] != want {
			t.Errorf("%s: got %q, want %q", name, got[name], want)
		}
	}
}

func describe(x *posternv1.CatalogTable) string {
	line := fmt.Sprintf("%s %s.%s", x.Kind, x.Schema, x.Name)
	if x.Rows != nil {
		line += fmt.Sprintf(" rows=%d", *x.Rows)
	}
	if x.Bytes != nil {
		line += fmt.Sprintf(" bytes=%d", *x.Bytes)
	}
	if p := x.PartitionOf; p != nil {
		line += fmt.Sprintf(" of %s.%s", p.Schema, p.Name)
	}
	if x.Comment != "" {
		line += " (" + x.Comment + ")"
	}
	flag := func(set bool, text string) {
		if set {
			line += " " + text
		}
	}
	for _, c := range x.Columns {
		line += "; " + c.Name + " " + c.Type
		flag(c.NotNull, "not null")
		flag(c.HasDefault, "default")
		flag(c.Generated != "", c.Generated)
		flag(c.Comment != "", "("+c.Comment+")")
	}
	for _, k := range x.Keys {
		line += fmt.Sprintf("; %s %s %v", k.Kind, k.Name, k.Columns)
		if r := k.References; r != nil {
			line += fmt.Sprintf(" -> %s.%s %v", r.Schema, r.Name, k.ReferencedColumns)
		}
		flag(k.ReferencesHidden, "hidden")
	}
	for _, i := range x.Indexes {
		line += fmt.Sprintf("; index %s %s %v", i.Name, i.Method, i.Columns)
		flag(i.Unique, "unique")
		flag(i.Partial, "partial")
	}
	for _, g := range x.Triggers {
		line += "; trigger " + g
	}
	return line
}

// TestIntrospectChanges sees what changed, and only that.
func TestIntrospectChanges(t *testing.T) {
	catalogDatabase(t, "changes")
	if err := server.SQLIn(t.Context(), "changes", "CREATE SCHEMA other", "CREATE TABLE other.a (x int)",
		"GRANT USAGE ON SCHEMA other TO reader", "GRANT SELECT ON other.a TO reader"); err != nil {
		t.Fatal(err)
	}
	m := newManager(t, sqlsession.Config{}, catalogSource("changes"))
	first := catalogOf(t, m, sqlsession.Introspection{Source: "db"})
	again := catalogOf(t, m, sqlsession.Introspection{Source: "db", Known: first.Schemas})
	if len(again.Tables)+len(again.Functions) != 0 || !gproto.Equal(&posternv1.CatalogPage{Schemas: again.Schemas}, &posternv1.CatalogPage{Schemas: first.Schemas}) {
		t.Errorf("nothing changed, and we get %d tables, %d functions", len(again.Tables), len(again.Functions))
	}
	for _, change := range []string{
		"ALTER TABLE other.a ADD COLUMN y text", "COMMENT ON COLUMN other.a.y IS 'new'", "CREATE UNIQUE INDEX ON other.a (y)", "ALTER TABLE other.a RENAME TO b",
		"CREATE TYPE other.e AS ENUM ('a')", "ALTER TYPE other.e ADD VALUE 'b'", "DO $$ BEGIN CREATE SEQUENCE other.s; GRANT SELECT ON other.s TO reader; END $$", "ALTER SEQUENCE other.s OWNED BY other.b.x",
		"CREATE FUNCTION other.f() RETURNS int LANGUAGE sql AS 'SELECT 1'", "COMMENT ON SCHEMA other IS 'x'", "DROP TABLE other.b",
	} {
		if err := server.SQLIn(t.Context(), "changes", change); err != nil {
			t.Fatal(err)
		}
		again := catalogOf(t, m, sqlsession.Introspection{Source: "db", Known: first.Schemas})
		changed := 0
		for i, s := range again.Schemas {
			if string(s.Fingerprint) != string(first.Schemas[i].Fingerprint) {
				changed++
				if s.Name != "other" {
					t.Errorf("%s: schema %s changed", change, s.Name)
				}
			}
		}
		for _, x := range again.Tables {
			if x.Schema != "other" {
				t.Errorf("%s: %s.%s is sent", change, x.Schema, x.Name)
			}
		}
		if changed != 1 {
			t.Errorf("%s: %d schemas changed", change, changed)
		}
		first = again
	}
}

func TestIntrospectMany(t *testing.T) {
	catalogDatabase(t, "many")
	if err := server.SQLIn(t.Context(), "many",
		`DO $$ BEGIN FOR i IN 1..2000 LOOP EXECUTE format('CREATE TABLE shop.t%s (id int PRIMARY KEY, a text, b numeric)', i); END LOOP; END $$`,
		`DO $$ DECLARE list text; BEGIN SELECT string_agg(format('column_with_a_rather_long_name_%s_of_the_widest_table text', i), ',') INTO list FROM generate_series(1, 1500) i;
			EXECUTE 'CREATE TABLE shop.wide (' || list || ')';
			FOR i IN 1..1000 LOOP EXECUTE format('COMMENT ON COLUMN shop.wide.column_with_a_rather_long_name_%s_of_the_widest_table IS %L', i, repeat('c', 2000)); END LOOP; END $$`,
		`GRANT SELECT ON ALL TABLES IN SCHEMA shop TO reader`,
	); err != nil {
		t.Fatal(err)
	}
	m := newManager(t, sqlsession.Config{}, catalogSource("many"))
	began := time.Now()
	pages, tables, columns := 0, 0, 0
	if err := m.Introspect(t.Context(), sqlsession.Introspection{Source: "db"}, func(page *posternv1.CatalogPage) error {
		pages++
		tables += len(page.Tables)
		for _, x := range page.Tables {
			columns += len(x.Columns)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d tables, %d columns on %d pages in %s", tables, columns, pages, time.Since(began))
	if tables < 2010 || columns < 7500 || pages < 4 {
		t.Errorf("%d tables, %d columns on %d pages", tables, columns, pages)
	}
}

func TestIntrospectErrors(t *testing.T) {
	catalogDatabase(t, "errs")
	wrong := catalogSource("errs")
	wrong.Name, wrong.Password = "wrong", password("nope")
	quick := catalogSource("errs")
	quick.Name, quick.StatementTimeout = "quick", time.Millisecond
	m := newManager(t, sqlsession.Config{Warm: -1}, catalogSource("errs"), wrong, quick)
	none := func(*posternv1.CatalogPage) error { return nil }
	for source, want := range map[string]proto.Code{"nobody": proto.CodeNotFound, "wrong": proto.CodeSourceCredentials, "quick": proto.CodeTimeout} {
		if err := m.Introspect(t.Context(), sqlsession.Introspection{Source: source}, none); proto.CodeOf(err) != want {
			t.Errorf("%s: got %v, want %v", source, err, want)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	err := m.Introspect(ctx, sqlsession.Introspection{Source: "db"}, func(*posternv1.CatalogPage) error { cancel(); return ctx.Err() })
	if proto.CodeOf(err) != proto.CodeCancelled {
		t.Errorf("cancelled: %v", err)
	}
	// A process that is killed on the way: the pages that it has sent do not count.
	if err := server.SQLIn(t.Context(), "errs", `DO $$ BEGIN FOR i IN 1..1000 LOOP EXECUTE format('CREATE TABLE shop.k%s (id int PRIMARY KEY, %s)', i,
		(SELECT string_agg(format('column_with_a_long_name_%s text', j), ',') FROM generate_series(1, 50) j)); END LOOP; END $$`,
		"GRANT SELECT ON ALL TABLES IN SCHEMA shop TO reader"); err != nil {
		t.Fatal(err)
	}
	killed, complete := false, false
	err = m.Introspect(t.Context(), sqlsession.Introspection{Source: "db"}, func(page *posternv1.CatalogPage) error {
		complete = complete || page.Complete
		if !killed {
			killed = true
			for _, pid := range sessionProcesses(os.Getpid()) {
				if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
					t.Error(err)
				}
			}
		}
		return nil
	})
	if proto.CodeOf(err) != proto.CodeSQLSessionDied || complete {
		t.Errorf("killed: %v, complete %v", err, complete)
	}
	// A table that somebody locks is no obstacle.
	conn, err := server.Connect(t.Context(), "errs")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(t.Context(), "BEGIN; LOCK shop.orders IN ACCESS EXCLUSIVE MODE"); err != nil {
		t.Fatal(err)
	}
	catalogOf(t, m, sqlsession.Introspection{Source: "db"})
	if err := conn.Close(t.Context()); err != nil {
		t.Error(err)
	}
	eventually(t, "no session is left", func() bool {
		return one(t, "SELECT count(*) FROM pg_stat_activity WHERE datname = 'errs' AND backend_type = 'client backend'") == "0"
	})
}
