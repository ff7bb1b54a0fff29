package main

import (
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestLogLevelCommand(t *testing.T) {
	// Longer than a socket's path may be.
	data := filepath.Join(t.TempDir(), strings.Repeat("deep/", 30))
	if err := os.MkdirAll(data, 0o700); err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) (string, string) {
		var out, errs strings.Builder
		cmd := logLevelCommand()
		cmd.SetArgs(args)
		cmd.SetOut(&out)
		cmd.SetErr(&errs)
		cmd.SilenceUsage, cmd.SilenceErrors = true, true
		if err := cmd.ExecuteContext(t.Context()); err != nil {
			return out.String(), err.Error()
		}
		return out.String(), ""
	}
	level := new(slog.LevelVar)
	said := &lockedBuffer{}
	log := slog.New(slog.NewTextHandler(said, &slog.HandlerOptions{Level: level}))
	if _, err := run("--data", data); !strings.Contains(err, "no control plane runs there") {
		t.Errorf("nothing runs: %q", err)
	}
	// A socket that one left which was killed.
	for range 2 {
		stop, err := serveLevel(data, log, level)
		if err != nil {
			t.Fatal(err)
		}
		if st, err := os.Stat(filepath.Join(data, levelSocket)); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("the socket: %v, %v", st, err)
		}
		defer stop()
	}
	for _, step := range []struct{ set, want string }{{"", "info"}, {"debug", "debug"}, {"", "debug"}, {"error", "error"}, {"error", "error"}, {"info", "info"}} {
		args := []string{"--data", data}
		if step.set != "" {
			args = append(args, step.set)
		}
		if out, err := run(args...); out != step.want+"\n" || err != "" {
			t.Errorf("%q: %q, %q, want %s", step.set, out, err, step.want)
		}
	}
	if level.Level() != slog.LevelInfo {
		t.Errorf("the level is %v", level.Level())
	}
	said.mu.Lock()
	if n := strings.Count(said.b.String(), "log level changed"); n != 2 { // at level error nothing is said
		t.Errorf("said %d times: %s", n, said.b.String())
	}
	said.mu.Unlock()
	for _, bad := range []struct {
		args []string
		want string
	}{
		{[]string{"debug"}, "--data is missing"},
		{[]string{"--data", data, "loud"}, `"loud" is none of debug, info, warn, error`},
		{[]string{"--data", filepath.Join(data, "no"), "debug"}, "no control plane has run there"},
	} {
		if _, err := run(bad.args...); !strings.Contains(err, bad.want) {
			t.Errorf("%v: %q, want %q", bad.args, err, bad.want)
		}
	}
	// Who says nothing, or nonsense, is hung up on and keeps nobody else waiting.
	path, done, err := socketPath(data)
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	for _, text := range []string{"loud\n", strings.Repeat("x", 1000)} {
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		conn.SetDeadline(time.Now().Add(time.Minute)) //nolint:errcheck // it is a socket
		conn.Write([]byte(text))                      //nolint:errcheck // it may be gone
		if n, err := conn.Read(make([]byte, 10)); n > 0 || err == nil || os.IsTimeout(err) {
			t.Errorf("%.10q: %d bytes, %v", text, n, err)
		}
		conn.Close() //nolint:errcheck // it was read
	}
	silent, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close() //nolint:errcheck // it is only held
	if out, err := run("--data", data); out != "info\n" {
		t.Errorf("beside one that says nothing: %q, %q", out, err)
	}
}
