package e2e

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/e2e/stack"
	"github.com/postern-dev/postern/proto/regkey"
)

// TestKeyErrors shows agentd register every bad key. Each error is one line of
// its own with the right exit code and without the key; nothing is changed by
// it, on the host or at the control plane, and a good key works right after it.
func TestKeyErrors(t *testing.T) {
	s, other := newStack(t, stack.Options{}), newStack(t, stack.Options{})
	good := func() string { return must(t, s, "key", "create") }
	parsed := func(text string) regkey.Key {
		key, err := regkey.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	flip := func(text string, at int) string { // another character of the alphabet
		b := []byte(text)
		if b[at]++; b[at] > 'z' || b[at] == '8' {
			b[at] = 'c'
		}
		return string(b)
	}
	expiring := must(t, s, "key", "create", "--ttl", "1s")
	expired := time.Now().Add(1100 * time.Millisecond)
	revoked := good()
	must(t, s, "key", "revoke", parsed(revoked).ID)
	usedUp := good()
	if err := register(t, s, "first", usedUp).err(); err != nil {
		t.Fatal(err)
	}
	wrongSecret := parsed(good())
	wrongSecret.Secret[7] ^= 1
	disabled := organizationKey(t, s, "acme")
	must(t, s, "org", "disable", "acme")
	time.Sleep(time.Until(expired)) // the key's life is the control plane's to end

	type badKey struct {
		name, key string
		shift     time.Duration
		code      int
		says      string
	}
	cases := []badKey{
		{"empty", "", 0, 1, "it is empty"},
		{"no key at all", "swordfish", 0, 1, "it does not begin with prk1_"},
		{"garbled", flip(good(), 60), 0, 1, "its checksum does not match"},
		{"cut off", good()[:100], 0, 1, "it has the wrong length"},
		{"odd characters", strings.Replace(good(), "prk1_", "prk1_!", 1), 0, 1, "it has characters that no key has"},
		{"unknown", regkey.New(parsed(usedUp).Fingerprint).Encode(), 0, 3, "does not know this registration key"},
		{"expired", expiring, 0, 3, "the registration key expired on "},
		{"revoked", revoked, 0, 3, "the registration key was revoked on "},
		{"used up", usedUp, 0, 3, "the registration key is used up (1 of 1 uses)"},
		{"wrong control plane", must(t, other, "key", "create"), 0, 3, "this one presented another"},
		{"organization disabled", disabled, 0, 3, "organization acme is disabled"},
	}
	if canShiftClock {
		cases = append(cases,
			badKey{"clock ahead", good(), 10 * time.Minute, 1, "the host's clock is 10m0s ahead of the control plane's"},
			badKey{"clock behind", good(), -10 * time.Minute, 1, "the host's clock is 10m0s behind the control plane's"},
			badKey{"clock years behind", good(), -5 * 365 * 24 * time.Hour, 1, "this host's clock says "},
			badKey{"clock years ahead", good(), 5 * 365 * 24 * time.Hour, 1, "this host's clock says "},
		)
	}
	hosts := func() string { return must(t, s, "agent", "list", "-o", "json") }
	uses := func() string { return must(t, s, "key", "list", "-o", "json") }
	hostsBefore, usesBefore := hosts(), uses()
	lines := map[string]string{}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			r := registerShifted(t, s, "bad", tc.key, tc.shift)
			r.said(t, tc.code, "agentd: ", tc.says)
			if body := strings.TrimPrefix(tc.key, "prk1_"); len(body) > 50 && strings.Contains(r.stderr+r.stdout, body[20:50]) {
				t.Errorf("the error shows the key: %s", r.stderr)
			}
			if r.stdout != "" {
				t.Errorf("standard output: %s", r.stdout)
			}
			for _, file := range files(t, r.agent.StateDir()) {
				if file != "agentd.lock" {
					t.Errorf("%s is left", file)
				}
			}
			if was, twice := lines[r.stderr]; twice {
				t.Errorf("the same line as for %s: %s", was, r.stderr)
			}
			lines[r.stderr] = tc.name
		})
	}
	// The same line as for an unknown key, on purpose: who has only an id learns
	// nothing of it.
	register(t, s, "bad", wrongSecret.Encode()).said(t, 3, "does not know this registration key")
	if now := hosts(); now != hostsBefore {
		t.Errorf("the agents were %s and are %s", hostsBefore, now)
	}
	if now := uses(); now != usesBefore {
		t.Errorf("the keys were %s and are %s", usesBefore, now)
	}
	if err := register(t, s, "bad", good()).err(); err != nil {
		t.Errorf("a good key after the bad ones: %v", err)
	}
	if canShiftClock {
		// Within the tolerance of five minutes a clock may be off.
		if err := registerShifted(t, s, "slow-clock", good(), -4*time.Minute).err(); err != nil {
			t.Error(err)
		}
	}
	auditVerifies(t, s)
}

// registered is an agentd register that has ended.
type registered struct {
	ended
	agent *stack.Agent
}

func (r registered) err() error {
	if r.code != 0 {
		return fmt.Errorf("exit code %d: %s", r.code, r.stderr)
	}
	return nil
}

func register(t *testing.T, s *stack.Stack, name, key string) registered {
	t.Helper()
	return registerShifted(t, s, name, key, 0)
}

func registerShifted(t *testing.T, s *stack.Stack, name, key string, shift time.Duration) registered {
	t.Helper()
	a := hostNamed(t, s, name)
	cmd := registerCommand(t, a, "--key-file", "-")
	cmd.Stdin = strings.NewReader(key + "\n")
	if shift != 0 {
		shiftClock(cmd, shift)
	}
	return registered{finish(t, cmd), a}
}

// hostNamed is the stack's agent of this name, made if it isn't there.
func hostNamed(t *testing.T, s *stack.Stack, name string) *stack.Agent {
	t.Helper()
	for _, a := range s.Agents {
		if a.Name == name {
			return a
		}
	}
	a, err := s.NewAgent(name, "")
	if err == nil {
		err = a.WriteConfig()
	}
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func registerCommand(t *testing.T, a *stack.Agent, args ...string) *exec.Cmd {
	t.Helper()
	all := append([]string{"register", "--config", a.ConfigFile(), "--state", a.StateDir(), "--name", a.Name}, args...)
	return a.Command(t.Context(), all...)
}

// organizationKey makes an organization and a registration key of it.
func organizationKey(t *testing.T, s *stack.Stack, name string) string {
	t.Helper()
	token := must(t, s, "org", "create", name)
	cmd := s.Command(t.Context(), "key", "create")
	cmd.Env = append(cmd.Env, "POSTERN_TOKEN="+token) // the last one counts
	e := finish(t, cmd)
	if e.code != 0 {
		t.Fatal(e.stderr)
	}
	return strings.TrimSpace(e.stdout)
}

// TestLastUse lets 50 hosts race for a key's last use. They are real processes
// that all wait for the key on their standard input and get it at once.
func TestLastUse(t *testing.T) {
	const racers = 50
	s := newStack(t, stack.Options{})
	key := must(t, s, "key", "create", "--uses", "2")
	if err := register(t, s, "first", key).err(); err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	defer group.Wait()
	type racer struct {
		in     io.WriteCloser
		result ended
	}
	all := make([]racer, racers)
	for i := range all {
		cmd := registerCommand(t, hostNamed(t, s, fmt.Sprintf("racer-%d", i)), "--key-file", "-")
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		all[i].in = in
		defer in.Close()
		group.Go(func() { all[i].result = finish(t, cmd) })
	}
	// All but the last bytes: whoever is late has less to read.
	for i := range all {
		if _, err := io.WriteString(all[i].in, key); err != nil {
			t.Fatal(err)
		}
	}
	for i := range all {
		all[i].in.Close()
	}
	group.Wait()
	winners := 0
	for _, r := range all {
		if r.result.code == 0 {
			winners++
			continue
		}
		// The one or the other, by who looked first: the check before, or the
		// statement that counts.
		if strings.Contains(r.result.stderr, "has no uses left") {
			r.result.said(t, 3, "the registration key has no uses left")
		} else {
			r.result.said(t, 3, "the registration key is used up (2 of 2 uses)")
		}
	}
	if winners != 1 {
		t.Errorf("%d hosts joined, want 1", winners)
	}
	if agents := mustJSON[[]struct{ Name string }](t, s, "agent", "list"); len(agents) != 2 {
		t.Errorf("the control plane knows %d agents, want 2: %v", len(agents), agents)
	}
	// What was refused is in the log: the secret was right.
	denied := 0
	for _, e := range auditEntries(t, s, "") {
		if e.Action == "agent.register" && e.Verdict == "denied" {
			denied++
		}
	}
	if denied != racers-1 {
		t.Errorf("%d refusals are in the audit log, want %d", denied, racers-1)
	}
	auditVerifies(t, s)
}

// TestKeyIsNeverOnTheCommandLine tries every way to give the key, and those that
// agentd refuses: whoever typed a key there gets no echo of it.
func TestKeyIsNeverOnTheCommandLine(t *testing.T) {
	s := newStack(t, stack.Options{})
	key := must(t, s, "key", "create", "--uses", "3")
	for _, args := range [][]string{
		{key},
		{"--key", key},
		{"--key=" + key},
		{"--key-file", key},
		{"--key-file=" + key},
		{"--name", key, "--key-file", "-"},
		{"--" + key},
	} {
		cmd := registerCommand(t, hostNamed(t, s, "argv"), args...)
		cmd.Env = append(cmd.Env, "POSTERN_KEY="+key)
		e := finish(t, cmd)
		e.said(t, 2, "agentd: ")
		if strings.Contains(e.stderr+e.stdout, key[10:40]) {
			t.Errorf("%v: the key is echoed: %s", args[0][:min(12, len(args[0]))], e.stderr)
		}
	}
	// agentd itself as the command: the key as an unknown command.
	cmd := hostNamed(t, s, "argv").Command(t.Context(), key)
	if e := finish(t, cmd); e.code != 2 || strings.Contains(e.stderr, key[10:40]) {
		t.Errorf("exit code %d: %s", e.code, e.stderr)
	}
	// Not from the environment, not from a standard input that is no terminal.
	cmd = registerCommand(t, hostNamed(t, s, "argv"))
	cmd.Stdin = strings.NewReader(key)
	cmd.Env = append(cmd.Env, "POSTERN_KEY="+key)
	finish(t, cmd).said(t, 2, "--key-file")
	if agents := mustJSON[[]struct{ Name string }](t, s, "agent", "list"); len(agents) != 0 {
		t.Fatalf("agents have joined: %v", agents)
	}

	t.Run("file", func(t *testing.T) {
		file := filepath.Join(s.Dir, "key")
		if err := os.WriteFile(file, []byte("\n "+key+"\r\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if e := finish(t, registerCommand(t, hostNamed(t, s, "by-file"), "--key-file", file)); e.code != 0 || e.stderr != "" || !strings.Contains(e.stdout, "by-file") {
			t.Errorf("exit code %d: %s%s", e.code, e.stdout, e.stderr)
		}
		// Open to others it works, with a warning.
		if err := os.Chmod(file, 0o644); err != nil {
			t.Fatal(err)
		}
		if e := finish(t, registerCommand(t, hostNamed(t, s, "by-open-file"), "--key-file", file)); e.code != 0 || !strings.Contains(e.stderr, "can be read by everybody") {
			t.Errorf("exit code %d: %s%s", e.code, e.stdout, e.stderr)
		}
		finish(t, registerCommand(t, hostNamed(t, s, "argv"), "--key-file", file+".none")).said(t, 1, file+".none", "no such file")
	})
	t.Run("prompt", func(t *testing.T) {
		cmd := registerCommand(t, hostNamed(t, s, "by-prompt"))
		screen, code := onTerminal(t, cmd, "registration key: ", key+"\n")
		if code != 0 || !strings.Contains(screen, "registered as agent by-prompt") {
			t.Errorf("exit code %d: %q", code, screen)
		}
		if strings.Contains(screen, key[10:40]) {
			t.Errorf("the key is on the screen: %q", screen)
		}
	})
}

// onTerminal runs a command on a pseudo-terminal, answers its prompt, and returns
// all that was on the screen and the exit code.
func onTerminal(t *testing.T, cmd *exec.Cmd, prompt, answer string) (string, int) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	raw, err := master.SyscallConn() // Fd would make reads block past Close
	if err != nil {
		t.Fatal(err)
	}
	var n int
	if cerr := raw.Control(func(fd uintptr) {
		if err = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0); err == nil {
			n, err = unix.IoctlGetInt(int(fd), unix.TIOCGPTN)
		}
	}); cerr != nil || err != nil {
		t.Fatal(cerr, err)
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	slave.Close()
	timer := time.AfterFunc(30*time.Second, func() { cmd.Process.Kill() })
	defer timer.Stop()
	var screen bytes.Buffer
	buffer := make([]byte, 4096)
	answered := false
	for {
		n, err := master.Read(buffer)
		screen.Write(buffer[:n])
		if !answered && strings.Contains(screen.String(), prompt) {
			answered = true
			if _, err := io.WriteString(master, answer); err != nil {
				t.Fatal(err)
			}
		}
		if err != nil {
			break // EIO: the program has closed its end
		}
	}
	cmd.Wait() //nolint:errcheck // the exit code says it
	if !answered {
		t.Errorf("no prompt %q: %q", prompt, screen.String())
	}
	return screen.String(), cmd.ProcessState.ExitCode()
}
