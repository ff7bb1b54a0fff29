package walls

import (
	"bytes"
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/postern-dev/postern/"

type goPackage struct {
	ImportPath   string
	Dir          string
	Name         string
	GoFiles      []string
	TestGoFiles  []string
	XTestGoFiles []string
	Imports      []string
	Deps         []string
}

// packages lists every package of the module, by path relative to it.
func packages(t *testing.T) map[string]goPackage {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Dir,Name,GoFiles,TestGoFiles,XTestGoFiles,Imports,Deps", "./...")
	cmd.Dir = "../.."
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]goPackage{}
	dec := json.NewDecoder(bytes.NewReader(out))
	for dec.More() {
		var p goPackage
		if err := dec.Decode(&p); err != nil {
			t.Fatal(err)
		}
		all[strings.TrimPrefix(p.ImportPath, module)] = p
	}
	if len(all) < 5 {
		t.Fatalf("only %d packages found", len(all))
	}
	return all
}

// side is the top-level directory of a package of ours, "" for others.
func side(path string) string {
	rel, ours := strings.CutPrefix(path, module)
	if !ours {
		return ""
	}
	top, _, _ := strings.Cut(rel, "/")
	return top
}

// mayImport says which sides a side may import, and why the others not.
var mayImport = map[string][]string{
	"proto":        {"proto"},                           // the words both ends share know neither end
	"tunnel":       {"tunnel"},                          // a transport knows nothing of what it carries
	"agentd":       {"agentd", "tunnel", "proto"},       // the host never holds server code
	"controlplane": {"controlplane", "tunnel", "proto"}, // and the reverse
	"client":       {"client", "proto"},                 // users reach the API, not the tunnel
}

func TestSidesMeetOnlyInE2E(t *testing.T) {
	for name, p := range packages(t) {
		allowed, walled := mayImport[side(p.ImportPath)]
		if !walled {
			continue
		}
		for _, dep := range p.Deps {
			if s := side(dep); s != "" && !slices.Contains(allowed, s) {
				t.Errorf("%s depends on %s: %s may import only %v", name, dep, side(p.ImportPath), allowed)
			}
		}
	}
}

// wires are the packages that may import the capability packages beside them.
var wires = []string{"agentd", "controlplane"}

// shared are capability packages that hold plain words for their neighbours.
var shared = []string{"agentd/atomicfile", "agentd/cgroup", "agentd/confine", "agentd/policy", "agentd/secret", "controlplane/filetree", "controlplane/masterkey"}

func TestCapabilitiesDoNotImportEachOther(t *testing.T) {
	for name, p := range packages(t) {
		top := side(p.ImportPath)
		if (top != "agentd" && top != "controlplane") || slices.Contains(wires, name) {
			continue
		}
		own := capability(p.ImportPath)
		for _, imported := range p.Imports {
			if side(imported) != top || capability(imported) == own {
				continue
			}
			if slices.Contains(shared, strings.TrimPrefix(imported, module)) {
				continue
			}
			t.Errorf("%s imports its neighbour %s: declare an interface and let %s/main.go wire them", name, imported, top)
		}
	}
}

// capability is the first two parts of a path below the module: agentd/link.
func capability(path string) string {
	parts := strings.SplitN(strings.TrimPrefix(path, module), "/", 3)
	return strings.Join(parts[:min(2, len(parts))], "/")
}

// forbidden are imports that some side must not have at all, however deep. A path that
// ends in $ means that package alone.
var forbidden = []struct{ side, path, why string }{
	// SQL sessions have SQLite's C interface, modernc.org/sqlite/lib, and nothing else of it.
	{"agentd", "modernc.org/sqlite$", "the host keeps files, not a metadata store"},
	{"client", "github.com/go-sql-driver/mysql", "users never speak to a database"},
	{"controlplane", "github.com/go-sql-driver/mysql", "only hosts speak to data sources"},
	{"agentd", "github.com/pressly/goose/v3", "migrations belong to the control plane"},
	{"controlplane", "github.com/hanwen/go-fuse/v2", "the control plane mounts nothing"},
	{"client", "github.com/jackc/pgx/v5", "users never speak to a database"},
	{"client", "modernc.org/sqlite", "the client stores nothing but a login"},
	{"tunnel", "connectrpc.com/connect", "the tunnel carries HTTP and does not know what it says"},
	{"", "nhooyr.io/websocket", "frozen: its home is github.com/coder/websocket"},
}

func TestForbiddenImports(t *testing.T) {
	for name, p := range packages(t) {
		if side(p.ImportPath) == "e2e" {
			continue
		}
		for _, f := range forbidden {
			if (f.side == "" || f.side == side(p.ImportPath)) && slices.ContainsFunc(p.Deps, func(d string) bool {
				if only, ok := strings.CutSuffix(f.path, "$"); ok {
					return d == only
				}
				return d == f.path || strings.HasPrefix(d, f.path+"/")
			}) {
				t.Errorf("%s depends on %s: %s", name, f.path, f.why)
			}
		}
	}
}

func TestEveryPackageHasItsComment(t *testing.T) {
	for name, p := range packages(t) {
		var where []string
		for _, file := range p.GoFiles {
			f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, file), nil, parser.ParseComments|parser.PackageClauseOnly)
			if err != nil {
				t.Fatal(err)
			}
			if f.Doc != nil && len(strings.TrimSpace(f.Doc.Text())) > 40 {
				where = append(where, file)
			}
		}
		wanted := "doc.go"
		if p.Name == "main" {
			wanted = "main.go"
		}
		generated := strings.HasSuffix(name, "posternv1connect")
		switch {
		case generated || len(p.GoFiles) == 0:
		case len(where) == 0:
			t.Errorf("%s has no package comment: put one in %s", name, wanted)
		case len(where) > 1 && name != "proto/postern/v1":
			t.Errorf("%s has %d package comments, in %v", name, len(where), where)
		case !slices.Contains(where, wanted):
			t.Errorf("%s has its package comment in %v, not in %s", name, where, wanted)
		}
	}
}

// countedElsewhere are packages without tests of their own, with the package
// whose tests run their goroutines, and count them.
var countedElsewhere = map[string]string{
	"tunnel/tunneltest":                "tunnel",
	"agentd/sqlsession/internal/child": "agentd/sqlsession",
}

// TestGoroutinesAreCounted finds every package whose code has a go statement and
// wants its tests to fail when one is left behind.
func TestGoroutinesAreCounted(t *testing.T) {
	all := packages(t)
	for name, p := range all {
		if elsewhere, ok := countedElsewhere[name]; ok {
			p.Dir, p.TestGoFiles, p.XTestGoFiles, p.GoFiles = all[elsewhere].Dir, all[elsewhere].TestGoFiles, all[elsewhere].XTestGoFiles, nil
			if !checksLeaks(t, p) {
				t.Errorf("%s: the tests of %s must call goleak.VerifyTestMain", name, elsewhere)
			}
			continue
		}
		if side(p.ImportPath) == "e2e" && !strings.Contains(name, "e2e/pgserver") || p.Name == "main" && len(p.TestGoFiles)+len(p.XTestGoFiles) == 0 {
			continue
		}
		if startsGoroutines(t, p) && !checksLeaks(t, p) {
			t.Errorf("%s starts goroutines: its TestMain must call goleak.VerifyTestMain", name)
		}
	}
}

func startsGoroutines(t *testing.T, p goPackage) bool {
	found := false
	for _, file := range p.GoFiles {
		f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, file), nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(f, func(n ast.Node) bool {
			if _, ok := n.(*ast.GoStmt); ok {
				found = true
			}
			return !found
		})
	}
	return found
}

func checksLeaks(t *testing.T, p goPackage) bool {
	for _, file := range append(slices.Clone(p.TestGoFiles), p.XTestGoFiles...) {
		text, err := os.ReadFile(filepath.Join(p.Dir, file))
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(text, []byte("goleak.VerifyTestMain")) || bytes.Contains(text, []byte("goleak.Find(")) {
			return true
		}
	}
	return false
}
