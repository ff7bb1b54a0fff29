package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/postern-dev/postern/e2e/stack"
)

// TestMask runs statements on a source that masks columns and texts, in every
// format, and looks for the masked values in all that the control plane and the
// host keep, and in what the client sees.
func TestMask(t *testing.T) {
	pg := database(t, "mask")
	canary := marked("canary")
	const card = "4111111111111234"
	if err := pg.SQLIn(t.Context(), "mask",
		"create table people as select i as id, '"+canary+"' || i || '@example.com' as email, 'card "+card+"' as note, 1000 + i as salary from generate_series(1, 20) i",
		"create view contacts as select id, email as contact from people",
		"grant select on people, contacts to reader",
	); err != nil {
		t.Fatal(err)
	}
	s := newStack(t, stack.Options{})
	dsn := pg.SocketDSN("reader", "mask")
	agent, err := s.Join(t.Context(), "host", "sources:\n"+mustSource(t, s.Dir, "db", dsn, `      mask:
        - {columns: ["people.email"], with: hash}
        - {columns: ["people.salary"], with: "null"}
        - {pattern: '\b\d{13,19}\b', with: partial}
`)+mustSource(t, s.Dir, "open", dsn, ""))
	if err != nil {
		t.Fatal(err)
	}
	if out := must(t, s, "source", "list"); !strings.Contains(out, "yes") || !strings.Contains(out, "no") {
		t.Errorf("source list:\n%s", out)
	}
	var seen bytes.Buffer
	run := func(code int, args ...string) string {
		t.Helper()
		e := postern(t, s, append([]string{"sql", "host/db"}, args...)...)
		if e.code != code {
			t.Fatalf("%q: exit code %d, want %d: %s", args, e.code, code, e.stderr)
		}
		fmt.Fprintln(&seen, e.stdout)
		for _, line := range strings.Split(e.stderr, "\n") {
			if !strings.HasPrefix(line, "LINE ") { // our own text, which postern shows from memory
				fmt.Fprintln(&seen, line)
			}
		}
		return e.stdout + e.stderr
	}
	for _, format := range []string{"table", "csv", "json", "ndjson"} {
		out := run(0, "-f", format, "select * from people order by id")
		if !strings.Contains(out, "************1234") {
			t.Errorf("%s: the pattern is not held:\n%.300s", format, out)
		}
	}
	for _, format := range []string{"arrow", "parquet"} {
		file := filepath.Join(t.TempDir(), "out")
		run(0, "-f", format, "-O", file, "select * from people")
		content, err := os.ReadFile(file)
		if err != nil || len(content) < 500 {
			t.Fatalf("%s: %d bytes, %v", format, len(content), err)
		}
		seen.Write(content)
	}
	// Hashes are the same wherever the value is read, also after a restart of
	// agentd, and values still join.
	hash := func(sql string) string {
		t.Helper()
		var rows []map[string]any
		if err := json.Unmarshal([]byte(run(0, "-f", "json", sql)), &rows); err != nil || len(rows) != 1 {
			t.Fatalf("%s: %v, %v", sql, rows, err)
		}
		return fmt.Sprint(rows[0]["h"])
	}
	before := hash("select email h from people where id = 1")
	if len(before) != 26 || hash("select contact h from contacts where contact = '"+canary+"1@example.com' /* own */") != before {
		t.Errorf("hash %q", before)
	}
	if err := agent.Process.Stop(patience); err != nil {
		t.Fatal(err)
	}
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	if err := agent.Online(t.Context()); err != nil {
		t.Fatal(err)
	}
	if after := hash("select email h from people where id = 1"); after != before {
		t.Errorf("after a restart the hash is %s, before it was %s", after, before)
	}
	run(3, "select id from people where email like 'x%'")
	run(3, "select email::int from people")
	run(3, "select id from people order by salary")
	run(3, "select query_to_xml('select email from people', true, true, '')")
	run(1, "select 1 / 0 as \"card "+card+"\"")
	run(1, "select '"+card+"'::date")
	run(0, "select '"+card+"' as c")
	kept := must(t, s, "query", "list", "--limit", "100", "-o", "json")
	seen.WriteString(kept)
	for _, q := range mustJSON[[]struct{ ID string }](t, s, "query", "list", "--limit", "100") {
		seen.WriteString(postern(t, s, "query", "show", q.ID, "--rows", "-o", "json").stdout)
	}
	audit := must(t, s, "audit", "list", "-o", "json")
	seen.WriteString(audit)
	if !strings.Contains(kept, "************1234") && !strings.Contains(kept, "***") {
		t.Errorf("the history has no masked text:\n%.500s", kept)
	}
	text := strings.ReplaceAll(seen.String(), canary+"1@example.com' /* own */", "") // what we asked for ourselves
	if i := strings.Index(text, canary); i >= 0 {
		t.Errorf("the canary came out: %.200s", text[max(0, i-100):])
	}
	if i := strings.Index(text, card); i >= 0 {
		t.Errorf("the card came out: %.200s", text[max(0, i-100):])
	}
	// The host's own log and state, and the control plane's files.
	for _, dir := range []string{agent.StateDir(), s.DataDir(), agent.Dir()} {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			content, err := os.ReadFile(path)
			if bytes.Contains(content, []byte(card)) {
				t.Errorf("%s holds the card", path)
			}
			return err
		})
		if err != nil && !os.IsNotExist(err) {
			t.Error(err)
		}
	}
	if st, err := os.Stat(filepath.Join(agent.StateDir(), "mask.key")); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mask.key: %v, %v", st, err)
	}
}
