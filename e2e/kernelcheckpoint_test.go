package e2e

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/postern-dev/postern/e2e/stack"
)

// checkpointList is what `postern kernel checkpoints -o json` says, as far as tests look.
func checkpointList(t *testing.T, s *stack.Stack, id string) (list []struct {
	ID, Kind, Label, Parent string
	Protected               bool
},
) {
	t.Helper()
	if err := json.Unmarshal([]byte(must(t, s, "kernel", "checkpoints", id, "-o", "json")), &list); err != nil {
		t.Fatal(err)
	}
	return list
}

// TestCheckpointCommands is a kernel's life by the commands that save it and bring it back.
func TestCheckpointCommands(t *testing.T) {
	s, _ := withKernelsOf(t, stack.Options{Bin: checkpointBinaries(t)})
	id := startedKernel(t, s, "host")
	exec := func(kernel, code string) string {
		t.Helper()
		return strings.TrimSpace(must(t, s, "kernel", "exec", kernel, code))
	}
	refused := func(want string, args ...string) {
		t.Helper()
		if e := postern(t, s, args...); e.code == 0 || !strings.Contains(e.stderr, want) || strings.Count(strings.TrimSpace(e.stderr), "\n") > 0 {
			t.Errorf("%q: exit code %d: %q, want %q", args, e.code, e.stderr, want)
		}
	}
	exec(id, "n = 1; open('f', 'w').write('one'); seen = []\nimport postern\n@postern.on_restore\ndef back(how): seen.append((how.kind, how.checkpoint))")
	if out := strings.TrimSpace(must(t, s, "kernel", "checkpoint", id, "--check", "-o", "json")); out != "[]" {
		t.Errorf("check: %s", out)
	}
	one := strings.TrimSpace(must(t, s, "kernel", "checkpoint", id, "--label", "first one", "--protect"))
	exec(id, "n = 2; open('f', 'w').write('two')")
	two := strings.TrimSpace(must(t, s, "kernel", "checkpoint", id))
	list := checkpointList(t, s, id)
	if len(list) != 2 || list[0].ID != one || list[0].Label != "first one" || !list[0].Protected || list[1].ID != two || list[1].Parent != one || list[1].Protected {
		t.Errorf("checkpoints: %+v", list)
	}

	must(t, s, "kernel", "rollback", id, one)
	if got := exec(id, "print(n, open('f').read(), seen)"); got != "1 one [('rollback', '"+one+"')]" {
		t.Errorf("after the rollback: %s", got)
	}
	must(t, s, "kernel", "rollback", id, two)
	if got := exec(id, "print(n, open('f').read(), seen)"); got != "2 two [('rollback', '"+two+"')]" {
		t.Errorf("after the rollback forward: %s", got)
	}
	refused("no checkpoint", "kernel", "rollback", id, "ckp_00000000000000000000000000")
	refused("not found", "kernel", "rollback", exampleID, one)

	must(t, s, "kernel", "suspend", id)
	if line := where(t, s, id); !strings.Contains(line, "suspended") {
		t.Errorf("after the suspend: %s", line)
	}
	refused("is suspended", "kernel", "checkpoint", id)
	suspended := checkpointList(t, s, id)
	refused("all that there is", "kernel", "checkpoints", id, "--delete", suspended[len(suspended)-1].ID)
	must(t, s, "kernel", "resume", id)
	must(t, s, "kernel", "resume", id) // it may be asked twice
	if got := exec(id, "print(n, seen[-1][0])"); got != "2 resume" {
		t.Errorf("after the resume: %s", got)
	}

	must(t, s, "kernel", "checkpoints", id, "--protect", two)
	must(t, s, "kernel", "checkpoints", id, "--release", one)
	must(t, s, "kernel", "checkpoints", id, "--delete", one)
	if list = checkpointList(t, s, id); len(list) == 0 || list[0].ID != two || !list[0].Protected {
		t.Errorf("after protect and delete: %+v", list)
	}

	exec(id, "import subprocess; child = subprocess.Popen(['sleep', '600'], stdin=subprocess.PIPE); import socket; out = socket.socket(); out.bind(('127.0.0.1', 0)); out.listen()")
	fork := strings.TrimSpace(must(t, s, "kernel", "fork", id))
	if got := exec(fork, "n += 1; print(n, open('f').read(), child.poll(), out.getsockname()[0])"); got != "3 two None 127.0.0.1" {
		t.Errorf("the fork: %s", got)
	}
	if got := exec(id, "print(n)"); got != "2" {
		t.Errorf("the original: %s", got)
	}
	must(t, s, "kernel", "stop", fork)
	must(t, s, "kernel", "stop", id)
	if left := must(t, s, "kernel", "list", "-o", "json"); strings.TrimSpace(left) != "[]" {
		t.Errorf("kernels are left:\n%s", left)
	}
}

// exampleID is a kernel's id that no kernel has.
const exampleID = "01a20249-8294-70e3-b8c2-6b2fc9eebe2f"

// TestForksDrawOtherNumbers: five forks of one checkpoint have random numbers of their own;
// a rollback draws the same ones again.
func TestForksDrawOtherNumbers(t *testing.T) {
	s, _ := withKernelsOf(t, stack.Options{Bin: checkpointBinaries(t)})
	id := startedKernel(t, s, "host")
	must(t, s, "kernel", "exec", id, `import random, ssl, uuid, secrets, json
random.seed(1)
own = random.Random(2)
ssl.RAND_bytes(8)
uuid.uuid1()
try:
    import numpy
    numpy.random.seed(3)
    generator = numpy.random.default_rng(4)
except ImportError:
    numpy = None
def draw():
    out = {'random': random.random(), 'own': own.random(), 'uuid1': str(uuid.uuid1()), 'uuid4': str(uuid.uuid4()), 'secrets': secrets.token_hex(8), 'ssl': ssl.RAND_bytes(8).hex()}
    if numpy is not None:
        out['numpy'] = numpy.random.random(); out['generator'] = generator.random()
    return json.dumps(out)`)
	point := strings.TrimSpace(must(t, s, "kernel", "checkpoint", id))
	draw := func(kernel string) map[string]any {
		t.Helper()
		out := map[string]any{}
		if err := json.Unmarshal([]byte(must(t, s, "kernel", "exec", kernel, "print(draw())")), &out); err != nil {
			t.Fatal(err)
		}
		return out
	}
	original := draw(id)
	seen := map[string]string{}
	for name, value := range original {
		text, err := json.Marshal(value)
		if err != nil {
			t.Fatal(err)
		}
		seen[name+string(text)] = "the original"
	}
	for range 5 {
		fork := strings.TrimSpace(must(t, s, "kernel", "fork", id, point))
		for name, value := range draw(fork) {
			text, err := json.Marshal(value)
			if err != nil {
				t.Fatal(err)
			}
			if other := seen[name+string(text)]; other != "" {
				t.Errorf("%s: fork %s draws %s, as did %s", name, fork, text, other)
			}
			seen[name+string(text)] = fork
		}
	}
	must(t, s, "kernel", "rollback", id, point)
	again := draw(id)
	for _, name := range []string{"random", "own", "numpy", "generator"} {
		if again[name] != original[name] {
			t.Errorf("%s: after a rollback it drew %v, before %v", name, again[name], original[name])
		}
	}
	for _, name := range []string{"uuid4", "secrets", "ssl"} {
		if again[name] == original[name] {
			t.Errorf("%s: after a rollback it drew %v again", name, again[name])
		}
	}
	// Who wants the same numbers gets them.
	must(t, s, "kernel", "exec", id, "import postern; postern.reseed_on_fork = False")
	fork := strings.TrimSpace(must(t, s, "kernel", "fork", id))
	if a, b := draw(id), draw(fork); a["random"] != b["random"] || a["own"] != b["own"] {
		t.Errorf("without reseeding: %v, %v", a, b)
	}
}
