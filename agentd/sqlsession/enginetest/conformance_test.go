package enginetest

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func TestRows(t *testing.T) {
	each(t, func(t *testing.T, db *database) {
		m := db.open(t)
		got, outcome := query(t, m, request("SELECT id, name FROM things WHERE id < 3 ORDER BY id"))
		if want := [][]string{{"1", "thing 1"}, {"2", "thing 2"}}; !reflect.DeepEqual(got.rows, want) {
			t.Errorf("got %v, want %v", got.rows, want)
		}
		if outcome.Duration.AsDuration() <= 0 {
			t.Errorf("got %v, want a duration", outcome)
		}
		got, _ = query(t, m, request(db.series(200_000)))
		if len(got.rows) != 200_000 {
			t.Fatalf("got %d rows, want 200000", len(got.rows))
		}
		for i, row := range got.rows {
			if row[0] != fmt.Sprint(i+1) {
				t.Fatalf("row %d: got %s, want %d", i, row[0], i+1)
			}
		}
		got, outcome = query(t, m, request("SELECT id, name FROM things WHERE id < 0"))
		if outcome.Rows != 0 || got.schema == nil || got.schema.NumFields() != 2 || got.schema.Field(1).Name != "name" {
			t.Errorf("zero rows: got %v %v, want a schema of two columns", outcome, got.schema)
		}
		got, _ = query(t, m, request("SELECT 1 AS a, 2 AS a, NULL AS b, '' AS c, 'größe 𝄞 \U0001F600' AS d"))
		if want := []string{"1", "2", "(null)", "", "größe 𝄞 \U0001F600"}; !reflect.DeepEqual(got.rows[0], want) {
			t.Errorf("got %q, want %q", got.rows[0], want)
		}
	})
}

func TestWideAndLong(t *testing.T) {
	each(t, func(t *testing.T, db *database) {
		m := db.open(t)
		var columns []string
		for i := range 1000 {
			columns = append(columns, fmt.Sprintf("%d AS c%d", i, i))
		}
		got, _ := query(t, m, request("SELECT "+strings.Join(columns, ", ")))
		if len(got.rows) != 1 || got.rows[0][999] != "999" {
			t.Errorf("got %d rows, want one of 1000 columns", len(got.rows))
		}
		got, _ = query(t, m, request(db.text(20_000_000)))
		if len(got.rows[0][0]) != 20_000_000 {
			t.Errorf("got %d characters, want 20000000", len(got.rows[0][0]))
		}
	})
}

func TestParameters(t *testing.T) {
	each(t, func(t *testing.T, db *database) {
		m := db.open(t)
		nasty := "'; DROP TABLE things; -- {{id}} :id \\' \" ` $1 ?"
		tests := []struct {
			name string
			r    sqlsession.Request
			want []string
		}{
			{"braces", with("SELECT name FROM things WHERE id = {{id}}", map[string]string{"id": "2"}), []string{"thing 2"}},
			{"colon, twice", with("SELECT name FROM things WHERE id = :id OR id = :id", map[string]string{"id": "2"}), []string{"thing 2"}},
			{"two", with("SELECT name FROM things WHERE id > :a AND id < {{b}}", map[string]string{"a": "6", "b": "8"}), []string{"thing 7"}},
			{"NULL", with("SELECT COUNT(*) FROM things WHERE name = {{n}}", map[string]string{"n": "NULL"}), []string{"0"}},
			{"nasty", with("SELECT CAST({{n}} AS char(60))", map[string]string{"n": nasty}), []string{nasty}},
			{"not in a string", with("SELECT '{{id}} :id', name FROM things WHERE id = :id", map[string]string{"id": "3"}), []string{"{{id}} :id", "thing 3"}},
			{"not in a comment", with("SELECT /* :id {{x}} */ name -- :y\n FROM things WHERE id = :id", map[string]string{"id": "3"}), []string{"thing 3"}},
			{"list", with("SELECT COUNT(*) FROM things WHERE id IN ({{ids|list}})", map[string]string{"ids": "[1, 2, 5000]"}), []string{"2"}},
			{"empty list", with("SELECT COUNT(*) FROM things WHERE id IN ({{ids|list}})", map[string]string{"ids": "[]"}), []string{"0"}},
			{"not in an empty list", with("SELECT COUNT(*) FROM things WHERE id NOT IN ({{ids|list}})", map[string]string{"ids": "[]"}), []string{"1000"}},
			{"identifier", with("SELECT {{c|identifier}} FROM {{t|identifier}} WHERE id = 4", map[string]string{"c": "name", "t": "things"}), []string{"thing 4"}},
		}
		for _, test := range tests {
			t.Run(test.name, func(t *testing.T) {
				got, _ := query(t, m, test.r)
				if len(got.rows) != 1 || strings.TrimRight(strings.Join(got.rows[0], "|"), " ") != strings.Join(test.want, "|") {
					t.Errorf("got %q, want %q", got.rows, test.want)
				}
			})
		}
		refuse(t, m, request("SELECT name FROM things WHERE id = {{id}}"), proto.CodeInvalid)
		refuse(t, m, with("SELECT 1", map[string]string{"unused": "1"}), proto.CodeInvalid)
		native := map[string]string{"postgres": "$1", "mysql": "?", "sqlite": "?1"}[db.engine]
		refuse(t, m, request("SELECT "+native), proto.CodeInvalid)
		r := with("SELECT name FROM things WHERE id = {{id}}", map[string]string{"id": "2"})
		r.Parameters[0].Type = "int8"
		if got, _ := query(t, m, r); got.rows[0][0] != "thing 2" {
			t.Errorf("typed: got %v", got.rows)
		}
	})
}

func TestErrors(t *testing.T) {
	each(t, func(t *testing.T, db *database) {
		m := db.open(t)
		e := refuse(t, m, request("SELECT 'é', 1 +\n + FROM things"), proto.CodeSQL)
		if e.SQL == nil || e.SQL.Position != 20 || strings.Contains(e.Error(), "\n") {
			t.Errorf("got %v (position %d), want one line and position 20", e, e.SQL.GetPosition())
		}
		refuse(t, m, request("SELECT nothing FROM things"), proto.CodeSQL)
		refuse(t, m, request("SELECT 1 FROM nowhere"), proto.CodeSQL)
		for _, empty := range []string{"", "  \n", "-- nothing", "/* nothing */", ";"} {
			refuse(t, m, request(empty), proto.CodeInvalid)
		}
		// The session is as good as before.
		if got, _ := query(t, m, request("SELECT 1")); got.rows[0][0] != "1" {
			t.Errorf("got %v", got.rows)
		}
	})
}

func TestLimits(t *testing.T) {
	each(t, func(t *testing.T, db *database) {
		m := db.open(t)
		r := request(db.series(5_000_000))
		r.MaxRows = 1500
		got, outcome, err := try(t, m, r)
		if proto.CodeOf(err) != proto.CodeRowLimit || len(got.rows) != 1500 || outcome.Rows != 1500 {
			t.Errorf("got %d rows, %v, want 1500 and ROW_LIMIT", len(got.rows), err)
		}
		r = request(db.series(1500))
		r.MaxRows = 1500
		if got, _ := query(t, m, r); len(got.rows) != 1500 {
			t.Errorf("exactly the limit: got %d rows", len(got.rows))
		}
		r = request(db.series(5_000_000))
		r.MaxBytes = 100_000
		got, outcome, err = try(t, m, r)
		if proto.CodeOf(err) != proto.CodeByteLimit || len(got.rows) == 0 || outcome.Bytes > 100_000 || outcome.Bytes < 50_000 {
			t.Errorf("got %d rows, %v, %v, want BYTE_LIMIT within 100000 bytes", len(got.rows), outcome, err)
		}
		r = request(db.text(1_000_000))
		r.MaxBytes = 100_000
		if got, _, err := try(t, m, r); proto.CodeOf(err) != proto.CodeByteLimit || len(got.rows) != 0 {
			t.Errorf("one long value: got %d rows, %v", len(got.rows), err)
		}
		r = request(db.slow)
		r.Timeout = 300 * time.Millisecond
		refuse(t, m, r, proto.CodeTimeout)
		query(t, m, request("SELECT 1"))
	})
}

func TestCancel(t *testing.T) {
	each(t, func(t *testing.T, db *database) {
		m := db.open(t, func(s *sqlsession.Source) { s.MaxRows, s.MaxBytes = 1<<40, 1<<40 })
		for _, text := range []string{db.slow, db.series(500_000_000)} {
			r := request(text)
			started := time.Now()
			result := make(chan error, 1)
			reader, out := io.Pipe()
			go func() { _, _ = io.Copy(io.Discard, reader) }()
			go func() {
				_, err := m.Run(context.Background(), r, out)
				_ = out.Close()
				result <- err
			}()
			db.underWay(t, m, text)
			if !m.Cancel(r.QueryID) {
				t.Errorf("%s: there was nothing to cancel", text)
			}
			select {
			case err := <-result:
				if proto.CodeOf(err) != proto.CodeCancelled {
					t.Errorf("%s: got %v, want CANCELLED", text, err)
				}
			case <-time.After(50 * time.Second):
				t.Fatalf("%s: still running %s after its start", text, time.Since(started))
			}
			query(t, m, request("SELECT 1"))
		}
	})
}

// A reader who takes nothing must not keep the database busy once the statement is
// cancelled, and must hold no more memory than the buffers.
func TestSlowReader(t *testing.T) {
	each(t, func(t *testing.T, db *database) {
		m := db.open(t, func(s *sqlsession.Source) { s.MaxRows, s.MaxBytes = 1<<40, 1<<40 })
		r := request(db.series(20_000_000))
		result := make(chan error, 1)
		reader, out := io.Pipe()
		go func() {
			_, err := m.Run(context.Background(), r, out)
			_ = out.Close()
			result <- err
		}()
		first := make([]byte, 100)
		if _, err := io.ReadFull(reader, first); err != nil {
			t.Fatal(err)
		}
		time.Sleep(300 * time.Millisecond)
		m.Cancel(r.QueryID)
		time.Sleep(100 * time.Millisecond)
		go func() { _, _ = io.Copy(io.Discard, reader) }()
		if err := <-result; proto.CodeOf(err) != proto.CodeCancelled {
			t.Errorf("got %v, want CANCELLED", err)
		}
		query(t, m, request("SELECT 1"))
	})
}

func TestReadOnlyAndReadWrite(t *testing.T) {
	each(t, func(t *testing.T, db *database) {
		reader := db.open(t)
		for _, text := range []string{
			"INSERT INTO things VALUES (5001, 'x')", "UPDATE things SET name = 'x'", "DELETE FROM things", "DROP TABLE things",
			"CREATE TABLE other (a int)", "WITH t AS (SELECT 1) DELETE FROM things", "BEGIN", "COMMIT",
		} {
			if _, _, err := try(t, reader, request(text)); proto.CodeOf(err) != proto.CodePolicyDenied && proto.CodeOf(err) != proto.CodeSQL {
				t.Errorf("%s: got %v, want a refusal", text, err)
			}
		}
		r := request("INSERT INTO things VALUES (5001, 'x')")
		r.ReadWrite = true
		refuse(t, reader, r, proto.CodePolicyDenied)
		if got, _ := query(t, reader, request("SELECT COUNT(*) FROM things")); got.rows[0][0] != "1000" {
			t.Fatalf("got %v things, want 1000", got.rows)
		}
		m := db.open(t, readWrite)
		write := func(text string) sqlsession.Request {
			r := request(text)
			r.ReadWrite = true
			return r
		}
		_, outcome := query(t, m, write("INSERT INTO things VALUES (5001, 'x'), (5002, 'y')"))
		if !strings.HasSuffix(outcome.CommandTag, " 2") {
			t.Errorf("got tag %q, want one that ends in 2", outcome.CommandTag)
		}
		if got, _ := query(t, reader, request("SELECT COUNT(*) FROM things")); got.rows[0][0] != "1002" {
			t.Errorf("got %v things, want 1002", got.rows)
		}
		refuse(t, m, write("INSERT INTO things VALUES (5003, 'z'), (5001, 'again')"), proto.CodeSQL)
		refuse(t, m, write("INSERT INTO things VALUES (5004, 'z'); INSERT INTO things VALUES (5005, 'z')"), codeOfMany(db))
		query(t, m, write("DELETE FROM things WHERE id > 5000"))
		if got, _ := query(t, reader, request("SELECT COUNT(*) FROM things")); got.rows[0][0] != "1000" {
			t.Errorf("got %v things, want 1000", got.rows)
		}
		query(t, m, write("CREATE TABLE mine (a int)"))
		query(t, m, write("DROP TABLE mine"))
		for _, text := range []string{"BEGIN", "COMMIT", "ROLLBACK", "SAVEPOINT a"} {
			refuse(t, m, write(text), proto.CodePolicyDenied)
		}
	})
}

// codeOfMany is the code for a text with two statements on a source that may write.
func codeOfMany(db *database) proto.Code {
	if db.engine == "mysql" {
		return proto.CodeSQL
	}
	return proto.CodePolicyDenied
}

// In mode metadata a statement is described and not run.
func TestMetadata(t *testing.T) {
	each(t, func(t *testing.T, db *database) {
		m := db.open(t, metadata)
		got, outcome := query(t, m, request("SELECT id, name, id + 1 AS more FROM things WHERE name = {{name}} AND id > :least"))
		if len(got.rows) != 0 || outcome.CommandTag != "DESCRIBE" || got.schema.NumFields() != 3 {
			t.Fatalf("got %v (%v), want three columns and no row", got.schema, outcome)
		}
		for i, name := range []string{"id", "name", "more"} {
			if f := got.schema.Field(i); f.Name != name || !strings.HasPrefix(f.Type.String(), map[string]string{"name": "utf8"}[name]) {
				t.Errorf("got %v, want the column %s", f, name)
			}
		}
		var names []string
		for _, p := range outcome.Parameters {
			names = append(names, p.Name)
		}
		if want := []string{"name", "least"}; !reflect.DeepEqual(names, want) {
			t.Errorf("got parameters %v, want %v", names, want)
		}
		started := time.Now()
		query(t, m, request(db.slow))
		if took := time.Since(started); took > 30*time.Second {
			t.Errorf("a statement of a minute took %s to describe: it was run", took)
		}
		for _, text := range []string{"DROP TABLE things", "CREATE TABLE others (a int)", "EXPLAIN SELECT 1", "SELECT 1; SELECT 2", "BEGIN"} {
			if _, _, err := try(t, m, request(text)); proto.CodeOf(err) != proto.CodePolicyDenied {
				t.Errorf("%s: got %v, want a refusal", text, err)
			}
		}
		e := refuse(t, m, request("SELECT nope FROM things"), proto.CodeSQL)
		if !strings.Contains(e.Error(), "nope") {
			t.Errorf("got %v, want the name", e)
		}
		// The session goes on, and a source of another mode runs what this one describes.
		query(t, m, request("SELECT name FROM things"))
		got, _ = query(t, db.open(t), request("SELECT name FROM things WHERE id = 1"))
		if len(got.rows) != 1 {
			t.Errorf("got %v, want a row", got.rows)
		}
	})
}

func TestLostServer(t *testing.T) {
	each(t, func(t *testing.T, db *database) {
		if db.kick == nil {
			return // there is no server
		}
		m := db.open(t)
		query(t, m, request("SELECT 1"))
		if err := db.kick(); err != nil {
			t.Fatal(err)
		}
		// An idle session that was killed is replaced without anybody noticing.
		query(t, m, request("SELECT 1"))
		result := make(chan error, 1)
		go func() {
			_, err := m.Run(context.Background(), request(db.slow), io.Discard)
			result <- err
		}()
		db.underWay(t, m, db.slow)
		if err := db.kick(); err != nil {
			t.Fatal(err)
		}
		if err := <-result; proto.CodeOf(err) != proto.CodeSourceUnreachable && proto.CodeOf(err) != proto.CodeSQL {
			t.Errorf("killed under a statement: got %v", err)
		}
		query(t, m, request("SELECT 1"))
		if err := db.down(); err != nil {
			t.Fatal(err)
		}
		e := refuse(t, m, request("SELECT 1"), proto.CodeSourceUnreachable)
		if strings.Contains(e.Error(), "\n") {
			t.Errorf("got %q, want one line", e)
		}
		if err := db.up(); err != nil {
			t.Fatal(err)
		}
		query(t, m, request("SELECT 1"))
	})
}

func TestBadPassword(t *testing.T) {
	each(t, func(t *testing.T, db *database) {
		if db.kick == nil {
			return // there is no server
		}
		m := db.open(t, func(s *sqlsession.Source) { s.Password = login("marked-wrong-password") })
		e := refuse(t, m, request("SELECT 1"), proto.CodeSourceCredentials)
		if strings.Contains(e.Error(), "marked") || strings.Contains(e.Error(), "\n") {
			t.Errorf("got %q, want one line without the password", e)
		}
		checks := m.Check(t.Context(), "db")
		if last := checks[len(checks)-1]; last.Name != "credentials" || last.Result != "failed" || last.Remedy == "" {
			t.Errorf("check: got %v", checks)
		}
	})
}

func TestKept(t *testing.T) {
	each(t, func(t *testing.T, db *database) {
		m := db.open(t)
		var kept *posternv1.KeptRows
		r := request(db.series(10_000))
		r.KeepFirst, r.KeepLast = 3, 2
		r.Kept = func(k *posternv1.KeptRows) { kept = k }
		query(t, m, r)
		if kept == nil {
			t.Fatal("no rows were kept")
		}
		var values []string
		for _, row := range decode(t, kept.Arrow).rows {
			values = append(values, row[0])
		}
		if got := strings.Join(values, " "); got != "1 2 3 9999 10000" {
			t.Errorf("got %s", got)
		}
	})
}

// What matches a pattern leaves in no text: not in rows, kept rows, blobs, errors.
func TestPatterns(t *testing.T) {
	each(t, func(t *testing.T, db *database) {
		key := bytes.Repeat([]byte{7}, 32)
		patterns := func(s *sqlsession.Source) {
			s.Guard.MaskKey = key
			s.Guard.Masks = []sqlsession.Mask{{Pattern: `\b\d{13,19}\b`, With: "redact"}, {Pattern: `[a-z]+@[a-z.]+`, With: "hash"}, {Pattern: `tel \d+`, With: "partial", Keep: 2}}
		}
		blob := map[string]string{"postgres": "text", "mysql": "blob", "sqlite": "blob"}[db.engine]
		for _, s := range []string{
			"CREATE TABLE cards (id INT PRIMARY KEY, c VARCHAR(80), b " + blob + ", j " + map[string]string{"postgres": "json", "mysql": "json", "sqlite": "text"}[db.engine] + ", n DECIMAL(20, 0))",
			`INSERT INTO cards VALUES (1, 'pay 4111111111111111 now', 'x 4111111111111111', '{"a": ["ann@example.org", "4111111111111111"]}', 5), (2, 'tel 12345678', NULL, '{"a": "\u0061nn@example.org"}', NULL), (3, 'plain', 'plain', '[1]', 7)`,
		} {
			if db.engine == "mysql" {
				s = strings.ReplaceAll(s, `\u`, `\\u`)
			}
			if db.engine == "postgres" {
				s = strings.Replace(s, "cards", "shop.cards", 1)
			}
			if _, err := db.admin.Exec(s); err != nil {
				t.Fatalf("%s: %v", s, err)
			}
		}
		name := "cards"
		if db.engine == "postgres" {
			name = "shop.cards"
			if _, err := db.admin.Exec("GRANT ALL ON shop.cards TO reader"); err != nil {
				t.Fatal(err)
			}
		}
		defer func() { _, _ = db.admin.Exec("DROP TABLE " + name) }()
		m := db.open(t, patterns)
		concat := "c || ' ' || c"
		if db.engine == "mysql" {
			concat = "CONCAT(c, ' ', c)"
		}
		var kept *posternv1.KeptRows
		r := request("SELECT id, c, b, j, " + concat + ", n FROM cards ORDER BY id")
		r.KeepFirst, r.KeepLast = 2, 1
		r.Kept = func(k *posternv1.KeptRows) { kept = k }
		got, _ := query(t, m, r)
		if len(got.rows) != 3 || kept == nil {
			t.Fatalf("got %v, kept %v", got.rows, kept)
		}
		first, second, third := got.rows[0], got.rows[1], got.rows[2]
		hidden := first[2]
		if got.schema.Field(2).Type.String() == "binary" {
			raw, err := base64.StdEncoding.DecodeString(hidden)
			if err != nil {
				t.Fatal(err)
			}
			hidden = string(raw)
		}
		if first[0] != "1" || first[1] != "pay *** now" || hidden != "x ***" || first[4] != "pay *** now pay *** now" || second[1] != "**********78" || third[1] != "plain" || second[2] != "(null)" || third[5] != "7" {
			t.Errorf("got %q", got.rows)
		}
		all := fmt.Sprint(got.rows, decode(t, kept.Arrow).rows)
		for _, secret := range []string{"4111111111111111", "example.org", "12345678", "\\u0061"} {
			if strings.Contains(all, secret) {
				t.Errorf("%q came out: %s", secret, all)
			}
		}
		// Equal values have equal hashes, however JSON writes them.
		hash := func(j string) string { return regexp.MustCompile(`[A-Za-z0-9]{26}`).FindString(j) }
		if hash(first[3]) == "" || hash(first[3]) != hash(second[3]) {
			t.Errorf("got %q and %q, want one hash in both", first[3], second[3])
		}
		// Errors.
		w := db.open(t, patterns, readWrite)
		r = request("INSERT INTO nowhere_ann (a) VALUES ('ann@example.org')")
		if db.engine == "mysql" {
			r = request("SELECT CAST('ann@example.org' AS nothing) FROM cards")
		}
		r.ReadWrite = true
		if _, _, err := try(t, w, r); err == nil || strings.Contains(err.Error(), "example.org") {
			t.Errorf("got %v, want an error without the address", err)
		}
		// Longer than before: a limit holds what comes out.
		long := db.open(t, func(s *sqlsession.Source) {
			s.Guard.MaskKey, s.Guard.Masks = key, []sqlsession.Mask{{Pattern: "x", With: "hash"}}
		})
		r = request(strings.Replace(db.text(20_000), "'x'", "'xy'", 1))
		if db.engine != "sqlite" {
			r.MaxBytes = 100_000
			if _, outcome, err := try(t, long, r); proto.CodeOf(err) != proto.CodeByteLimit || outcome.Rows != 0 {
				t.Errorf("got %v, %v, want BYTE_LIMIT", outcome, err)
			}
		}
		// Rules for columns are refused where nobody can follow them.
		if db.engine != "postgres" {
			refuse(t, db.open(t, func(s *sqlsession.Source) {
				s.Guard.MaskKey, s.Guard.Masks = key, []sqlsession.Mask{{Pattern: "x", With: "redact"}, {Columns: []string{"*.c"}, With: "redact"}}
			}), request("SELECT 1"), proto.CodePolicyDenied)
			refuse(t, db.open(t, func(s *sqlsession.Source) { s.Guard.Masks = []sqlsession.Mask{{Pattern: "x", With: "redact"}} }), request("SELECT 1"), proto.CodeSourceConfig)
		}
	})
}

func TestCheck(t *testing.T) {
	each(t, func(t *testing.T, db *database) {
		m := db.open(t)
		names := map[string]string{}
		for _, c := range m.Check(t.Context(), "db") {
			names[c.Name] = c.Result
			if c.Message == "" || c.Result == "failed" || c.Result == "warning" && c.Remedy == "" {
				t.Errorf("got %v", c)
			}
		}
		for _, want := range []string{"reachable", "version", "read-only"} {
			if names[want] != "ok" {
				t.Errorf("%s: got %q, want ok (%v)", want, names[want], names)
			}
		}
		if names["role"] != "warning" && db.kick != nil {
			t.Errorf("role: got %q, want a warning: it can write", names["role"])
		}
	})
}

func TestIntrospect(t *testing.T) {
	each(t, func(t *testing.T, db *database) {
		m := db.open(t)
		read := func(hide []string, known []*posternv1.CatalogSchema) (map[string]*posternv1.CatalogTable, []*posternv1.CatalogSchema) {
			t.Helper()
			tables, prints := map[string]*posternv1.CatalogTable{}, []*posternv1.CatalogSchema(nil)
			complete := false
			err := m.Introspect(t.Context(), sqlsession.Introspection{Source: "db", Hide: hide, Known: known}, func(p *posternv1.CatalogPage) error {
				for _, x := range p.Tables {
					tables[x.Schema+"."+x.Name] = x
				}
				prints = append(prints, p.Schemas...)
				complete = complete || p.Complete
				return nil
			})
			if err != nil || !complete {
				t.Fatalf("introspect: %v, complete %v", err, complete)
			}
			return tables, prints
		}
		tables, prints := read(nil, nil)
		things := tables[db.schema+".things"]
		if things == nil || len(things.Columns) != 2 || things.Columns[0].Name != "id" || things.Columns[1].Type != "text" && things.Columns[1].Type != "TEXT" ||
			len(things.Keys) == 0 || things.Keys[0].Kind != "primary" || things.Kind != "table" {
			t.Errorf("got %v", things)
		}
		if tables[db.schema+".secret_plans"] == nil {
			t.Errorf("secret_plans is missing: %v", tables)
		}
		again, same := read(nil, prints)
		if len(again) != 0 || !bytes.Equal(fingerprint(prints, db.schema), fingerprint(same, db.schema)) {
			t.Errorf("nothing has changed: got %d tables", len(again))
		}
		hidden, _ := read([]string{"*.secret_*"}, nil)
		if hidden[db.schema+".secret_plans"] != nil || hidden[db.schema+".things"] == nil {
			t.Errorf("hide: got %v", hidden)
		}
		if _, prints := read([]string{db.schema}, nil); fingerprint(prints, db.schema) != nil {
			t.Errorf("hide the schema: got %v", prints)
		}
		if _, err := db.admin.Exec("CREATE TABLE " + map[string]string{"postgres": "shop.", "mysql": "", "sqlite": ""}[db.engine] + "fresh (a int)"); err != nil {
			t.Fatal(err)
		}
		if db.engine == "postgres" {
			_, _ = db.admin.Exec("GRANT SELECT ON shop.fresh TO reader")
		}
		fresh, _ := read(nil, prints)
		if fresh[db.schema+".fresh"] == nil || fresh[db.schema+".things"] == nil {
			t.Errorf("after a change: got %v", fresh)
		}
		_, _ = db.admin.Exec("DROP TABLE " + map[string]string{"postgres": "shop.", "mysql": "", "sqlite": ""}[db.engine] + "fresh")
	})
}

// Many statements in one session: what one leaves behind is not there for the next,
// and nothing grows.
func TestManyStatements(t *testing.T) {
	each(t, func(t *testing.T, db *database) {
		m := db.open(t)
		for i := range 500 {
			got, _ := query(t, m, with("SELECT id FROM things WHERE id = {{i}}", map[string]string{"i": fmt.Sprint(i + 1)}))
			if got.rows[0][0] != fmt.Sprint(i+1) {
				t.Fatalf("statement %d: got %v", i, got.rows)
			}
		}
	})
}

// fingerprint is a schema's fingerprint; nil if there is no such schema.
func fingerprint(schemas []*posternv1.CatalogSchema, name string) []byte {
	for _, s := range schemas {
		if s.Name == name {
			return s.Fingerprint
		}
	}
	return nil
}
