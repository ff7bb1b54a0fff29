package packet

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

type note struct{ Text string }

// pair is a conversation with an echo that sends back what it gets, files too.
func pair(t *testing.T, dir string) *Conn {
	t.Helper()
	l, err := Listen(dir, "s")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := l.AcceptUnix()
		if err != nil {
			return
		}
		defer conn.Close()
		if cred, err := Peer(conn); err != nil || int(cred.Pid) != os.Getpid() {
			t.Errorf("peer: %v, %v", cred, err)
		}
		for {
			var n note
			files, err := Receive(conn, &n)
			if err != nil {
				return
			}
			err = Send(conn, n, files...)
			CloseAll(files)
			if err != nil {
				return
			}
		}
	}()
	c, err := Dial(dir, "s")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close(); _ = l.Close(); <-done })
	return c
}

func TestCall(t *testing.T) {
	// Longer than an address may be.
	dir := filepath.Join(t.TempDir(), strings.Repeat("d", 120))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	c := pair(t, dir)
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString("content"); err != nil {
		t.Fatal(err)
	}
	var answer note
	files, err := c.Call(time.Now().Add(time.Minute), note{"hello"}, &answer, f)
	if err != nil || answer.Text != "hello" || len(files) != 1 {
		t.Fatalf("got %v, %d files, %v", answer, len(files), err)
	}
	defer CloseAll(files)
	if text, err := io.ReadAll(io.NewSectionReader(files[0], 0, 100)); err != nil || string(text) != "content" {
		t.Errorf("the file that came back has %q, %v", text, err)
	}
	if _, err := c.Call(time.Now().Add(time.Minute), note{strings.Repeat("x", MaxMessage)}, &answer); err == nil {
		t.Error("a message that is too long was sent")
	}
	if _, err := c.Call(time.Now().Add(time.Minute), note{"again"}, &answer); err == nil {
		t.Error("the conversation went on after an error")
	}
}

func TestNobodyListens(t *testing.T) {
	dir := t.TempDir()
	if _, err := Dial(dir, "s"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no socket: %v", err)
	}
	l, err := Listen(dir, "s")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Dial(dir, "s"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a socket that was left: %v", err)
	}
}
