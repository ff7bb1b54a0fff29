//go:build hosttest

package hosttest

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/postern-dev/postern/e2e/testhost"
)

const (
	oldVersion = "1.0.0"
	newVersion = "1.1.0"
	// patience is how long a state may take to come; a busy machine needs much.
	patience = 2 * time.Minute
)

var long = os.Getenv("POSTERN_LONG") == "1"

func suites() []string {
	if s := os.Getenv("POSTERN_SUITES"); s != "" {
		return strings.Fields(s)
	}
	return []string{"trixie", "bookworm"}
}

// built are the packages' directories by version, built by the first that asks, or
// given by POSTERN_DEBS as DIRECTORY/VERSION.
var built = struct {
	sync.Mutex
	dir  string
	done map[string]bool
}{done: map[string]bool{}}

func TestMain(m *testing.M) {
	built.dir = os.Getenv("POSTERN_DEBS")
	made := ""
	if built.dir == "" {
		var err error
		if made, err = os.MkdirTemp("/var/tmp", "postern-debs-"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		built.dir = made
	}
	code := m.Run()
	if made != "" {
		_ = os.RemoveAll(made)
	}
	os.Exit(code)
}

// debs is the directory of the packages of a version.
func debs(t *testing.T, version string) string {
	t.Helper()
	built.Lock()
	defer built.Unlock()
	dir := filepath.Join(built.dir, version)
	if found, _ := filepath.Glob(filepath.Join(dir, "postern-agentd_*.deb")); len(found) == 1 || built.done[version] {
		return dir
	}
	arch, err := exec.Command("go", "env", "GOHOSTARCH").Output()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("../../packaging/packages.sh", strings.TrimSpace(string(arch)))
	cmd.Env = append(os.Environ(), "QUICK=1", "KINDS=deb", "TAGS=posterncriushim", "DIST="+dir, "RELEASE="+version)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("packages: %v: %s", err, out)
	}
	built.done[version] = true
	return dir
}

// host is a booted host with the control plane, the agent and a user on it.
type host struct {
	t *testing.T
	*testhost.Host
	suite string
}

// boot boots a host with nothing of ours on it but the packages in /debs.
func boot(t *testing.T, suite string) *host {
	t.Helper()
	return bootWith(t, suite, "/dev/fuse")
}

// bootWith is boot with these devices alone.
func bootWith(t *testing.T, suite string, devices ...string) *host {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("the tests of hosts need root: run make host-test as root")
	}
	dir, err := os.MkdirTemp("/var/tmp", "postern-host-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	name := fmt.Sprintf("h%d-%s", os.Getpid(), filepath.Base(dir)[len("postern-host-"):])
	h, err := testhost.Boot(t.Context(), testhost.Config{Name: name, Suite: suite, Dir: dir, Devices: devices})
	if err != nil {
		t.Fatal(err)
	}
	x := &host{t: t, Host: h, suite: suite}
	t.Cleanup(func() {
		if t.Failed() {
			x.tell()
		}
		if err := h.Destroy(); err != nil {
			t.Error(err)
		}
	})
	for _, version := range []string{oldVersion, newVersion} {
		files, err := filepath.Glob(filepath.Join(debs(t, version), "*.deb"))
		if err != nil || len(files) != 3 {
			t.Fatalf("packages of %s: %q, %v", version, files, err)
		}
		for _, f := range files {
			x.must(h.Copy(t.Context(), f, "/debs/"+version+"/"+filepath.Base(f), 0o644))
		}
	}
	return x
}

// tell logs what went on inside.
func (h *host) tell() {
	ctx, done := context.WithTimeout(context.Background(), 30*time.Second)
	defer done()
	for _, argv := range [][]string{
		{"journalctl", "--no-pager", "-n", "80", "-o", "short-monotonic", "-u", "agentd", "-u", "agentd-mountd", "-u", "controlplane"},
		{"systemctl", "--no-pager", "status", "agentd", "controlplane"},
	} {
		out, err := h.Run(ctx, argv...)
		h.t.Logf("%s (%v):\n%s", strings.Join(argv, " "), err, out)
	}
}

func (h *host) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

// run runs a command inside, which must work.
func (h *host) run(argv ...string) string {
	h.t.Helper()
	out, err := h.Run(h.t.Context(), argv...)
	h.must(err)
	return strings.TrimSpace(out)
}

// sh runs a script inside, which must work.
func (h *host) sh(script string) string {
	h.t.Helper()
	return h.run("/bin/sh", "-euc", script)
}

// fails runs a command that must fail with one line on stderr, and returns that.
func (h *host) fails(code int, argv ...string) string {
	h.t.Helper()
	_, err := h.Run(h.t.Context(), argv...)
	var exit *testhost.ExitError
	if !errors.As(err, &exit) || exit.Code != code {
		h.t.Fatalf("%v: got %v, want exit %d", argv, err, code)
	}
	line := strings.TrimSpace(exit.Stderr)
	if line == "" || strings.Contains(line, "\n") {
		h.t.Errorf("%v: says %q, want one line", argv, line)
	}
	return line
}

// until waits for a state.
func (h *host) until(what string, state func() error) {
	h.t.Helper()
	var err error
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if err = state(); err == nil {
			return
		}
		if h.t.Context().Err() != nil {
			break
		}
	}
	h.t.Fatalf("%s: not within %s: %v", what, patience, err)
}

// install installs a version of packages, as dpkg does.
func (h *host) install(version string, names ...string) {
	h.t.Helper()
	for i, n := range names {
		names[i] = "/debs/" + version + "/" + n + "_" + version + "-1_*.deb"
	}
	h.sh("dpkg --force-confold -i " + strings.Join(names, " "))
}

// postern runs the user's command as the admin.
func (h *host) postern(args ...string) string {
	h.t.Helper()
	return h.run(append([]string{"postern"}, h.asAdmin(args)...)...)
}

func (h *host) asAdmin(args []string) []string {
	return append([]string{"--url", "http://127.0.0.1:8080", "--token-file", "/var/lib/postern-controlplane/admin.token"}, args...)
}

func (h *host) tryPostern(args ...string) (string, error) {
	out, err := h.Run(h.t.Context(), append([]string{"postern"}, h.asAdmin(args)...)...)
	return strings.TrimSpace(out), err
}

// stderr is what a command that failed had to say.
func (h *host) stderr(err error) string {
	var exit *testhost.ExitError
	if errors.As(err, &exit) {
		return strings.TrimSpace(exit.Stderr)
	}
	return fmt.Sprint(err)
}

// property is one of a unit.
func (h *host) property(unit, name string) string {
	h.t.Helper()
	return h.run("systemctl", "show", "-P", name, unit)
}

func (h *host) mainPID(unit string) int {
	h.t.Helper()
	pid, err := strconv.Atoi(h.property(unit, "MainPID"))
	h.must(err)
	return pid
}

func (h *host) online() {
	h.t.Helper()
	h.until("the agent to be online", func() error {
		out, err := h.tryPostern("agent", "show", "db-host", "-o", "json")
		if err != nil {
			return err
		}
		var agent struct{ Online bool }
		if err := json.Unmarshal([]byte(out), &agent); err != nil {
			return err
		}
		if !agent.Online {
			return errors.New("offline")
		}
		return nil
	})
}

// sources are a SQLite and a PostgreSQL, both on the host.
const config = `url: http://127.0.0.1:8080
name: db-host
kernels: {}
attachments: {host_mounts: [/srv/postern]}
sources:
  - name: shop
    engine: sqlite
    dsn: path=/srv/shop.db
  - name: warehouse
    engine: postgres
    dsn: host=127.0.0.1 dbname=warehouse user=reader sslmode=require
    password: {file: /etc/postern/warehouse.pw}
    policy: {mode: read-write}
`

// prepare makes the databases and starts the control plane.
func (h *host) prepare() {
	h.t.Helper()
	h.sh(`
		systemctl start postgresql
		sqlite3 /srv/shop.db "create table items(id integer primary key, name text); insert into items(name) values ('anvil'),('rope'),('lamp')"
		umask 077; head -c 18 /dev/urandom | base64 >/etc/postern/warehouse.pw`)
	h.until("PostgreSQL", func() error {
		_, err := h.Run(h.t.Context(), "runuser", "-u", "postgres", "--", "psql", "-qc", "select 1")
		return err
	})
	h.sh(`
		pw=$(cat /etc/postern/warehouse.pw)
		printf "create role reader login password '%s'; create database warehouse owner reader;" "$pw" | sed 's/; /;\n/' | runuser -u postgres -- psql -q
		systemctl enable --now -q controlplane`)
	h.must(h.WriteFile("/etc/postern/agentd.yaml", []byte(config), 0o600))
}

// join puts a key in place.
func (h *host) key() {
	h.t.Helper()
	h.sh(`umask 077; postern ` + strings.Join(h.asAdmin([]string{"key", "create", "--ttl", "1h", "--uses", "1"}), " ") + ` >/etc/postern/registration.key`)
}

// joined is a host on which everything runs.
func joined(t *testing.T, suite, version string) *host {
	t.Helper()
	h := boot(t, suite)
	h.install(version, "postern-agentd", "postern-controlplane", "postern")
	h.prepare()
	h.key()
	h.run("systemctl", "enable", "--now", "-q", "agentd")
	h.online()
	return h
}

// query asks the host's SQLite and PostgreSQL.
func (h *host) query() {
	h.t.Helper()
	if got := h.postern("sql", "db-host/shop", "-f", "csv", "select count(*) as n from items"); got != "n\n3" {
		h.t.Errorf("SQLite: got %q", got)
	}
	if got := h.postern("sql", "db-host/warehouse", "-f", "csv", "select 6*7 as n"); got != "n\n42" {
		h.t.Errorf("PostgreSQL: got %q", got)
	}
}

// exec runs a cell.
func (h *host) exec(kernel, code string) string {
	h.t.Helper()
	return h.postern("kernel", "exec", kernel, code)
}

// shell is a `postern sql -i` that stays.
type shell struct {
	h   *host
	in  io.WriteCloser
	out *bufio.Scanner
	cmd *exec.Cmd
}

// hold opens a session that stays on a source.
func (h *host) hold(source string) *shell {
	h.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cmd := h.Command(ctx, append([]string{"postern"}, h.asAdmin([]string{"sql", "-i", "-f", "csv", source})...)...)
	in, err := cmd.StdinPipe()
	h.must(err)
	r, w, err := os.Pipe()
	h.must(err)
	cmd.Stdout, cmd.Stderr = w, w
	h.must(cmd.Start())
	_ = w.Close()
	s := &shell{h: h, in: in, out: bufio.NewScanner(r), cmd: cmd}
	h.t.Cleanup(func() {
		_ = in.Close()
		cancel()
		_ = cmd.Wait()
		_ = r.Close()
	})
	return s
}

// ask runs a statement and returns what came up to a mark that follows it.
func (s *shell) ask(sql string) string {
	s.h.t.Helper()
	mark := fmt.Sprintf("mark%d", time.Now().UnixNano())
	if _, err := fmt.Fprintf(s.in, "%s;\nselect '%s' as m;\n", sql, mark); err != nil {
		s.h.t.Fatal(err)
	}
	var lines []string
	for s.out.Scan() {
		if strings.HasSuffix(s.out.Text(), mark) {
			return strings.Join(lines, "\n")
		}
		lines = append(lines, s.out.Text())
	}
	s.h.t.Fatalf("the session's shell ended: %q", lines)
	return ""
}
