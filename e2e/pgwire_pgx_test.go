//go:build clients

package e2e

import (
	"bufio"
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// pgxPackages are those of pgx whose tests talk to a server.
var pgxPackages = []string{".", "./pgconn", "./pgtype", "./pgtype/zeronull", "./pgxpool", "./stdlib", "./tracelog", "./multitracer", "./log/testingadapter", "./examples/..."}

// pgxExceptions are the tests of pgx v5 that do not pass through Postern, each with the
// reason; a name ends in * for all that begin so. Everything else has to pass.
var pgxExceptions = map[string]string{
	".TestSendBatchHandlesTimeoutBetweenParseAndDescribe*":              pause,
	".TestPrepareHandlesTimeoutBetweenParseAndDescribe":                 pause,
	".TestPrepareWithDigestedNameHandlesTimeoutBetweenParseAndDescribe": pause,
	".TestBeginTxFatalErrorKillsConn":                                   kills,
	".TestFatalTxError":                                                 kills,
	".TestFatalRxError":                                                 kills,
	"pgconn.TestConnCopyFromConnectionTerminated":                       kills,
	"pgxpool.TestConnDestroyedWhenBeginFailsFatally":                    kills,
	"pgxpool.TestPoolAcquireChecksIdleConns":                            kills,
	"stdlib.TestCheckIdleConn":                                          kills,
	".TestConnSimpleProtocolRefusesNonStandardConformingStrings":        "standard_conforming_strings stays on: the parser takes it for granted",
	".TestConnSimpleProtocolRefusesNonUTF8ClientEncoding":               "client_encoding stays UTF8",
	"pgconn.TestConnLargeResponseWhileWritingDoesNotDeadlock":           "client_min_messages goes down to notice: what the server says for debugging is not for clients",
	".TestConnect":                        "it wants dbname and user to be those of the database; ours are AGENT/SOURCE and a token's name",
	"pgconn.TestConnectProtocolVersion32": "it wants the cancel keys of PostgreSQL before 18, four bytes long; ours have 32 in protocol 3.2",
}

// Reasons of several exceptions.
const (
	pause = "the client waits between two messages of a cycle for the server's statement_timeout; the server gets a cycle at once, and does not see the pause"
	kills = "it ends a backend by pg_terminate_backend, which acts outside of the database and is refused"
)

// TestPgxSuite runs pgx's own tests against a read-write source.
func TestPgxSuite(t *testing.T) {
	e := newEndpoint(t, "pgx_test", append(shop[:len(shop):len(shop)],
		"create extension hstore", "create extension ltree", "create domain uint64 as numeric(20,0)"), "      concurrency: 8\n")
	source, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "github.com/jackc/pgx/v5").Output()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "pgx")
	if out, err := exec.CommandContext(t.Context(), "cp", "-r", "--no-preserve=mode", strings.TrimSpace(string(source)), dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	command := exec.CommandContext(t.Context(), "go", append([]string{"test", "-mod=mod", "-json", "-count=1", "-p", "1", "-timeout", "10m"}, pgxPackages...)...)
	command.Dir = dir
	command.Env = append(os.Environ(), "GOFLAGS=", "GOWORK=off", "PGX_TEST_DATABASE="+e.dsn("desk", ""))
	command.WaitDelay = time.Minute
	var stderr bytes.Buffer
	command.Stderr = &stderr
	stdout, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	var failed []string
	said := make(map[string][]string)
	passed, skipped := 0, 0
	met := make(map[string]bool)
	for lines := bufio.NewScanner(stdout); lines.Scan(); {
		var line struct{ Action, Package, Test, Output string }
		if json.Unmarshal(lines.Bytes(), &line) != nil {
			continue
		}
		name := strings.TrimPrefix(strings.TrimPrefix(line.Package, "github.com/jackc/pgx/v5"), "/") + "." + line.Test
		switch line.Action {
		case "output":
			if len(said[name]) < 40 {
				said[name] = append(said[name], line.Output)
			}
		case "pass":
			passed++
			delete(said, name)
		case "skip":
			skipped++
		case "fail":
			failed = append(failed, name)
		}
	}
	_ = command.Wait() // it says so when tests fail
	for _, name := range failed {
		known := slices.IndexFunc(keysOf(pgxExceptions), func(k string) bool {
			return k == name || strings.HasSuffix(k, "*") && strings.HasPrefix(name, strings.TrimSuffix(k, "*"))
		})
		if known >= 0 {
			met[keysOf(pgxExceptions)[known]] = true
			continue
		}
		if slices.ContainsFunc(failed, func(other string) bool { return strings.HasPrefix(other, name+"/") }) || strings.HasSuffix(name, ".") {
			continue // a part of it failed, which counts
		}
		t.Errorf("%s:\n%s", name, strings.Join(said[name], ""))
	}
	for name, why := range pgxExceptions {
		if !met[name] {
			t.Errorf("%s passes now: take it off the list (%s)", name, why)
		}
	}
	t.Logf("%d passed, %d skipped, %d failed", passed, skipped, len(failed))
	if passed < 2000 {
		t.Errorf("only %d tests passed: %s", passed, stderr.String())
	}
}

func keysOf(m map[string]string) []string {
	var list []string
	for k := range m {
		list = append(list, k)
	}
	slices.Sort(list)
	return list
}
