package adversary

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/ipc"

	"github.com/postern-dev/postern/agentd/sqlsession"
	posternproto "github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/rowfmt"
)

// How psql is told to print: what no value has.
const (
	fieldMark = "\x1f"
	rowMark   = "\x1e"
	nullMark  = "\x02NULL\x02"
	endMark   = "\x03"
)

// printed is what psql shows of one statement.
type printed struct {
	state string // its SQLSTATE
	rows  []string
}

// psql runs statements one after the other in one psql.
func psql(t *testing.T, w *world, statements []string) []printed {
	t.Helper()
	var script strings.Builder
	script.WriteString("SET search_path = gen, public;\n")
	for _, sql := range statements {
		fmt.Fprintf(&script, "%s;\n\\echo '%s':SQLSTATE'%s'\n", sql, endMark, endMark)
	}
	file := t.TempDir() + "/queries.sql"
	if err := os.WriteFile(file, []byte(script.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), w.server.Bin("psql"), "-X", "-q", "-A", "-t", "-F", fieldMark, "-R", rowMark, "-P", "null="+nullMark,
		"-h", w.server.Host, "-p", strconv.Itoa(w.server.Port), "-U", "postgres", "-d", alpha, "-f", file)
	cmd.Env = []string{"PGPASSWORD=" + w.server.Password, "PGCLIENTENCODING=UTF8", "LC_ALL=C.UTF-8", "PATH=" + os.Getenv("PATH")}
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("psql: %v", err)
	}
	parts := strings.Split(string(out), endMark)
	if len(parts) != 2*len(statements)+1 {
		t.Fatalf("psql printed %d parts for %d statements", len(parts), len(statements))
	}
	all := make([]printed, len(statements))
	for i := range all {
		text := strings.TrimPrefix(parts[2*i], "\n")
		all[i].state = parts[2*i+1]
		if text != "" {
			all[i].rows = strings.Split(strings.TrimSuffix(text, "\n"), rowMark)
		}
	}
	return all
}

// ours is the same of our answer: CSV by way of rowfmt, with psql's marks.
func ours(t *testing.T, stream []byte) []string {
	t.Helper()
	if len(stream) == 0 {
		return nil
	}
	r, err := ipc.NewReader(bytes.NewReader(stream))
	if err != nil {
		t.Fatal(err)
	}
	fields := slices.Clone(r.Schema().Fields())
	r.Release()
	var csv bytes.Buffer
	if err := rowfmt.Convert(t.Context(), &csv, bytes.NewReader(stream), rowfmt.CSV, rowfmt.Options{}); err != nil {
		t.Fatal(err)
	}
	records := parseCSV(csv.String())
	if len(fields) > 0 {
		records = records[1:] // the names
	}
	rows := make([]string, len(records))
	for i, record := range records {
		for j := range record {
			if j < len(fields) && fields[j].Type.ID() == arrow.BOOL && record[j] != nullMark {
				record[j] = record[j][:1] // psql writes t and f
			}
		}
		rows[i] = strings.Join(record, fieldMark)
	}
	return rows
}

// parseCSV reads RFC 4180 and tells an empty field, NULL, from a quoted one.
func parseCSV(text string) [][]string {
	var records [][]string
	var record []string
	for at := 0; at < len(text); {
		var field strings.Builder
		wasQuoted := false
		if text[at] == '"' {
			wasQuoted = true
			for at++; ; at++ {
				if text[at] == '"' {
					if at+1 < len(text) && text[at+1] == '"' {
						at++
					} else {
						at++
						break
					}
				}
				field.WriteByte(text[at])
			}
		} else {
			for text[at] != ',' && text[at] != '\n' {
				field.WriteByte(text[at])
				at++
			}
		}
		value := field.String()
		if value == "" && !wasQuoted {
			value = nullMark
		}
		record = append(record, value)
		if text[at] == '\n' {
			records = append(records, record)
			record = nil
		}
		at++
	}
	return records
}

// TestDifferential: generated queries give the same rows through a SQL session as
// through psql, to the letter.
func TestDifferential(t *testing.T) {
	const queries = 2000
	w := ownWorld(t)
	if err := w.script(t.Context(), alpha, "testdata/types.sql"); err != nil {
		t.Fatal(err)
	}
	if err := w.server.SQL(t.Context(), "ALTER ROLE root SET search_path = gen, public"); err != nil {
		t.Fatal(err)
	}
	m, log := newManager(t, w.source("db", roleRoot, alpha, sqlsession.Guard{Mode: "read-write"}))
	g := newGenerator(20261122)
	statements := make([]string, queries)
	for i := range statements {
		statements[i] = g.query()
	}
	want := psql(t, w, statements)
	var failed, rows, different int
	for i, sql := range statements {
		got := ask(t, m, log, "db", sql, true)
		state := "00000"
		if got.err != nil {
			state = got.out.Error.GetSql().GetSqlstate()
			if state == "" {
				state = posternproto.CodeOf(got.err).String()
			}
		}
		if state != want[i].state {
			t.Errorf("query %d ends with %s (%v), in psql with %s:\n%s", i, state, got.err, want[i].state, sql)
			different++
			continue
		}
		if want[i].state != "00000" {
			failed++
			continue
		}
		mine := ours(t, got.stream)
		slices.Sort(mine)
		theirs := want[i].rows
		slices.Sort(theirs)
		rows += len(mine)
		if strings.HasPrefix(sql, "SELECT FROM") {
			// psql prints rows without columns as nothing.
			mine, theirs = nil, nil
		}
		if !slices.Equal(mine, theirs) {
			different++
			t.Errorf("query %d: %d rows, in psql %d: %s\n%s", i, len(mine), len(theirs), firstDifference(mine, theirs), sql)
		}
		if different > 20 {
			t.Fatal("too many differences")
		}
	}
	// The generator must not drift into queries that all fail or find nothing.
	if failed > queries/10 || rows < 10*queries {
		t.Errorf("%d of %d queries failed, %d rows in all: the generator is no good", failed, queries, rows)
	}
	t.Logf("%d queries, %d failed in both, %d rows the same", queries, failed, rows)
}

func firstDifference(a, b []string) string {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			x, y := strings.Split(a[i], fieldMark), strings.Split(b[i], fieldMark)
			for j := range min(len(x), len(y)) {
				if x[j] != y[j] {
					return fmt.Sprintf("column %d of row %d: %.200q, in psql %.200q", j+1, i+1, x[j], y[j])
				}
			}
			return fmt.Sprintf("row %d has %d columns, in psql %d", i+1, len(x), len(y))
		}
	}
	return "one has more rows"
}
