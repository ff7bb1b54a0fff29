package lineage

import (
	"context"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
)

// TestPsql: what psql's backslash commands and pg_dump ask of the catalog goes
// through on a source that masks columns, in clear.
func TestPsql(t *testing.T) {
	server, query, pg := start(t)
	commands := []string{`\d`, `\d people`, `\d+ people`, `\d+ v1`, `\d+ logs`, `\dt+`, `\df`, `\df+ leak`, `\dv+`, `\di+`, `\dn+`, `\du`, `\l`, `\dT+`, `\dp`, `\dx`, `\ds`, `\dm`, `\do ##@`, `\sf leak`, `\sv v1`, `\dconfig`, `\dE`, `\dL`}
	var arguments []string
	for _, c := range commands {
		arguments = append(arguments, "-c", c)
	}
	cmd := exec.Command(server.Bin("psql"), append([]string{"-X", "-E", "-d", server.DSN("postgres", "postgres")}, arguments...)...)
	cmd.Env = append(os.Environ(), "PGPASSWORD="+server.Password)
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	queries := regexp.MustCompile(`(?s)\*{9} QUERY \*{10}\n(.*?)\n\*{26}`).FindAllStringSubmatch(string(out), -1)
	if len(queries) < 40 {
		t.Fatalf("only %d queries", len(queries))
	}
	parser := pgtree.InProcess()
	for _, q := range queries {
		sql := strings.TrimSuffix(strings.TrimSpace(q[1]), ";")
		tree, err := parser.Parse(context.Background(), sql)
		if err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
		plan, err := Analyze(context.Background(), sql, tree.Stmts[0].Stmt, parser, SQLCatalog{Query: query, OneByOne: true}, &testPolicy)
		if err != nil {
			t.Errorf("%s\n\t%v", sql, err)
			continue
		}
		if plan.Known {
			checkAgainstServer(t, pg, sql, plan)
		}
		if v := verdict(plan); strings.Trim(v, "clear ") != "" {
			t.Errorf("%s\n\t%s", sql, v)
		}
	}
}
