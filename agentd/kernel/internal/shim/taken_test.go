package shim

import (
	"strings"
	"testing"

	"github.com/postern-dev/postern/proto/jupyter"
)

// TestTaken sends what a control plane does that lost its stream: messages once more, of
// which it does not know whether they had arrived.
func TestTaken(t *testing.T) {
	dir, _ := newSpec(t)
	a, _ := spawn(t, dir)
	p := attach(t, a, "lab")
	m, err := jupyter.New(jupyter.Shell, "execute_request", "lab", map[string]any{
		"code": "n = globals().get('n', 0) + 1\nprint('run', n)", "silent": false, "store_history": true, "allow_stdin": false,
	})
	if err != nil {
		t.Fatal(err)
	}
	h, err := jupyter.ParseHeader(m.Header)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := p.out.Message(m); err != nil {
			t.Fatal(err)
		}
	}
	if out, _ := p.result(h.ID); out != "run 1\n" {
		t.Errorf("printed %q", out)
	}
	q := attach(t, a, "lab", resume)
	if err := q.out.Message(m); err != nil {
		t.Fatal(err)
	}
	if out := q.run("print('n', n)"); !strings.Contains(out, "n 1\n") {
		t.Errorf("after a fourth time on another stream: printed %q", out)
	}
	if q.taken != 2 {
		t.Errorf("%d messages of the stream were taken, want 2", q.taken)
	}
}
