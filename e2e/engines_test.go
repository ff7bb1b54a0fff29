package e2e

import (
	"database/sql"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"connectrpc.com/connect"
	_ "modernc.org/sqlite"

	"github.com/postern-dev/postern/e2e/mariadbserver"
	"github.com/postern-dev/postern/e2e/stack"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// TestEngines runs statements, checks, introspection and doctor on MariaDB and SQLite
// with the real binaries.
func TestEngines(t *testing.T) {
	maria := mariadbserver.Start(t)
	ctx := t.Context()
	if err := maria.SQL(ctx, "CREATE DATABASE shop", "CREATE TABLE shop.items (id INT PRIMARY KEY, name VARCHAR(50), price DECIMAL(10,2))", "INSERT INTO shop.items VALUES (1, 'größe', 9.50), (2, NULL, 3)",
		"CREATE TABLE shop.hidden_plans (a INT)", "CREATE TABLE shop.cards (id INT PRIMARY KEY, number VARCHAR(20) NOT NULL)", "INSERT INTO shop.cards VALUES (1, '4111111111111111')"); err != nil {
		t.Fatal(err)
	}
	if err := maria.CreateUser(ctx, "reader", readerPassword, "SELECT, SHOW VIEW ON shop.*"); err != nil {
		t.Fatal(err)
	}
	s := newStack(t, stack.Options{})
	// A file that nobody but its owner may read, in a directory of the same kind.
	dir := filepath.Join(s.Dir, "data")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "app.db")
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"CREATE TABLE items (id INTEGER PRIMARY KEY, name TEXT, price REAL)", "CREATE TABLE cards (id INTEGER PRIMARY KEY, number TEXT)", "INSERT INTO cards VALUES (1, '4111111111111111')", "INSERT INTO items VALUES (1, 'größe', 9.5), (2, NULL, 3)"} {
		if _, err := db.Exec(text); err != nil {
			t.Fatal(err)
		}
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	password := filepath.Join(s.Dir, "reader.pw")
	if err := os.WriteFile(password, []byte(readerPassword+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	const masked = "    policy: {mask: [{columns: [cards.number], with: hash}], mask_filters: allow}\n"
	const policy = "    policy:\n      hide: [shop.hidden_*, shop.cards, main.cards]\n      mask: [{pattern: '\\b\\d{13,19}\\b', with: redact}]\n"
	agent, err := s.Join(ctx, "host", fmt.Sprintf("sources:\n  - name: shop\n    engine: mysql\n    dsn: %s\n    password: {file: %s}\n"+policy+
		"  - name: app\n    engine: sqlite\n    dsn: path=%s\n"+policy+"  - name: shape\n    engine: mysql\n    dsn: %[1]s\n    password: {file: %[2]s}\n    policy: {mode: metadata}\n"+
		"  - name: shop-plans\n    engine: mysql\n    dsn: %[1]s\n    password: {file: %[2]s}\n    policy: {plans: structure}\n  - name: app-plans\n    engine: sqlite\n    dsn: path=%[3]s\n    policy: {plans: structure}\n"+
		"  - name: shop-masked\n    engine: mysql\n    dsn: %[1]s\n    password: {file: %[2]s}\n"+masked+"  - name: app-masked\n    engine: sqlite\n    dsn: path=%[3]s\n"+masked,
		maria.SocketDSN("reader", "shop"), password, path))
	if err != nil {
		t.Fatal(err)
	}
	for _, source := range []string{"host/shop", "host/app"} {
		if got := must(t, s, "sql", source, "-f", "csv", "-p", "n=3", "SELECT id, name, price FROM items WHERE id < {{n}} ORDER BY id"); !strings.HasPrefix(got, "id,name,price\n1,größe,9.5") || !strings.Contains(got, "\n2,,3") {
			t.Errorf("%s: got %s", source, got)
		}
		e := postern(t, s, "sql", source, "DELETE FROM items")
		if e.code != 3 || !strings.Contains(e.stderr, "read-only") {
			t.Errorf("%s: got %d, %s", source, e.code, e.stderr)
		}
		if e := postern(t, s, "sql", source, "SELECT 1 +\n FROM items"); e.code != 1 || !strings.Contains(e.stderr, "position 13") {
			t.Errorf("%s: got %d, %s", source, e.code, e.stderr)
		}
		if got := mustJSON[catalogView](t, s, "source", "introspect", source).names(); got != map[string]string{"host/shop": "shop.items", "host/app": "main.items"}[source] {
			t.Errorf("%s: got catalog %s", source, got)
		}
		if got := must(t, s, "source", "check", source); !strings.Contains(got, "read-only") || strings.Contains(got, "failed") {
			t.Errorf("%s: got check %s", source, got)
		}
		if got := must(t, s, "sql", source, "-f", "json", "SELECT COUNT(*) AS n FROM items"); !strings.Contains(got, `"n":2`) {
			t.Errorf("%s: got %s", source, got)
		}
	}
	// Patterns, also in what the history keeps.
	for _, source := range []string{"host/shop", "host/app"} {
		if got := must(t, s, "sql", source, "-f", "csv", "SELECT number FROM cards WHERE number <> '4222222222222222'"); strings.Join(strings.Fields(got), " ") != "number ***" {
			t.Errorf("%s: got %s, want the number masked", source, got)
		}
	}
	if got := must(t, s, "query", "list"); strings.Contains(got, "4222222222222222") || !strings.Contains(got, "FROM cards WHERE number <> '***'") {
		t.Errorf("the history has %s", got)
	}
	// By column: the same hash on both, and nothing of what is made of it.
	hashes := map[string]bool{}
	for _, source := range []string{"host/shop-masked", "host/app-masked"} {
		got := strings.Fields(must(t, s, "sql", source, "-f", "csv", "SELECT number AS id FROM cards"))
		if len(got) != 2 || len(got[1]) != 26 {
			t.Errorf("%s: got %v, want a hash", source, got)
			continue
		}
		hashes[got[1]] = true
		for _, text := range []string{"SELECT SUBSTR(number, 1, 9) AS n FROM cards", "SELECT CONCAT(n, '') AS n FROM (SELECT number AS n FROM cards LIMIT 1) items", "SELECT name AS n FROM items UNION ALL SELECT number FROM cards"} {
			if got := must(t, s, "sql", source, "-f", "csv", text); strings.Contains(got, "4111") || !strings.Contains(got, "***") {
				t.Errorf("%s: %s: got %s", source, text, got)
			}
		}
	}
	if len(hashes) != 1 {
		t.Errorf("got %v, want one hash", hashes)
	}
	// SHOW and DESCRIBE, less what is hidden.
	if got := must(t, s, "sql", "host/shop", "-f", "csv", "SHOW TABLES"); strings.Join(strings.Fields(got), " ") != "Tables_in_shop items" {
		t.Errorf("got %s, want items alone", got)
	}
	if e := postern(t, s, "sql", "host/shop", "DESCRIBE cards"); e.code != 3 || !strings.Contains(e.stderr, "hides shop.cards") {
		t.Errorf("got %d, %s", e.code, e.stderr)
	}
	// Mode metadata: shapes and no values.
	if got := must(t, s, "sql", "host/shape", "SELECT id, number, id + 1 AS more FROM cards WHERE number = {{n}}"); strings.Contains(got, "4111") || !strings.Contains(got, "varchar(20)") || !strings.Contains(got, "PARAMETER") {
		t.Errorf("got %s, want columns with types and a parameter", got)
	}
	if e := postern(t, s, "sql", "host/shape", "SELECT nothing FROM cards"); e.code != 1 || !strings.Contains(e.stderr, "there is no column nothing") {
		t.Errorf("got %d, %s", e.code, e.stderr)
	}
	out := finish(t, agent.Command(ctx, "doctor", "--config", agent.ConfigFile(), "--state", agent.StateDir(), "--runtime", agent.RuntimeDir()))
	for _, want := range []string{"MariaDB answers", "can read only", "agentd opens " + path} {
		if !strings.Contains(out.stdout, want) {
			t.Errorf("doctor does not say %q: %s%s", want, out.stdout, out.stderr)
		}
	}
	for _, source := range []string{"host/shop", "host/app"} {
		if e := postern(t, s, "sql", source, "--explain", "SELECT 1"); e.code != 3 {
			t.Errorf("%s: a plan: got %d, %s%s", source, e.code, e.stdout, e.stderr)
		}
	}
	// Plans, where the policy has them.
	for source, want := range map[string]string{"host/shop-plans": "access_type: const", "host/app-plans": "SEARCH items USING INTEGER PRIMARY KEY (rowid=?)"} {
		if got := must(t, s, "sql", source, "--explain", "-p", "n:int8=1", "SELECT name FROM items WHERE id = {{n}} AND price < 4711"); !strings.Contains(got, want) || strings.Contains(got, "4711") {
			t.Errorf("%s: got %s, want %q in it", source, got, want)
		}
		if e := postern(t, s, "sql", source, "--analyze", "SELECT 1"); e.code != 3 {
			t.Errorf("%s: --analyze: got %d, %s%s", source, e.code, e.stdout, e.stderr)
		}
	}
	if files, _ := filepath.Glob(filepath.Join(dir, "*")); len(files) != 1 {
		t.Errorf("got %v, want the database alone", files)
	}
}

// TestEngineSessions holds sessions on MariaDB and SQLite with the real binaries: the
// shell, and the list of what is open.
func TestEngineSessions(t *testing.T) {
	maria := mariadbserver.Start(t)
	ctx := t.Context()
	if err := maria.SQL(ctx, "CREATE DATABASE shop", "CREATE TABLE shop.items (id INT PRIMARY KEY, name VARCHAR(50))", "INSERT INTO shop.items VALUES (1, 'one'), (2, 'two')"); err != nil {
		t.Fatal(err)
	}
	if err := maria.CreateUser(ctx, "writer", readerPassword, "ALL ON shop.*"); err != nil {
		t.Fatal(err)
	}
	s := newStack(t, stack.Options{})
	path := filepath.Join(s.Dir, "app.db")
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"CREATE TABLE items (id INTEGER PRIMARY KEY, name TEXT)", "INSERT INTO items VALUES (1, 'one'), (2, 'two')"} {
		if _, err := db.Exec(text); err != nil {
			t.Fatal(err)
		}
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	password := filepath.Join(s.Dir, "writer.pw")
	if err := os.WriteFile(password, []byte(readerPassword+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Join(ctx, "host", fmt.Sprintf("sources:\n  - name: shop\n    engine: mysql\n    dsn: %s\n    password: {file: %s}\n    policy: {mode: read-write}\n  - name: shop-ro\n    engine: mysql\n    dsn: %[1]s\n    password: {file: %[2]s}\n"+
		"  - name: app\n    engine: sqlite\n    dsn: path=%[3]s\n    policy: {mode: read-write}\n  - name: app-ro\n    engine: sqlite\n    dsn: path=%[3]s\n", maria.SocketDSN("writer", "shop"), password, path)); err != nil {
		t.Fatal(err)
	}
	script := func(target, text string) ended {
		cmd := s.Command(ctx, "sql", "-i", target, "-f", "csv")
		cmd.Stdin = strings.NewReader(text)
		return finish(t, cmd)
	}
	for source, temp := range map[string]string{"host/shop": "CREATE TEMPORARY TABLE", "host/app": "CREATE TEMP TABLE"} {
		e := script(source, temp+" scratch (i INT);\nINSERT INTO scratch VALUES (7);\nBEGIN;\nUPDATE items SET name = 'changed';\nSAVEPOINT a;\nDELETE FROM items;\nROLLBACK TO a;\nSELECT i, (SELECT COUNT(*) FROM items WHERE name = 'changed') AS n FROM scratch;\nROLLBACK;\nSELECT name FROM items WHERE id = 1;\nBEGIN;\nUPDATE items SET name = 'kept' WHERE id = 2;\nCOMMIT;\nSELECT name FROM items WHERE id = 2;\nBEGIN; DELETE FROM items;\n")
		if e.code != 0 || e.stdout != "i,n\n7,2\nname\none\nname\nkept\n" || !strings.Contains(e.stderr, "was not committed: it is rolled back") {
			t.Errorf("%s: exit %d: %s%s", source, e.code, e.stdout, e.stderr)
		}
		e = script(source+"-ro", "BEGIN;\nSELECT COUNT(*) AS n FROM items;\nDELETE FROM items;\n")
		if e.code != 3 || e.stdout != "n\n2\n" || !strings.Contains(e.stderr, "read-only") {
			t.Errorf("%s-ro: exit %d: %s%s", source, e.code, e.stdout, e.stderr)
		}
		ana := tokenClient(t, s, "ana-"+source[5:], "analyst")
		h := holdOn(t, ana, source[5:])
		h.want("BEGIN", "", "open")
		h.want("SELECT name FROM items WHERE id = 2", "kept", "open")
		if got := must(t, s, "session", "list"); !strings.Contains(got, h.id) || !strings.Contains(got, "open") {
			t.Errorf("%s: got %s, want the session", source, got)
		}
		if _, err := ana.Sessions.CloseSession(ctx, connect.NewRequest(&posternv1.CloseSQLSessionRequest{Agent: "host", SessionId: h.id})); err != nil {
			t.Fatal(err)
		}
		h.fails("SELECT 1", proto.CodeNotFound, "has ended")
	}
}
