package kernel

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/postern-dev/postern/agentd/kernel/internal/shim"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Bounds of what is told of a kernelspec, in bytes; see posternv1.KernelSpec.
const (
	maxSpecs     = 64
	maxSpecFile  = 64 << 10
	maxResource  = 256 << 10
	maxResources = 1 << 20
)

var specName = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)

// spec is a kernelspec that was found.
type spec struct {
	name string
	dir  string
	file specFile
	// raw is kernel.json less argv and env.
	raw map[string]json.RawMessage
}

// specFile is kernel.json, as Jupyter's documentation describes it.
type specFile struct {
	Argv          []string          `json:"argv"`
	DisplayName   string            `json:"display_name"`
	Language      string            `json:"language"`
	InterruptMode string            `json:"interrupt_mode"`
	Env           map[string]string `json:"env"`
}

// findSpecs reads the kernelspecs of directories; of two with one name the first counts.
// wrong are specs that cannot be used, with the reason.
func findSpecs(dirs []string) (found []spec, wrong map[string]error) {
	if dirs == nil {
		dirs = systemSpecDirs
	}
	wrong = map[string]error{}
	seen := map[string]bool{}
	for _, dir := range dirs {
		entries, err := os.ReadDir(dir)
		if err != nil {
			if !errors.Is(err, fs.ErrNotExist) {
				wrong[dir] = err
			}
			continue
		}
		for _, e := range entries {
			// Jupyter's names have no case.
			name := strings.ToLower(e.Name())
			path := filepath.Join(dir, e.Name())
			if !specName.MatchString(name) || seen[name] {
				continue
			}
			s, err := readSpec(path)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				wrong[path] = err
				continue
			}
			seen[name] = true
			s.name = name
			found = append(found, s)
		}
	}
	slices.SortFunc(found, func(a, b spec) int { return strings.Compare(a.name, b.name) })
	return found[:min(len(found), maxSpecs)], wrong
}

func readSpec(dir string) (spec, error) {
	path := filepath.Join(dir, "kernel.json")
	info, err := os.Stat(path)
	if err != nil {
		return spec{}, err
	}
	if info.Size() > maxSpecFile {
		return spec{}, fmt.Errorf("%s is over 64 KiB", path)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return spec{}, err
	}
	s := spec{dir: dir}
	if err := json.Unmarshal(text, &s.file); err != nil {
		return spec{}, fmt.Errorf("%s is not the JSON that Jupyter describes: %w", path, err)
	}
	if err := json.Unmarshal(text, &s.raw); err != nil {
		return spec{}, err
	}
	delete(s.raw, "argv")
	delete(s.raw, "env")
	switch s.file.InterruptMode {
	case "":
		s.file.InterruptMode = "signal"
	case "signal", "message":
	default:
		return spec{}, fmt.Errorf("%s: interrupt_mode %q is neither signal nor message", path, s.file.InterruptMode)
	}
	if len(s.file.Argv) == 0 || !slices.ContainsFunc(s.file.Argv, func(a string) bool { return strings.Contains(a, "{connection_file}") }) {
		return spec{}, fmt.Errorf("%s: argv is empty or has no {connection_file}", path)
	}
	return s, nil
}

// argv is the command line inside the sandbox.
func (s spec) argv() []string {
	replace := strings.NewReplacer("{connection_file}", shim.ConnectionInside, "{resource_dir}", s.dir)
	var out []string
	for _, a := range s.file.Argv {
		out = append(out, replace.Replace(a))
	}
	if s.ipython() {
		// IPython's history is a file that is open all the time and grows: a checkpoint
		// could not be gone back to.
		out = append(out, "--HistoryManager.hist_file=:memory:")
	}
	return out
}

// ipython reports whether the spec starts ipykernel.
func (s spec) ipython() bool {
	return slices.ContainsFunc(s.file.Argv, func(a string) bool { return a == "ipykernel_launcher" || a == "ipykernel" })
}

// visible are the paths outside of the system's that the kernel needs: the spec's own
// directory, and the environment that its interpreter is of, if it is plainly one.
func (s spec) visible() []string {
	var out []string
	for _, path := range []string{s.dir, environmentOf(s.file.Argv[0])} {
		if path == "" || strings.HasPrefix(path, "/usr/") || strings.HasPrefix(path, "/opt/") || slices.Contains(out, path) {
			continue
		}
		out = append(out, path)
	}
	return out
}

// environmentOf is the Python or conda environment that a program is of; empty: none.
func environmentOf(program string) string {
	if !filepath.IsAbs(program) {
		return ""
	}
	root := filepath.Dir(filepath.Dir(filepath.Clean(program)))
	for _, sign := range []string{"pyvenv.cfg", "conda-meta"} {
		if _, err := os.Stat(filepath.Join(root, sign)); err == nil {
			return root
		}
	}
	return ""
}

// proto is what the control plane is told.
func (s spec) proto() *posternv1.KernelSpec {
	out := &posternv1.KernelSpec{Name: s.name, DisplayName: s.file.DisplayName, Language: s.file.Language, InterruptMode: s.file.InterruptMode, Resources: map[string][]byte{}}
	if text, err := json.Marshal(s.raw); err == nil {
		out.MetadataJson = string(text)
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return out
	}
	total := 0
	for _, e := range entries {
		if e.Name() == "kernel.json" || !e.Type().IsRegular() {
			continue
		}
		info, err := e.Info()
		if err != nil || info.Size() > maxResource || total+int(info.Size()) > maxResources {
			continue
		}
		text, err := os.ReadFile(filepath.Join(s.dir, e.Name()))
		if err != nil || len(text) > maxResource {
			continue
		}
		total += len(text)
		out.Resources[e.Name()] = text
	}
	return out
}
