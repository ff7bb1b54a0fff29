package adversary

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// known reads testdata/known-MODE.txt: statements that get through today, by their
// text. The test fails when one of them does not any more: the list only shrinks.
func known(t *testing.T, mode string) []string {
	t.Helper()
	text, err := os.ReadFile("testdata/known-" + mode + ".txt")
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSpace(string(text)), "\n")
}

// key names a statement in the list of known holes.
func (a attack) key() string {
	text, _, _ := strings.Cut(a.sql, "\n")
	if len(text) > 120 {
		text = text[:120]
	}
	return a.why + " :: " + text
}

// report holds what went wrong against the known holes, and writes the holes of
// this run to ADVERSARY_HOLES, if that is set, for those who close them.
type report struct {
	t     *testing.T
	mode  string
	known []string
	met   []string
	holes []string
	keys  []string
	last  time.Time
}

func newReport(t *testing.T, mode string) *report {
	return &report{t: t, mode: mode, known: known(t, mode), last: time.Now()}
}

func (r *report) add(a attack, problems []string) {
	r.t.Helper()
	if took := time.Since(r.last); took > time.Second {
		r.t.Logf("%.1f s: %s", took.Seconds(), a.key())
	}
	r.last = time.Now()
	if len(problems) == 0 {
		return
	}
	r.holes = append(r.holes, fmt.Sprintf("- %s: `%.160s`\n  - %.160s", a.why, strings.ReplaceAll(a.sql, "\n", " "), strings.Join(problems, "; ")))
	r.keys = append(r.keys, a.key())
	if slices.Contains(r.known, a.key()) {
		r.met = append(r.met, a.key())
		return
	}
	r.t.Errorf("line %d: %s\n%s\n-> %s", a.line, a.why, clip(a.sql), strings.Join(problems, "\n-> "))
}

func (r *report) end() {
	r.t.Helper()
	for _, k := range r.known {
		if !slices.Contains(r.met, k) {
			r.t.Errorf("a known hole is closed: take it out of testdata/known-%s.txt: %s", r.mode, k)
		}
	}
	if path := os.Getenv("ADVERSARY_HOLES"); path != "" {
		text := fmt.Sprintf("# %s: %d holes\n\n%s\n", r.mode, len(r.holes), strings.Join(r.holes, "\n"))
		keys := strings.Join(r.keys, "\n") + "\n"
		if err := os.WriteFile(path+"-"+r.mode+".keys", []byte(keys), 0o644); err != nil {
			r.t.Error(err)
		}
		if err := os.WriteFile(path+"-"+r.mode+".md", []byte(text), 0o644); err != nil {
			r.t.Error(err)
		}
	}
}

// repair brings back what an attack may have ended, so that the next one meets a whole world.
func (w *world) repair(t *testing.T, found []string) {
	t.Helper()
	if !slices.ContainsFunc(found, func(f string) bool {
		return strings.HasPrefix(f, "sentinels:") || strings.HasPrefix(f, "notifications:")
	}) {
		return
	}
	ctx := context.Background()
	w.busyEnd()
	_ = w.busy.Close(ctx)
	_ = w.sentinel.Close(ctx)
	if err := errors.Join(w.startSentinel(ctx), w.startBusy(ctx)); err != nil {
		t.Fatal(err)
	}
}

// generated are attacks too long to write down.
func generated() []attack {
	long := func(expect, why, sql string) attack {
		return attack{expect: expect, why: "generated: " + why, sql: sql}
	}
	columns := func(n int) string {
		names := make([]string, n)
		for i := range names {
			names[i] = fmt.Sprintf("%d AS c%d", i, i)
		}
		return "SELECT " + strings.Join(names, ", ")
	}
	return []attack{
		long(fails, "10,000 parentheses deep", "SELECT "+strings.Repeat("(", 10000)+"1"+strings.Repeat(")", 10000)),
		long(fails, "100,000 parentheses deep", "SELECT "+strings.Repeat("(", 100000)+"1"+strings.Repeat(")", 100000)),
		long(harmless, "10,000 subqueries deep", strings.Repeat("SELECT * FROM (", 10000)+"SELECT 1"+strings.Repeat(") x", 10000)),
		long(harmless, "10,000 NOTs", "SELECT "+strings.Repeat("NOT ", 10000)+"true"),
		long(harmless, "10,000 casts", "SELECT 1"+strings.Repeat("::int", 10000)),
		long(harmless, "20,000 additions", "SELECT 1"+strings.Repeat("+1", 20000)),
		long(harmless, "1,000 unions", "SELECT 1"+strings.Repeat(" UNION ALL SELECT 1", 1000)),
		long(refused, "100,000 unfinished comments", "SELECT 1 "+strings.Repeat("/*", 100000)),
		long(harmless, "comments nested 5,000 deep", "SELECT 1 "+strings.Repeat("/*", 5000)+strings.Repeat("*/", 5000)),
		long(runs, "1,600 columns", columns(1600)),
		long(fails, "1,665 columns", columns(1665)),
		long(harmless, "a literal of 4 MiB", "SELECT length('"+strings.Repeat("x", 4<<20-100)+"')"),
		long(fails, "more than 4 MiB", "SELECT length('"+strings.Repeat("x", 4<<20)+"')"),
		long(fails, "a null byte", "SELECT 1\x00; DELETE FROM app.victim"),
		long(fails, "a null byte in a literal", "SELECT 'a\x00b'"),
		long(fails, "bytes that are no UTF-8", "SELECT '\xff\xfe\xc0\x80'"),
		long(fails, "overlong encoding of a quote", "SELECT '\xc0\xa7; DELETE FROM app.victim --'"),
		long(fails, "binary garbage", "\x01\x02\x03SELECT\x7f"),
		long(harmless, "100,000 elements of IN", "SELECT 1 WHERE 1 IN ("+strings.Repeat("2,", 100000)+"3)"),
		long(refused, "DELETE behind a literal of 3 MiB", "WITH x AS (DELETE FROM app.victim RETURNING id) SELECT '"+strings.Repeat("y", 3<<20)+"', id FROM x"),
		long(refused, "a notification behind 500 additions", "SELECT "+strings.Repeat("1+", 500)+"evil.notify_any()"),
		long(harmless, "an identifier of 100,000 bytes", "SELECT 1 AS \""+strings.Repeat("n", 100000)+"\""),
		long(harmless, "2,000 statements", strings.Repeat("SELECT 1;", 2000)),
		long(refused, "DELETE as the 1,001st statement", strings.Repeat("SELECT 1;", 1000)+"DELETE FROM app.victim"),
	}
}
