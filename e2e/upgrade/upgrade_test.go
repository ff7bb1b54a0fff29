//go:build upgrade

package upgrade

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/e2e/pgserver"
	"github.com/postern-dev/postern/e2e/stack"
)

const readerPassword = "e2e-only"

// bins are the directories with the programs of each version: "old" and "new".
var bins = map[string]string{}

var server *pgserver.Server

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("/var/tmp", "postern-upgrade-")
	if err == nil {
		defer os.RemoveAll(dir) //nolint:errcheck // a test's
		err = os.Chmod(dir, 0o755)
	}
	if err == nil {
		err = build(dir)
	}
	if err == nil {
		server, err = pgserver.Launch(context.Background(), pgserver.Options{})
	}
	if err == nil {
		defer server.Stop() //nolint:errcheck // a test's
		err = server.CreateRole(context.Background(), "reader", readerPassword)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "upgrade:", err)
		return 1
	}
	return m.Run()
}

// build builds both versions.
func build(dir string) error {
	text, err := os.ReadFile("../../packaging/previous")
	if err != nil {
		return err
	}
	commit := strings.TrimSpace(string(text))
	source := filepath.Join(dir, "source")
	if err := os.Mkdir(source, 0o755); err != nil {
		return err
	}
	archive := exec.Command("/bin/sh", "-c", `git -C ../.. archive "$0" | tar -xf - -C "$1"`, commit, source)
	if out, err := archive.CombinedOutput(); err != nil {
		return fmt.Errorf("the version before, commit %s: %w: %s", commit, err, out)
	}
	if _, err := os.Stat(filepath.Join(source, "go.mod")); err != nil {
		return fmt.Errorf("the version before, commit %s, is not in this repository's history: fetch it whole (git fetch --unshallow)", commit)
	}
	for version, from := range map[string]string{"old": source, "new": "../.."} {
		bins[version] = filepath.Join(dir, version)
		cmd := exec.Command("go", "build", "-buildvcs=false", "-ldflags", "-X github.com/postern-dev/postern/proto.release="+version, "-o", bins[version]+"/", "./agentd", "./controlplane", "./client/postern")
		cmd.Dir, cmd.Env = from, append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("build the %s version: %w: %s", version, err, out)
		}
	}
	return nil
}

// programs is a directory with programs of these versions.
func programs(t *testing.T, controlplane, agentd, postern string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, version := range map[string]string{"controlplane": controlplane, "agentd": agentd, "postern": postern} {
		use(t, dir, name, version)
	}
	return dir
}

// use makes name in a directory of programs the one of a version.
func use(t *testing.T, dir, name, version string) {
	t.Helper()
	path := filepath.Join(dir, name)
	_ = os.Remove(path)
	if err := os.Symlink(filepath.Join(bins[version], name), path); err != nil {
		t.Fatal(err)
	}
}

// system is a control plane and an agent with a PostgreSQL, kernels and a workspace.
type system struct {
	t     *testing.T
	s     *stack.Stack
	agent *stack.Agent
}

func newSystem(t *testing.T, bin, database string) *system {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "pu-") // sockets have short names
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := server.CreateDatabase(t.Context(), database, "reader"); err != nil {
		t.Fatal(err)
	}
	s, err := stack.New(stack.Options{Bin: bin, Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			for _, a := range s.Agents {
				t.Logf("%s", a.Process.Tail(40))
			}
			t.Logf("%s", s.ControlPlane.Tail(40))
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := s.StartControlPlane(t.Context()); err != nil {
		t.Fatal(err)
	}
	source, err := stack.Source(dir, "db", server.SocketDSN("reader", database), readerPassword, "      mode: read-write\n")
	if err != nil {
		t.Fatal(err)
	}
	agent, err := s.Join(t.Context(), "host", "kernels: {warm: 0, uid_base: 1987000000}\nsources:\n"+source)
	if err != nil {
		t.Fatal(err)
	}
	return &system{t, s, agent}
}

// must runs the user's command.
func (x *system) must(args ...string) string {
	x.t.Helper()
	out, err := x.s.Postern(x.t.Context(), args...)
	if err != nil {
		x.t.Fatalf("postern %s: %v", strings.Join(args, " "), err)
	}
	return strings.TrimSpace(out)
}

func (x *system) want(want string, args ...string) {
	x.t.Helper()
	if got := x.must(args...); got != want {
		x.t.Errorf("postern %s: got %q, want %q", strings.Join(args, " "), got, want)
	}
}

// works asks for a bit of everything.
func (x *system) works(mark string) {
	x.t.Helper()
	x.must("sql", "host/db", "create table "+mark+" as select generate_series(1, 1000) as n")
	x.want("n\n500500", "sql", "host/db", "-f", "csv", "select sum(n) as n from "+mark)
	id := x.must("kernel", "start", "host")
	x.want("42", "kernel", "exec", id, "print(6*7)")
	x.must("kernel", "stop", id)
	file := filepath.Join(x.s.Dir, mark+".txt")
	if err := os.WriteFile(file, []byte(strings.Repeat(mark+"\n", 100_000)), 0o600); err != nil {
		x.t.Fatal(err)
	}
	x.must("file", "put", file, "papers:/"+mark)
	back := file + ".back"
	x.must("file", "get", "papers:/"+mark, back)
	a, aerr := os.ReadFile(file)
	b, berr := os.ReadFile(back)
	if aerr != nil || berr != nil || string(a) != string(b) {
		x.t.Errorf("the file came back with %d bytes of %d (%v, %v)", len(b), len(a), aerr, berr)
	}
	x.must("query", "list")
	x.must("audit", "verify")
	x.must("source", "check", "host/db")
}

// TestUpgradeMatrix: each version of the control plane with each of the agent and of the
// user's command.
func TestUpgradeMatrix(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("kernels need root: run make upgrade-test as root")
	}
	n := 0
	for _, controlplane := range []string{"old", "new"} {
		for _, agentd := range []string{"old", "new"} {
			if controlplane == "old" && agentd == "old" {
				continue
			}
			for _, postern := range []string{"old", "new"} {
				n++
				mark := fmt.Sprintf("matrix%d", n)
				t.Run(fmt.Sprintf("controlplane %s, agentd %s, postern %s", controlplane, agentd, postern), func(t *testing.T) {
					newSystem(t, programs(t, controlplane, agentd, postern), mark).works(mark)
				})
			}
		}
	}
}

// TestUpgradeInPlace upgrades first the control plane, then the agent, of a system that is
// in use, and then goes back: an upgrade ends no work, and state is read by either.
func TestUpgradeInPlace(t *testing.T) {
	bin := programs(t, "old", "old", "old")
	x := newSystem(t, bin, "inplace")
	x.works("before")
	id := x.must("kernel", "start", "host")
	x.must("kernel", "exec", id, "x = 41")
	online := func(version string) {
		t.Helper()
		ctx, done := context.WithTimeout(t.Context(), 2*time.Minute)
		defer done()
		if err := x.agent.Online(ctx); err != nil {
			t.Fatal(err)
		}
		if got := x.must("agent", "show", "host", "-o", "json"); !strings.Contains(got, version) {
			t.Errorf("the agent is not the %s one: %s", version, got)
		}
	}
	replace := func(name, version string) {
		t.Helper()
		use(t, bin, name, version)
		var err error
		if name == "controlplane" {
			if err = x.s.ControlPlane.Stop(time.Minute); err == nil {
				err = x.s.StartControlPlane(t.Context())
			}
		} else if err = x.agent.Process.Stop(time.Minute); err == nil {
			err = x.agent.Start()
		}
		if err != nil {
			t.Fatalf("replace %s: %v", name, err)
		}
	}
	replace("controlplane", "new")
	online("old")
	x.works("controlplane")
	use(t, bin, "postern", "new")
	replace("agentd", "new")
	online("new")
	x.want("42", "kernel", "exec", id, "x += 1; print(x)")
	x.works("agent")
	// The agent goes back; the control plane's database does not.
	replace("agentd", "old")
	online("old")
	x.want("43", "kernel", "exec", id, "x += 1; print(x)")
	x.works("back")
	for _, mark := range []string{"before", "controlplane", "agent"} {
		x.must("file", "get", "papers:/"+mark, filepath.Join(x.s.Dir, mark+".again"))
	}
	x.must("kernel", "stop", id)
}
