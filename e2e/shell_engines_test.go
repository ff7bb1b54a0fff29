package e2e

import (
	"database/sql"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	_ "modernc.org/sqlite"

	"github.com/postern-dev/postern/e2e/mariadbserver"
	"github.com/postern-dev/postern/e2e/stack"
)

// TestShellEngines runs scripts through `postern sql -i` on MariaDB and SQLite: each
// has texts, names, comments and bodies with semicolons, as its own rules allow.
func TestShellEngines(t *testing.T) {
	maria := mariadbserver.Start(t)
	ctx := t.Context()
	if err := maria.SQL(ctx, "CREATE DATABASE shop"); err != nil {
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
	if _, err := db.Exec("CREATE TABLE first (i INT)"); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	password := filepath.Join(s.Dir, "writer.pw")
	if err := os.WriteFile(password, []byte(readerPassword+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Join(ctx, "host", fmt.Sprintf("sources:\n  - name: shop\n    engine: mysql\n    dsn: %s\n    password: {file: %s}\n    policy: {mode: read-write}\n"+
		"  - name: app\n    engine: sqlite\n    dsn: path=%s\n    policy: {mode: read-write}\n", maria.SocketDSN("writer", "shop"), password, path)); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct{ source, script, want string }{
		"mysql texts": {
			"shop", "SELECT 'it\\'s; a' AS a, \"b\\\";\" AS b, '\\\\' AS c, 'd'';' AS d; SELECT 1 AS `x;y`; SELECT 'two\\\n;' AS e;\n",
			"a,b,c,d\nit's; a,\"b\"\";\",\\,d';\nx;y\n1\ne\n\"two\n;\"\n",
		},
		"mysql comments": {
			"shop", "SELECT 1 AS a # it's; not\n; SELECT 3--1 AS b; SELECT /* /* ; */ 5 AS c -- it's;\n, 6 AS d;\n",
			"a\n1\nb\n4\nc,d\n5,6\n",
		},
		"mysql placeholders": {
			"shop", "\\set x:int4 7\nSELECT 'it\\'s {{x}} :x' AS a, 1--:x AS b, {{x}} AS c # :y it's {{y}}\n;\n",
			"a,b,c\nit's {{x}} :x,8,7\n",
		},
		"mysql bodies": {
			"shop", "CREATE TABLE log (t VARCHAR(50));\nCREATE TABLE orders (id INT);\nCREATE TRIGGER noted AFTER INSERT ON orders FOR EACH ROW\nBEGIN\n  IF NEW.id > 1 THEN\n    INSERT INTO log VALUES (CASE WHEN NEW.id > 5 THEN 'large;' ELSE 'small;' END);\n  END IF;\nEND;\n" +
				"DELIMITER //\nCREATE PROCEDURE twice(IN n INT) IF n > 0 THEN INSERT INTO orders VALUES (n); INSERT INTO orders VALUES (n * 2); END IF//\nCALL twice(4)//\nDELIMITER ;\nSELECT t FROM log ORDER BY t; DROP TABLE orders; DROP TABLE log; DROP PROCEDURE twice;\n",
			"t\nlarge;\nsmall;\n",
		},
		"sqlite texts": {
			"app", "SELECT '\\' AS a, 'it''s;' AS b; SELECT 1 AS [x;y], 2 AS `z;`, 3 AS \"w;\";\n",
			"a,b\n\\,it's;\nx;y,z;,w;\n1,2,3\n",
		},
		"sqlite comments": {
			"app", "SELECT 1 AS a --it's;\n; SELECT /* /* ; */ 5 AS c;\n",
			"a\n1\nc\n5\n",
		},
		"sqlite placeholders": {
			"app", "\\set x:int4 7\nSELECT '\\' AS a, :x AS b, ':x' AS c, 9 AS [:y];\n",
			"a,b,c,:y\n\\,7,:x,9\n",
		},
		"sqlite bodies": {
			"app", "CREATE TABLE log (t TEXT);\nCREATE TABLE orders (id INT);\nCREATE TRIGGER noted AFTER INSERT ON orders BEGIN\n  INSERT INTO log SELECT CASE WHEN NEW.id > 5 THEN 'large;' ELSE 'small;' END;\n  DELETE FROM orders WHERE id < 0; -- end;\nEND;\n" +
				"INSERT INTO orders VALUES (4), (8); SELECT t FROM log ORDER BY t;\n",
			"t\nlarge;\nsmall;\n",
		},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := s.Command(ctx, "sql", "-i", "host/"+test.source, "-f", "csv")
			cmd.Stdin = strings.NewReader(test.script)
			if e := finish(t, cmd); e.code != 0 || e.stdout != test.want {
				t.Errorf("exit %d, got %q, want %q: %s", e.code, e.stdout, test.want, e.stderr)
			}
		})
	}
	for source, script := range map[string]string{"shop": "SELECT 1 AS `a", "app": "SELECT 1 AS [a"} {
		cmd := s.Command(ctx, "sql", "-i", "host/"+source)
		cmd.Stdin = strings.NewReader(script)
		if e := finish(t, cmd); e.code != 2 || !strings.Contains(e.stderr, "ends within quotes") {
			t.Errorf("%s: exit %d: %s%s", source, e.code, e.stdout, e.stderr)
		}
	}
}
