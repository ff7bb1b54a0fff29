package criu

type op string

const (
	opDump    op = "dump"
	opRestore op = "restore"
	opVersion op = "version"
	opStat    op = "stat"
)

// request is the first line on the helper's stdin.
type request struct {
	Op           op       `json:"op"`
	Criu         string   `json:"criu"`
	PID          int      `json:"pid,omitempty"`
	Images       string   `json:"images,omitempty"`
	Root         string   `json:"root,omitempty"`
	LeaveRunning bool     `json:"leave_running,omitempty"`
	External     []string `json:"external,omitempty"`
	// Inherit are keys whose file is the helper's descriptor firstInherited plus the index.
	Inherit []string `json:"inherit,omitempty"`
	Cgroups []string `json:"cgroups,omitempty"`
	// NetNS is the path of the network namespace that CRIU joins first.
	NetNS string `json:"netns,omitempty"`
	Stop  bool   `json:"stop,omitempty"`
	Lazy  bool   `json:"lazy,omitempty"`
	// Copies are directories to copy while the tree stands still.
	Copies  []CopyDir `json:"copies,omitempty"`
	Verbose bool      `json:"verbose,omitempty"`
	Preload string    `json:"preload,omitempty"`
	// Stat are the files that opStat looks at.
	Stat []Sized `json:"stat,omitempty"`
}

// Sized is a file and the size that it must have; -1: it must be there.
type Sized struct {
	Path string `json:"path"`
	Size int64  `json:"size"`
}

// CopyDir is a directory of the host that is copied, as it is while the tree stands
// still, to another, empty one. Max bounds the bytes of its files.
type CopyDir struct {
	From string `json:"from"`
	To   string `json:"to"`
	Max  int64  `json:"max,omitempty"`
}

const (
	eventsFD       = 3
	firstInherited = 4
	// maxRequest and maxEvents bound what is read from the other side, in bytes.
	maxRequest = 64 << 20
	maxEvents  = 4 << 20
)

// event is a line on the helper's fd 3: born, or the answer.
type event struct {
	// Criu is CRIU's own process id, told when it is there.
	Born int `json:"born,omitempty"`
	// Done marks the answer.
	Done bool `json:"done,omitempty"`
	// Failed is go-criu's error; the log has the cause.
	Failed string `json:"failed,omitempty"`
	// Killed marks that somebody killed CRIU.
	Killed bool `json:"killed,omitempty"`
	// Copy marks that a copy failed, not CRIU; Full that it was for want of space.
	Copy     bool      `json:"copy,omitempty"`
	Full     bool      `json:"full,omitempty"`
	Stats    DumpStats `json:"stats,omitzero"`
	Restored Restored  `json:"restored,omitzero"`
	Version  int       `json:"version,omitempty"`
	// Sizes answer opStat: each file's size, -1 if it is not there.
	Sizes []int64 `json:"sizes,omitempty"`
	// Times do, too: when each was changed, in nanoseconds since the epoch; 0: not there.
	Times []int64 `json:"times,omitempty"`
}
