package shim

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/postern-dev/postern/agentd/atomicfile"
	"github.com/postern-dev/postern/agentd/kernel/internal/sandbox"
)

// Files in a kernel's directory.
const (
	specFile    = "spec.json"
	stateFile   = "shim.json"
	lockFile    = "shim.lock"
	socketFile  = "shim.sock"
	logFile     = "shim.log"
	journalDir  = "journal"
	runDir      = "run"
	privateDir  = "private"
	kernelLog   = "log"
	connectFile = "connection.json"
	// socketStem is the name of the kernel's sockets: k-1 to k-5.
	socketStem = "k"
)

// ConnectionInside is the connection file's path inside a kernel: what
// {connection_file} stands for in a kernelspec.
const ConnectionInside = sandbox.RunInside + "/" + connectFile

// WorkInside is where kernels see workspaces, followed by the name.
const WorkInside = "/work/"

// Spec says everything to start, adopt or restore a kernel. agentd writes it; it is
// durable before the kernel's first process.
type Spec struct {
	// ID is the kernel's id; empty while it waits in the pool.
	ID string `json:"id"`
	// Name is the kernelspec's, Language what it says.
	Name     string `json:"name"`
	Language string `json:"language"`
	// InterruptMode is signal or message.
	InterruptMode string `json:"interrupt_mode"`
	// Owner is a posternv1.Principal as JSON.
	Owner  json.RawMessage `json:"owner,omitempty"`
	Mounts []Mount         `json:"mounts,omitempty"`
	// JournalBytes bounds the journal.
	JournalBytes int64     `json:"journal_bytes"`
	Created      time.Time `json:"created"`
	// Sandbox is what runs, and where.
	Sandbox sandbox.Spec `json:"sandbox"`
}

// Mount is a workspace in a kernel.
type Mount struct {
	Workspace string `json:"workspace"`
	ReadOnly  bool   `json:"read_only,omitempty"`
}

// Places fills in the sandbox's directories in a kernel's directory.
func (s *Spec) Places(dir string) {
	s.Sandbox.StateDir, s.Sandbox.RunDir = dir, filepath.Join(dir, runDir)
	s.Sandbox.PrivateDir, s.Sandbox.LogFile = filepath.Join(dir, privateDir), filepath.Join(dir, kernelLog)
}

// maxSpec bounds spec.json and shim.json, in bytes.
const maxSpec = 4 << 20

// ReadSpec reads a kernel's spec; fs.ErrNotExist when there is none.
func ReadSpec(dir string) (Spec, error) {
	var s Spec
	return s, readJSON(filepath.Join(dir, specFile), &s)
}

// WriteSpec writes a kernel's spec, durably.
func WriteSpec(dir string, s Spec) error { return writeJSON(filepath.Join(dir, specFile), s) }

// State is what a shim leaves to the next one.
type State struct {
	// Generation is raised by each start of the kernel's processes, before it; 0: never
	// started.
	Generation uint64    `json:"generation"`
	Epoch      uint64    `json:"epoch"`
	Started    time.Time `json:"started,omitzero"`
	// Key signs the messages. It is in a file of the kernel's, too, which is not trusted.
	Key string `json:"key,omitempty"`
	// Dead is why its processes ended, one line; empty: they run, or should.
	Dead string `json:"dead,omitempty"`
	// Suspended: there are no processes, by intent.
	Suspended bool `json:"suspended,omitempty"`
	// Checkpoint is what the state of its processes descends from; empty: none.
	Checkpoint string `json:"checkpoint,omitempty"`
	// Sandbox is the sandbox's spec with what it found at the start.
	Sandbox *sandbox.Spec `json:"sandbox,omitempty"`
	// Move holds the kernel; nil: none does. Moved is the id of the move that brought it
	// here, once it is here for good.
	Move  *Move  `json:"move,omitempty"`
	Moved string `json:"moved,omitempty"`
}

// ReadState reads what a kernel's shim wrote last; the zero State when it never did.
func ReadState(dir string) (State, error) {
	var st State
	err := readJSON(filepath.Join(dir, stateFile), &st)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return st, err
}

func readJSON(path string, v any) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // it was read
	if info, err := f.Stat(); err != nil {
		return err
	} else if info.Size() > maxSpec {
		return fmt.Errorf("%s is over %d bytes", path, maxSpec)
	}
	if err := json.NewDecoder(f).Decode(v); err != nil {
		return fmt.Errorf("%s cannot be read: %w", path, err)
	}
	return nil
}

func writeJSON(path string, v any) error {
	text, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	if len(text) > maxSpec {
		return errors.New("a kernel's specification over 4 MiB")
	}
	var files atomicfile.FS
	return files.Write(path, append(text, '\n'), 0o600)
}
