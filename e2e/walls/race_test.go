package walls

import (
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestWhatIsNotRaced: what `make test` builds without the race detector must synchronize
// nothing and start nothing. Else the detector misses what it orders; worse, a generic function of
// the standard library that such a package instantiates may be the one that is linked for
// all (sync.Map is one), and races are reported that are none.
func TestWhatIsNotRaced(t *testing.T) {
	script, err := os.ReadFile("../../packaging/dev/test.sh")
	if err != nil {
		t.Fatal(err)
	}
	variable := regexp.MustCompile(`(?m)^wazevo=(\S+)$`).FindSubmatch(script)
	flags := regexp.MustCompile(`-gcflags=(\S+?)=-race=false`).FindAllSubmatch(script, -1)
	if variable == nil || len(flags) == 0 {
		t.Fatal("test.sh names no package that is built without the race detector: drop this test with it")
	}
	var patterns []string
	for _, f := range flags {
		patterns = append(patterns, strings.ReplaceAll(string(f[1]), "$wazevo", string(variable[1])))
	}
	list := exec.Command("go", append([]string{"list", "-f", "{{.ImportPath}} {{join .Imports \" \"}}"}, patterns...)...)
	list.Dir = "../.."
	out, err := list.Output()
	if err != nil {
		t.Fatalf("go list %v: %v", patterns, err)
	}
	packages := 0
	for line := range strings.Lines(string(out)) {
		imports := strings.Fields(line)
		packages++
		for _, synchronizes := range []string{"sync", "sync/atomic", "unique", "os", "net", "time"} {
			if slices.Contains(imports[1:], synchronizes) {
				t.Errorf("%s imports %s: build it with the race detector", imports[0], synchronizes)
			}
		}
	}
	if packages < 4 {
		t.Errorf("%v are only %d packages: do they still exist?", patterns, packages)
	}
}
