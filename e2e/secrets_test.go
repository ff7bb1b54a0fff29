package e2e

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"encoding/base32"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/e2e/pgserver"
	"github.com/postern-dev/postern/e2e/stack"
	"github.com/postern-dev/postern/proto/regkey"
)

// secrets are the values that must not be found, each in many spellings.
type secrets struct {
	needles map[string][]byte // by name and spelling
}

func (s *secrets) add(name string, raw []byte) {
	if len(raw) < 12 {
		panic(name + " is too short to be searched for")
	}
	spell := func(how string, text []byte) { s.needles[name+", "+how] = text }
	spell("plain", raw)
	spell("hex", []byte(hex.EncodeToString(raw)))
	spell("HEX", bytes.ToUpper([]byte(hex.EncodeToString(raw))))
	// Base 64 looks different by where it begins; what every text with the secret
	// in it has is the part without the ends.
	for offset := range 3 {
		for kind, encoding := range map[string]*base64.Encoding{"base64": base64.RawStdEncoding, "base64url": base64.RawURLEncoding} {
			text := encoding.EncodeToString(append(make([]byte, offset), raw...))
			first := (offset*8 + 5) / 6
			last := (offset + len(raw)) * 8 / 6
			spell(fmt.Sprintf("%s at %d", kind, offset), []byte(text[first:last]))
		}
	}
	var escaped bytes.Buffer // as in a Go error or JSON of bytes
	for _, b := range raw {
		fmt.Fprintf(&escaped, "%d ", b)
	}
	spell("as numbers", bytes.TrimSpace(escaped.Bytes()))
}

// in names the secrets that a text holds.
func (s *secrets) in(text []byte) (found []string) {
	for name, needle := range s.needles {
		if bytes.Contains(text, needle) {
			found = append(found, name)
		}
	}
	return found
}

func (s *secrets) check(t *testing.T, where string, text []byte) {
	t.Helper()
	for _, name := range s.in(text) {
		t.Errorf("%s holds a secret: %s", where, name)
	}
}

// checkDir searches all files below a directory but those that must hold secrets,
// by their names relative to it.
func (s *secrets) checkDir(t *testing.T, dir string, but ...string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		for _, b := range but {
			if b == name {
				return nil
			}
		}
		text, err := os.ReadFile(path)
		if err == nil {
			s.check(t, path, text)
			s.check(t, path+"'s name", []byte(name))
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// checkProcesses searches what every process of the machine shows of itself.
func (s *secrets) checkProcesses(t *testing.T, when string) {
	t.Helper()
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil || len(dirs) < 3 {
		t.Fatal(dirs, err)
	}
	for _, dir := range dirs {
		for _, file := range []string{"cmdline", "environ", "comm", "status"} {
			text, err := os.ReadFile(filepath.Join(dir, file))
			if err == nil && len(s.in(text)) > 0 {
				cmdline, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
				s.check(t, fmt.Sprintf("%s: %s/%s of %.80q", when, dir, file, cmdline), text)
			}
		}
	}
}

// memoryHolds reports whether a process's memory has a text in it.
func memoryHolds(t *testing.T, pid int, text []byte) bool {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	memory, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer memory.Close()
	for line := range strings.Lines(string(maps)) {
		var from, to int64
		var mode string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &mode); err != nil || !strings.HasPrefix(mode, "rw") {
			continue
		}
		const window = 4 << 20
		buffer := make([]byte, window+len(text))
		for at := from; at < to; at += window {
			n, _ := memory.ReadAt(buffer[:min(int64(len(buffer)), to-at)], at)
			if bytes.Contains(buffer[:n], text) {
				return true
			}
		}
	}
	return false
}

// marked makes a secret that is one of a kind.
func marked(kind string) string { return "marked-" + kind + "-" + rand.Text()[:16] }

// TestSecrets plants secrets everywhere one may be, uses the system, makes it fail
// and crash, and then searches for them wherever they must not be.
func TestSecrets(t *testing.T) {
	needRoot(t)
	for _, engine := range []string{"sqlite", "postgres"} {
		t.Run(engine, func(t *testing.T) { testSecrets(t, engine) })
	}
}

func testSecrets(t *testing.T, engine string) {
	wanted := &secrets{needles: map[string][]byte{}}
	plant := func(kind string) string {
		text := marked(kind)
		wanted.add(kind, []byte(text))
		return text
	}
	ctx := t.Context()
	pg := pgserver.Start(t, pgserver.Options{Settings: map[string]string{"log_connections": "on", "log_min_messages": "log"}})
	byFile, byEnv, byCredential := plant("password-by-file"), plant("password-by-env"), plant("password-by-credential")
	wrong, typed := plant("wrong-password"), plant("password-in-a-dsn")
	for name, password := range map[string]string{"by_file": byFile, "by_env": byEnv, "by_credential": byCredential, "by_wrong": marked("right")} {
		if err := pg.CreateRole(ctx, name, password); err != nil {
			t.Fatal(err)
		}
	}
	o := stack.Options{Bin: ownBinaries(t), Dir: shortDir(t), Args: []string{"--log-level", "debug"}, Env: []string{"GOTRACEBACK=crash"}}
	secretFiles := []string{"controlplane/master.key", "controlplane/admin.token", "agent-host/state/identity/key.pem", "db.pw", "wrong.pw", "credentials/db-password", "cpdb.pw", "key", "analyst.token"}
	if engine == "postgres" {
		password := plant("control-plane-database-password")
		file := filepath.Join(o.Dir, "cpdb.pw")
		err := errors.Join(os.WriteFile(file, []byte(password+"\n"), 0o600), pg.CreateRole(ctx, "cp", password), pg.CreateDatabase(ctx, "cp", "cp"))
		if err != nil {
			t.Fatal(err)
		}
		o.Args = append(o.Args, "--database", fmt.Sprintf("postgres://cp@127.0.0.1:%d/cp?sslmode=disable", pg.Port), "--database-password-file", file)
	}
	s, err := stack.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil && !t.Failed() {
			t.Error(err)
		}
	})
	unlimitCore(t)
	startControlPlane(t, s)
	addToken(t, wanted, "admin token", readSecret(t, s.TokenFile))

	// From here on every command is postern or agentd below: all that they print
	// is kept, but what prints a secret on purpose.
	var printed bytes.Buffer
	keep := func(e ended) ended {
		fmt.Fprintf(&printed, "%s\n%s\n", e.stdout, e.stderr)
		return e
	}
	run := func(args ...string) ended {
		cmd := s.Command(ctx, append(args, "--token-file", s.TokenFile)...)
		cmd.Env = without(cmd.Env, "POSTERN_TOKEN")
		return finish(t, cmd)
	}
	making := func(args ...string) string {
		e := run(args...)
		if e.code != 0 {
			t.Fatal(e.stderr)
		}
		printed.WriteString(e.stderr)
		return strings.TrimSpace(e.stdout)
	}
	analyst := making("token", "create", "analyst", "--role", "analyst")
	addToken(t, wanted, "analyst's token", analyst)
	keyText := making("key", "create")
	addKey(t, wanted, "registration key", keyText)
	spare := making("key", "create")
	addKey(t, wanted, "unused registration key", spare)

	// The host: three sources, each with its password from another place, and one
	// with a wrong one.
	a, err := s.NewAgent("host", "")
	if err != nil {
		t.Fatal(err)
	}
	credentials := filepath.Join(s.Dir, "credentials")
	err = errors.Join(os.Mkdir(credentials, 0o700), os.WriteFile(filepath.Join(credentials, "db-password"), []byte(byCredential), 0o400),
		os.WriteFile(filepath.Join(s.Dir, "db.pw"), []byte(byFile+"\n"), 0o600), os.WriteFile(filepath.Join(s.Dir, "wrong.pw"), []byte(wrong+"\n"), 0o600),
		os.WriteFile(filepath.Join(s.Dir, "key"), []byte(keyText), 0o600), os.WriteFile(filepath.Join(s.Dir, "analyst.token"), []byte(analyst), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	config := "log: {level: debug}\nsources:\n"
	for name, password := range map[string]string{
		"by_file": "{file: " + filepath.Join(s.Dir, "db.pw") + "}", "by_env": "{env: DB_PASSWORD}", "by_credential": "{credential: db-password}",
		"by_wrong": "{file: " + filepath.Join(s.Dir, "wrong.pw") + "}",
	} {
		config += fmt.Sprintf("  - name: %s\n    engine: postgres\n    dsn: %s\n    password: %s\n", name, pg.DSN(name, "postgres"), password)
	}
	a.Config = config
	a.Env = []string{"DB_PASSWORD=" + byEnv, "CREDENTIALS_DIRECTORY=" + credentials, "GOTRACEBACK=crash"}
	if err := a.WriteConfig(); err != nil {
		t.Fatal(err)
	}
	// While it registers.
	cmd := registerCommand(t, a, "--key-file", filepath.Join(s.Dir, "key"))
	cmd.Env = without(cmd.Env, "DB_PASSWORD")
	if e := keep(finish(t, cmd)); e.code != 0 {
		t.Fatal(e.stderr)
	}
	wanted.add("agent's key", privateKey(t, readSecret(t, filepath.Join(a.StateDir(), "identity", "key.pem"))))
	startKept := func() {
		t.Helper()
		if err := a.Start(); err != nil {
			t.Fatal(err)
		}
		eventually(t, 30*time.Second, "the host is online", func() error {
			if e := run("agent", "show", "host", "-o", "json"); !strings.Contains(e.stdout, `"online": true`) {
				return errors.New(e.stdout + e.stderr)
			}
			return nil
		})
	}
	startKept()
	wanted.checkProcesses(t, "after the start")

	// Use it, all of it; statements that run show what runs beside them.
	for _, source := range []string{"by_file", "by_env", "by_credential"} {
		if e := keep(run("sql", "host/"+source, "select current_user")); e.code != 0 || !strings.Contains(e.stdout, source) {
			t.Errorf("%s: exit code %d: %s", source, e.code, e.stderr)
		}
	}
	long := s.Command(ctx, "sql", "host/by_file", "select pg_sleep(30)", "--token-file", filepath.Join(s.Dir, "analyst.token"))
	long.Env = without(long.Env, "POSTERN_TOKEN")
	if err := long.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, "a statement runs", func() error {
		if e := run("query", "list", "--running", "-o", "json"); !strings.Contains(e.stdout, "pg_sleep") {
			return errors.New(e.stdout)
		}
		return nil
	})
	wanted.checkProcesses(t, "during a statement")
	children := a.Process.Children()
	if len(children) == 0 {
		t.Fatal("agentd has no children")
	}
	for _, child := range children {
		// A session that is being started is agentd itself until its exec, and may end by itself.
		eventually(t, 30*time.Second, "a child shows nothing", func() error {
			environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", child))
			switch {
			case errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH):
				return nil
			case err != nil || len(environ) != 0:
				return fmt.Errorf("its environment is %q, %w: want none", environ, err)
			}
			return coreLimit(child)
		})
	}
	// What reads the network for agentd has no secret of the host to lose.
	uplinks := a.Process.ChildrenNamed("uplink")
	if len(uplinks) != 1 {
		t.Fatalf("agentd has the uplinks %v, want one", uplinks)
	}
	for name, needle := range wanted.needles {
		if memoryHolds(t, uplinks[0], needle) {
			t.Errorf("the uplink's memory holds the %s", name)
		}
	}
	uncored(t, "agentd", a.Process.PID())
	uncored(t, "control plane", s.ControlPlane.PID())

	// The control plane's memory never has the data sources' passwords or the
	// host's key; the search is good, for agentd's has.
	if !memoryHolds(t, a.Process.PID(), []byte(byEnv)) {
		t.Error("agentd's memory does not hold a password that it keeps: the search is broken")
	}
	for _, name := range []string{"password-by-file, plain", "password-by-env, plain", "password-by-credential, plain", "wrong-password, plain", "agent's key, plain"} {
		if memoryHolds(t, s.ControlPlane.PID(), wanted.needles[name]) {
			t.Errorf("the control plane's memory holds the %s", name)
		}
	}

	// Make everything fail.
	fails := func(code int, e ended) {
		t.Helper()
		if keep(e); e.code != code {
			t.Errorf("exit code %d, want %d: %s%s", e.code, code, e.stdout, e.stderr)
		}
	}
	fails(1, run("sql", "host/by_wrong", "select 1"))
	fails(1, run("source", "check", "host/by_wrong"))
	fails(0, run("source", "check", "host/by_env"))
	fails(1, finish(t, a.Command(ctx, "doctor", "--config", a.ConfigFile(), "--state", a.StateDir(), "--runtime", a.RuntimeDir(), "-o", "json")))
	fails(0, finish(t, a.Command(ctx, "status", "--state", a.StateDir(), "--runtime", a.RuntimeDir(), "-o", "json")))
	fails(1, registerShifted(t, s, "other", spare[:len(spare)-1]+"?", 0).ended)
	fails(2, finish(t, registerCommand(t, hostNamed(t, s, "other"), "--key-file", spare)))
	fails(2, finish(t, registerCommand(t, hostNamed(t, s, "other"), "--name", spare, "--key-file", "-")))
	bad := hostNamed(t, s, "other")
	bad.Config = "sources:\n  - name: db\n    engine: postgres\n    dsn: host=h user=u dbname=d password=" + typed + "\n"
	if err := bad.WriteConfig(); err != nil {
		t.Fatal(err)
	}
	fails(1, finish(t, bad.Command(ctx, "run", "--config", bad.ConfigFile(), "--state", bad.StateDir())))
	fails(2, finish(t, exec.Command(filepath.Join(s.Bin, "postern"), "sql", "--token", analyst, "host/by_file", "select 1")))
	fails(3, finish(t, withEnv(s.Command(ctx, "agent", "list"), "POSTERN_TOKEN="+analyst[:len(analyst)-2]+"aa")))
	if engine == "postgres" {
		dsn := fmt.Sprintf("postgres://cp:%s@127.0.0.1:%d/cp", typed, pg.Port)
		fails(1, finish(t, exec.Command(filepath.Join(s.Bin, "controlplane"), "serve", "--data", filepath.Join(s.Dir, "none"), "--database", dsn)))
	}
	for _, listing := range [][]string{{"agent", "list"}, {"agent", "show", "host"}, {"key", "list"}, {"token", "list"}, {"source", "list"}, {"query", "list"}, {"ca", "show"}, {"org", "list"}, {"status"}, {"audit", "list", "--limit", "1000"}, {"audit", "list", "--agent", "host"}, {"audit", "verify"}} {
		fails(0, run(append(listing, "-o", "json")...))
	}
	metrics := fetch(t, s.URL+"/metrics", readSecret(t, s.TokenFile))
	printed.Write(metrics)

	// Crash each with a core file switched on by whoever started it.
	long.Process.Kill() //nolint:errcheck // its statement is of no more use
	long.Wait()         //nolint:errcheck // it was killed
	for _, child := range children {
		syscall.Kill(child, syscall.SIGABRT) //nolint:errcheck // it may have ended by itself
	}
	crash(t, "agentd", a.Process)
	startKept() // it tells of what was lost
	fails(0, run("sql", "host/by_file", "select 1"))
	stop(t, a.Process)
	crash(t, "control plane", s.ControlPlane)
	startControlPlane(t, s)
	stop(t, s.ControlPlane)
	cores, err := filepath.Glob("core*")
	if err != nil {
		t.Fatal(err)
	}
	for _, core := range cores {
		t.Errorf("a core file is left: %s", core)
		os.Remove(core) //nolint:errcheck // the test has failed already
	}
	addAuthority(t, s, wanted, engine)

	// Search.
	wanted.check(t, "what commands printed", printed.Bytes())
	wanted.checkDir(t, s.Dir, append(secretFiles, "agent-other/agentd.yaml")...)
	serverLog, err := os.ReadFile(pg.LogFile())
	if err != nil {
		t.Fatal(err)
	}
	wanted.check(t, "PostgreSQL's log", serverLog)
	dump := exec.Command(pg.Bin("pg_dumpall"), "--no-role-passwords", "-h", pg.Host, "-p", strconv.Itoa(pg.Port), "-U", pgserver.Superuser)
	dump.Env = append(os.Environ(), "PGPASSWORD="+pg.Password)
	text, err := dump.Output()
	if err != nil || (engine == "postgres" && !bytes.Contains(text, []byte("COPY public.registration_keys"))) {
		t.Fatalf("pg_dumpall: %v, %d bytes", err, len(text))
	}
	wanted.check(t, "the databases", text)
	// The search finds what is there: the files that were passed over.
	for _, file := range secretFiles {
		text, err := os.ReadFile(filepath.Join(s.Dir, file))
		if file == "cpdb.pw" && engine == "sqlite" {
			continue
		}
		if err != nil || len(wanted.in(text)) == 0 && !strings.HasSuffix(file, "key.pem") {
			t.Errorf("%s: no secret was found in it: %v", file, err)
		}
	}
}

func readSecret(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(text))
}

// base32Secret is the alphabet of keys and tokens.
var base32Secret = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

func addToken(t *testing.T, s *secrets, name, text string) {
	t.Helper()
	body := text[strings.LastIndexByte(text, '_')+1:]
	raw, err := base32Secret.DecodeString(body)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	s.add(name, []byte(body))
	s.add(name+"'s bytes", raw[:32])
}

func addKey(t *testing.T, s *secrets, name, text string) {
	t.Helper()
	key, err := regkey.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	// Between the id and the fingerprint, which are public.
	s.add(name, []byte(text[len("prk1_")+16:len("prk1_")+16+51]))
	s.add(name+"'s bytes", key.Secret[:])
}

// privateKey is the secret number of a key in PEM.
func privateKey(t *testing.T, text string) []byte {
	t.Helper()
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		t.Fatal("no PEM")
	}
	return privateNumber(t, block.Bytes)
}

func privateNumber(t *testing.T, der []byte) []byte {
	t.Helper()
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := key.(*ecdsa.PrivateKey).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// addAuthority unseals the CA's key the way the control plane does.
func addAuthority(t *testing.T, s *stack.Stack, wanted *secrets, engine string) {
	t.Helper()
	master, err := os.ReadFile(filepath.Join(s.DataDir(), "master.key"))
	if err != nil {
		t.Fatal(err)
	}
	wanted.add("master key", master)
	cfg := store.Config{SQLitePath: filepath.Join(s.DataDir(), "controlplane.db"), Logger: slog.New(slog.DiscardHandler)}
	if engine == "postgres" {
		cfg.SQLitePath, cfg.PostgresDSN, cfg.PasswordFile = "", s.Args[3], s.Args[5]
	}
	db, err := store.Open(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	authorities, err := db.ListAuthorities(t.Context())
	if err != nil || len(authorities) != 1 {
		t.Fatal(authorities, err)
	}
	sealed, err := db.SealedAuthorityKey(t.Context(), authorities[0].Fingerprint)
	if err != nil {
		t.Fatal(err)
	}
	block, err := aes.NewCipher(master)
	if err != nil {
		t.Fatal(err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	plain, err := aead.Open(nil, sealed[:aead.NonceSize()], sealed[aead.NonceSize():], []byte(authorities[0].Fingerprint))
	if err != nil {
		t.Fatal(err)
	}
	wanted.add("CA's key", privateNumber(t, plain))
}

// unlimitCore lets what this process starts leave core files, for the length of
// the test, and shows that such a file would be noticed.
func unlimitCore(t *testing.T) {
	t.Helper()
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &was); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{Cur: was.Max, Max: was.Max}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Setrlimit(unix.RLIMIT_CORE, &was); err != nil {
			t.Error(err)
		}
	})
	if was.Max == 0 {
		t.Log("core files are forbidden here: that none is left proves little")
		return
	}
	sleep := exec.Command("sleep", "60")
	sleep.Dir = t.TempDir()
	if err := sleep.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, "sleep runs", func() error { // not the fork of ourselves
		comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", sleep.Process.Pid))
		if string(comm) != "sleep\n" {
			return fmt.Errorf("it is %q, %v", comm, err)
		}
		return nil
	})
	sleep.Process.Signal(syscall.SIGABRT) //nolint:errcheck // it runs
	sleep.Wait()                          //nolint:errcheck // it was killed
	if !sleep.ProcessState.Sys().(syscall.WaitStatus).CoreDump() {
		t.Log("this machine writes no core files: that none is left proves little")
	}
}

// uncored checks that the kernel would write no core file of a process, whatever
// it was started with.
func uncored(t *testing.T, name string, pid int) {
	t.Helper()
	if err := coreLimit(pid); err != nil {
		t.Errorf("%s: %v", name, err)
	}
}

// coreLimit is uncored for a process that may have ended.
func coreLimit(pid int) error {
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(limits)) {
		if rest, ok := strings.CutPrefix(line, "Max core file size"); ok && strings.Join(strings.Fields(rest)[:2], " ") != "0 0" {
			return fmt.Errorf("it may leave core files: %s", strings.TrimSpace(line))
		}
	}
	return nil
}

// crash has a program abort as if by a bug, and checks that no core file was
// written.
func crash(t *testing.T, name string, p *stack.Process) {
	t.Helper()
	p.Signal(syscall.SIGABRT)
	select {
	case <-p.Done():
	case <-time.After(2 * time.Minute):
		t.Fatalf("%s did not end", name)
	}
	var exit *exec.ExitError
	if !errors.As(p.Err(), &exit) {
		t.Fatalf("%s ended with %v", name, p.Err())
	}
	status := exit.Sys().(syscall.WaitStatus)
	if !status.Signaled() {
		t.Errorf("%s ended with %v, want by a signal", name, exit)
	}
	if status.CoreDump() {
		t.Errorf("%s left a core file", name)
	}
}

func without(env []string, name string) []string {
	var left []string
	for _, kv := range env {
		if !strings.HasPrefix(kv, name+"=") {
			left = append(left, kv)
		}
	}
	return left
}

func withEnv(cmd *exec.Cmd, kv string) *exec.Cmd {
	cmd.Env = append(cmd.Env, kv)
	return cmd
}
