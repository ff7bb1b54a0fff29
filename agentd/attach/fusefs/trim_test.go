package fusefs

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// nodes is how many nodes the server of a mount knows.
func (m *mounted) nodes() (n int) {
	m.t.Helper()
	if _, err := io.WriteString(m.in, "n"); err != nil {
		m.t.Fatal(err)
	}
	line := make([]byte, 64)
	read, err := m.out.Read(line)
	if err != nil {
		m.t.Fatal(err)
	}
	if _, err := fmt.Sscanf(string(line[:read]), "nodes %d", &n); err != nil {
		m.t.Fatalf("%q: %v", line[:read], err)
	}
	return n
}

// TestMillionNames lists a tree of a million files, or of ten thousand: what the server takes stays bounded.
func TestMillionNames(t *testing.T) {
	dirs, most, each := 20, 20*501+10, 500
	if long {
		dirs, most = 2000, 200_000
	}
	w := newWorld(t)
	w.remote.Fill(dirs, each)
	m := w.mount(serving{})
	m.watchdog()
	resident := func(what string) (kb int) {
		t.Helper()
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", m.cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			if rest, ok := strings.CutPrefix(line, what+":"); ok {
				fmt.Sscan(rest, &kb)
			}
		}
		return kb
	}
	for round := range 2 {
		began := time.Now()
		out, err := exec.Command("sh", "-c", "find "+m.path+" -type f -printf x | wc -c").CombinedOutput()
		if err != nil || strings.TrimSpace(string(out)) != fmt.Sprint(dirs*each) {
			t.Fatalf("%s files, %v", out, err)
		}
		t.Logf("round %d: %d files in %s, %d nodes are known, %d MiB resident, %d at the peak", round, dirs*each, time.Since(began).Round(time.Second), m.nodes(), resident("VmRSS")>>10, resident("VmHWM")>>10)
	}
	for end := time.Now().Add(time.Minute); m.nodes() > most; time.Sleep(time.Second) {
		if time.Now().After(end) {
			t.Fatalf("%d nodes are known still", m.nodes())
		}
	}
	t.Logf("then: %d nodes, %d MiB resident", m.nodes(), resident("VmRSS")>>10)
	if peak := resident("VmHWM"); peak > 512<<10 {
		t.Errorf("%d MiB at the peak", peak>>10)
	}
}

// TestForgottenNames lists a tree of more names than the server keeps: it has the kernel forget
// them, but none that a process is using, and everything is there again for whoever looks.
func TestForgottenNames(t *testing.T) {
	const dirs, each = 120, 100
	w := newWorld(t)
	w.remote.Fill(dirs, each)
	m := w.mount(serving{Config: testConfig{MetadataBytes: 600_000}}) // about 2,000 names
	m.watchdog()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	run := func(script string) string {
		t.Helper()
		cmd := exec.CommandContext(ctx, "sh", "-euc", script)
		cmd.Dir = m.path
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", script, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	run("echo content > directory-9/open.txt; mkdir -p directory-8/in/side; echo here > directory-8/in/side/f")
	// A process with a file open, and its working directory in the tree.
	user := exec.CommandContext(ctx, "sh", "-euc", `exec 5< ../../../directory-9/open.txt; echo ready; read go; /bin/pwd; cat f; cat <&5; readlink /proc/$$/fd/5`)
	user.Dir = m.path + "/directory-8/in/side"
	in, err := user.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := user.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := user.Start(); err != nil {
		t.Fatal(err)
	}
	ready := make([]byte, 6)
	if _, err := io.ReadFull(out, ready); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprint(dirs*(each+1) + 1 + 4)
	for round := range 2 {
		if got := run("find . | wc -l"); got != want {
			t.Errorf("round %d: %s names, want %s", round, got, want)
		}
		if got := run("ls -lR | grep -c file-"); got != fmt.Sprint(dirs*each) {
			t.Errorf("round %d: %s files, want %d", round, got, dirs*each)
		}
		for {
			n := m.nodes()
			if n < 3000 {
				break
			}
			if ctx.Err() != nil {
				t.Fatalf("round %d: %d nodes are known still", round, n)
			}
			time.Sleep(50 * time.Millisecond)
		}
	}
	if _, err := io.WriteString(in, "go\n"); err != nil {
		t.Fatal(err)
	}
	said, err := io.ReadAll(out)
	if err != nil {
		t.Fatal(err)
	}
	if err := user.Wait(); err != nil {
		t.Error(err)
	}
	if want := m.path + "/directory-8/in/side\nhere\ncontent\n" + m.path + "/directory-9/open.txt\n"; string(said) != want {
		t.Errorf("whoever was in it saw %q, want %q", said, want)
	}
}
