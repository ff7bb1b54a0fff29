package notebookfile

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/proto/jupyter"
	"github.com/postern-dev/postern/proto/notebook"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// simulatedKernel has one variable, a text: a cell "add X" appends X to it and prints
// it, "fail" fails, "wait" waits to be interrupted.
type simulatedKernel struct {
	text    string
	kept    map[string]string
	count   int
	ran     []string
	waiting chan struct{}
}

func (k *simulatedKernel) Execute(ctx context.Context, code string, take func(*posternv1.KernelMessage)) (notebook.Reply, error) {
	k.count++
	k.ran = append(k.ran, code)
	send := func(kind string, content any) {
		m, err := jupyter.New("iopub", kind, "s", content)
		if err != nil {
			panic(err)
		}
		take(m)
	}
	send("execute_input", map[string]any{"execution_count": k.count, "code": code})
	word, rest, _ := strings.Cut(code, " ")
	switch word {
	case "add":
		k.text += rest
		send("stream", map[string]any{"name": "stdout", "text": k.text})
		send("stream", map[string]any{"name": "stdout", "text": "\n"})
	case "wait":
		close(k.waiting)
		<-ctx.Done()
		k.text += "half"
		return notebook.Reply{Status: "error", Count: k.count, Class: "KeyboardInterrupt"}, nil
	case "fail":
		k.text += "half"
		send("error", map[string]any{"ename": "Oops", "evalue": rest, "traceback": []string{"a", "b"}})
		return notebook.Reply{Status: "error", Count: k.count, Class: "Oops", Value: rest}, nil
	}
	return notebook.Reply{Status: "ok", Count: k.count}, nil
}

func (k *simulatedKernel) Checkpoint(_ context.Context, label string) (string, error) {
	if len(label) > 64 {
		return "", errors.New("a label too long")
	}
	id := fmt.Sprint("c", len(k.kept))
	k.kept[id] = k.text
	return id, nil
}

func (k *simulatedKernel) Rollback(_ context.Context, id string) error {
	text, ok := k.kept[id]
	if !ok {
		return errors.New("no such checkpoint")
	}
	k.text = text
	return nil
}

func (k *simulatedKernel) Restart(context.Context) error {
	k.text, k.count = "", 0
	return nil
}

func newKernel() *simulatedKernel {
	return &simulatedKernel{kept: map[string]string{}, waiting: make(chan struct{})}
}

func file(sources ...string) []byte {
	var b strings.Builder
	b.WriteString("{\n \"cells\": [")
	for i, s := range sources {
		if i > 0 {
			b.WriteString(",")
		}
		text, _ := json.Marshal(strings.SplitAfter(s, "\n"))
		fmt.Fprintf(&b, "\n  {\n   \"cell_type\": \"code\",\n   \"execution_count\": null,\n   \"id\": \"c%d\",\n   \"metadata\": {},\n   \"outputs\": [],\n   \"source\": %s\n  }", i, text)
	}
	b.WriteString("\n ],\n \"metadata\": {\"kernelspec\": {\"name\": \"python3\"}},\n \"nbformat\": 4,\n \"nbformat_minor\": 5\n}\n")
	return []byte(b.String())
}

func TestWatch(t *testing.T) {
	path := filepath.Join(t.TempDir(), "n.ipynb")
	save := func(text []byte) {
		t.Helper()
		// As editors do it: another file over the old one.
		if err := os.WriteFile(path+"~", text, 0o640); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+"~", path); err != nil {
			t.Fatal(err)
		}
	}
	save(file("add a", "add b", "add c"))
	k := newKernel()
	s := &notebook.Session{Kernel: k, Checkpoints: k, Spec: "python3"}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Watch(ctx, s, path) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if rest, _ := filepath.Glob(filepath.Join(filepath.Dir(path), ".*")); len(rest) > 0 {
			t.Errorf("left behind: %v", rest)
		}
	}()
	last := func(want string) {
		t.Helper()
		var text string
		for range 1000 {
			d, err := Read(path)
			if err == nil {
				code := d.Code()
				text = string(d.Cells[code[len(code)-1]].Outputs)
				if strings.Contains(text, want) {
					return
				}
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Fatalf("the last cell has %s, not %q", text, want)
	}
	last(`"abc\n"`)
	save(file("add a", "add x", "add c"))
	last(`"axc\n"`)
	// An edit takes a cell away that runs.
	save(file("add a", "add x", "wait"))
	<-k.waiting
	save(file("add a", "add x", "add y"))
	last(`"axy\n"`)
	// Not a notebook for a while, then one again.
	save([]byte("{"))
	save(file("add z"))
	last(`"z\n"`)
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("the file's mode: %v, %v", info.Mode(), err)
	}
}

// What an editor saves while outputs are being written is not lost.
// Two saves, one before and one after the file is replaced: the later one wins,
// whichever moment it comes at. On a slow machine a save may come when all is over, and
// then another try is made.
func TestReplaceKeepsTheLastSave(t *testing.T) {
	for _, when := range []string{"before it is given back", "after it is given back"} {
		t.Run(when, func(t *testing.T) {
			var got []string
			for range 30 {
				text, err := twoSaves(t, when == "after it is given back")
				if errors.Is(err, ErrChanged) && text == "the last one" {
					return
				}
				got = append(got, fmt.Sprintf("%q, %v", text, err))
			}
			t.Errorf("got %s", strings.Join(got, "; "))
		})
	}
}

// twoSaves replaces a file while an editor saves it twice, and returns what it has
// then, and what Replace said.
func twoSaves(t *testing.T, late bool) (text string, err error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "n.ipynb")
	open := func(flags int) *os.File {
		f, err := os.OpenFile(path, flags, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = f.Close() })
		return f
	}
	first := open(os.O_WRONLY | os.O_CREATE) // the first save is under way
	_, _ = first.WriteString("old")
	done := make(chan error, 1)
	go func() { done <- Replace(path, []byte("old"), []byte("mine")) }()
	await := func(want string) {
		for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			if now, _ := os.ReadFile(path); string(now) == want || len(done) > 0 {
				return
			}
		}
		t.Fatalf("the file never had %q", want)
	}
	await("mine")
	last := open(os.O_WRONLY) // the second one opens what is there now
	if !late {
		_, _ = last.WriteString("the last one")
	}
	_, _ = first.WriteAt([]byte("first"), 0)
	if late {
		await("first")
		_, _ = last.WriteString("the last one")
	}
	err = <-done
	now, _ := os.ReadFile(path)
	return string(now), err
}

func TestReplaceLosesNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "n.ipynb")
	old, mine, theirs := []byte("old"), []byte("mine"), []byte("theirs")
	if err := os.WriteFile(path, old, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Replace(path, theirs, mine); !errors.Is(err, ErrChanged) {
		t.Errorf("a file that has changed: %v", err)
	}
	// An editor that has the file open and writes in place, at the worst moment.
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	wrote := make(chan struct{})
	go func() {
		defer close(wrote)
		for range 500 {
			now, _ := os.ReadFile(path)
			if bytes.Equal(now, mine) {
				_, _ = f.WriteAt(theirs, 0)
				return
			}
			time.Sleep(time.Millisecond)
		}
	}()
	err = Replace(path, old, mine)
	<-wrote
	now, _ := os.ReadFile(path)
	if !errors.Is(err, ErrChanged) || !bytes.Equal(now, theirs) {
		t.Errorf("got %v, and the file has %q", err, now)
	}
	if err := Replace(path, theirs, mine); err != nil {
		t.Error(err)
	}
	if now, _ = os.ReadFile(path); !bytes.Equal(now, mine) {
		t.Errorf("the file has %q", now)
	}
}
