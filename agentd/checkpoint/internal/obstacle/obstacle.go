package obstacle

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// An Obstacle is one thing that stands in the way.
type Obstacle struct {
	// Kind is device, socket, file, process.
	Kind string `json:"kind"`
	// PID is the process's number inside the kernel, Name the program's.
	PID  int    `json:"pid"`
	Name string `json:"name"`
	// What it is, and what to do: each a part of a line.
	What   string `json:"what"`
	Remedy string `json:"remedy"`
}

// String is one line: what, where, what to do.
func (o Obstacle) String() string {
	return fmt.Sprintf("%s in process %d (%s): %s", o.What, o.PID, o.Name, o.Remedy)
}

// Bounds: a kernel can have more, and then the check ends early and leaves the rest to
// CRIU.
const (
	maxObstacles = 100
	maxFiles     = 200_000
	maxText      = 200
)

// ErrGone is returned when the root process does not run.
var ErrGone = errors.New("the kernel does not run")

// Find looks at the processes with these ids on the host, root first (parents before
// children). own are socket paths, or their directories, inside the kernel whose
// connections are closed before a dump by their other end.
func Find(ctx context.Context, tree []int, own ...string) ([]Obstacle, error) {
	if len(tree) == 0 {
		return nil, ErrGone
	}
	f := &finder{own: own, seen: map[string]bool{}, inodes: map[uint64]bool{}}
	root := tree[0]
	var err error
	if f.mounts, err = readMounts(root); err != nil {
		return nil, ErrGone
	}
	f.namespaces = namespaces(root)
	var processes []*process
	for _, pid := range tree {
		if err := ctx.Err(); err != nil {
			return nil, context.Cause(ctx)
		}
		if p := f.read(pid); p != nil {
			processes = append(processes, p)
		}
	}
	f.sockets = readSockets(root)
	f.peers, f.peersErr = unixPeers(root)
	for _, p := range processes {
		f.process(p)
		for _, d := range p.files {
			f.file(p, d)
		}
		f.mappings(p)
	}
	return f.found, nil
}

type finder struct {
	own        []string
	mounts     map[int]mount
	namespaces map[string]string
	sockets    map[uint64]socket
	peers      map[uint64]unixSocket
	peersErr   error
	host       map[uint64]unixSocket // of the host's network namespace; nil: not read yet
	inodes     map[uint64]bool       // sockets that the tree holds
	files      int
	seen       map[string]bool
	found      []Obstacle
}

type process struct {
	pid, inside int
	name        string
	state       byte
	tracer      int
	files       []descriptor
}

type descriptor struct {
	fd    int
	link  string
	mount int // -1: unknown
	flags uint64
	info  string
}

func (f *finder) add(p *process, kind, what, remedy string) {
	key := kind + what + strconv.Itoa(p.inside)
	if f.seen[key] || len(f.found) >= maxObstacles {
		return
	}
	f.seen[key] = true
	f.found = append(f.found, Obstacle{Kind: kind, PID: p.inside, Name: p.name, What: printable(what), Remedy: remedy})
}

// printable makes a name that a kernel chose safe for a line.
func printable(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	if len(s) > maxText {
		s = strings.ToValidUTF8(s[:maxText], "") + "..."
	}
	return s
}

// read reads what is needed of a process before anything is judged: sockets are judged
// by whether their other end is in the tree.
func (f *finder) read(pid int) *process {
	dir := "/proc/" + strconv.Itoa(pid)
	status, err := os.ReadFile(dir + "/status")
	if err != nil {
		return nil
	}
	p := &process{pid: pid}
	for line := range strings.Lines(string(status)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		value = strings.TrimSpace(value)
		switch key {
		case "Name":
			p.name = printable(value)
		case "State":
			p.state = value[0]
		case "TracerPid":
			p.tracer, _ = strconv.Atoi(value)
		case "NSpid":
			fields := strings.Fields(value)
			p.inside, _ = strconv.Atoi(fields[len(fields)-1])
		}
	}
	fds, err := os.ReadDir(dir + "/fd")
	if err != nil {
		return p // a zombie
	}
	for _, e := range fds {
		if f.files++; f.files > maxFiles {
			return p
		}
		link, err := os.Readlink(dir + "/fd/" + e.Name())
		if err != nil {
			continue
		}
		d := descriptor{link: link, mount: -1}
		d.fd, _ = strconv.Atoi(e.Name())
		if inode, ok := socketInode(link); ok {
			f.inodes[inode] = true
		} else if info, err := os.ReadFile(dir + "/fdinfo/" + e.Name()); err == nil {
			d.info = string(info)
			for line := range strings.Lines(d.info) {
				if v, ok := strings.CutPrefix(line, "mnt_id:"); ok {
					d.mount, _ = strconv.Atoi(strings.TrimSpace(v))
				} else if v, ok := strings.CutPrefix(line, "flags:"); ok {
					d.flags, _ = strconv.ParseUint(strings.TrimSpace(v), 8, 64)
				}
			}
		}
		p.files = append(p.files, d)
	}
	return p
}

func (f *finder) process(p *process) {
	switch {
	case p.tracer != 0:
		f.add(p, "process", "a debugger holds the process", "detach the debugger")
	case p.state == 'D' && f.waits(p.pid):
		f.add(p, "process", "the process waits for a disk or a file system", "wait until it answers; look whether the workspace's mount is well")
	}
	if p.state == 'Z' || p.state == 'X' {
		return
	}
	for kind, ns := range namespaces(p.pid) {
		if want := f.namespaces[kind]; want != ns {
			f.add(p, "process", "the process is in a "+kind+" namespace of its own", "end it")
		}
	}
}

// waits reports whether a process waits for a disk longer than a disk takes.
func (f *finder) waits(pid int) bool {
	for range 20 {
		time.Sleep(50 * time.Millisecond)
		stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		if err != nil {
			return false
		}
		if _, rest, _ := strings.Cut(string(stat[max(0, strings.LastIndexByte(string(stat), ')')):]), " "); !strings.HasPrefix(rest, "D") {
			return false
		}
	}
	return true
}

func namespaces(pid int) map[string]string {
	all := map[string]string{}
	for _, kind := range []string{"pid", "mnt", "net", "ipc", "uts", "user"} {
		if link, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, kind)); err == nil {
			all[kind] = link
		}
	}
	return all
}

// kinds of anonymous files that CRIU has no dump for, and what people call them.
var anonymous = map[string]string{
	"io_uring":    "an io_uring",
	"perf_event":  "a perf event",
	"userfaultfd": "a userfaultfd",
	"fanotify":    "a fanotify group",
	"kvm-vm":      "a virtual machine",
	"kvm-vcpu":    "a virtual machine",
	"bpf-prog":    "a BPF program",
	"seccomp":     "a seccomp listener",
	"secretmem":   "secret memory",
	"iommufd":     "an I/O memory manager",
	"landlock":    "a Landlock rule set",
	"fscontext":   "a file system in the making",
	"mount":       "a detached mount",
}

func (f *finder) file(p *process, d descriptor) {
	if inode, ok := socketInode(d.link); ok {
		f.socket(p, d, inode)
		return
	}
	path, deleted := strings.CutSuffix(d.link, " (deleted)")
	if kind, ok := strings.CutPrefix(path, "anon_inode:"); ok {
		kind = strings.Trim(kind, "[]")
		if text := anonymous[kind]; text != "" {
			f.add(p, "device", fmt.Sprintf("%s (descriptor %d)", text, d.fd), "close it: it can't be saved")
		} else if kind == "inotify" {
			f.inotify(p, d)
		}
		return
	}
	if !strings.HasPrefix(path, "/") {
		return // pipe, memfd, namespace
	}
	m, known := f.mounts[d.mount]
	switch {
	case d.mount >= 0 && !known:
		f.add(p, "file", fmt.Sprintf("%s (descriptor %d) is open from outside the kernel's file tree", path, d.fd), "close it")
	case isDevice(path):
		f.device(p, d, path)
	case deleted && m.fuse():
		f.add(p, "file", path+" is deleted and still open, on a workspace", "close it, or put it where the kernel keeps its private files")
	}
}

// devices that a kernel has in its own /dev and that CRIU knows.
var devices = []string{"null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts/ptmx"}

func isDevice(path string) bool {
	return strings.HasPrefix(path, "/dev/") && !strings.HasPrefix(path, "/dev/shm/") && !strings.HasPrefix(path, "/dev/mqueue/")
}

func (f *finder) device(p *process, d descriptor, path string) {
	name := strings.TrimPrefix(path, "/dev/")
	if slices.Contains(devices, name) {
		return
	}
	if number, ok := strings.CutPrefix(name, "pts/"); ok {
		if _, err := strconv.Atoi(number); err == nil && f.mounts[d.mount].kind == "devpts" {
			return
		}
	}
	what := "the device " + path
	if gpu(name) {
		what = "the GPU device " + path
	}
	f.add(p, "device", what, "end the programs that use it, or restart the kernel without it: a device's memory can't be saved")
}

func gpu(name string) bool {
	return strings.HasPrefix(name, "nvidia") || strings.HasPrefix(name, "dri/") || name == "kfd" || strings.HasPrefix(name, "accel")
}

// inotify names watches on file systems whose handles CRIU can't open again.
func (f *finder) inotify(p *process, d descriptor) {
	for line := range strings.Lines(d.info) {
		if !strings.HasPrefix(line, "inotify ") {
			continue
		}
		for field := range strings.FieldsSeq(line) {
			dev, ok := strings.CutPrefix(field, "sdev:")
			if !ok {
				continue
			}
			n, err := strconv.ParseUint(dev, 16, 64)
			if err != nil {
				continue
			}
			for _, m := range f.mounts {
				if m.fuse() && m.device == n {
					f.add(p, "file", "a watch (inotify) on the workspace at "+m.path, "end the program that watches it")
				}
			}
		}
	}
}

// maxMaps bounds what is read of a process's mappings, in bytes.
const maxMaps = 16 << 20

func (f *finder) mappings(p *process) {
	file, err := os.Open(fmt.Sprintf("/proc/%d/maps", p.pid))
	if err != nil {
		return
	}
	defer file.Close() //nolint:errcheck // it is only read
	buf := make([]byte, 0, 64<<10)
	for len(buf) < maxMaps {
		buf = slices.Grow(buf, 64<<10)
		n, err := file.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		if err != nil {
			break
		}
	}
	for line := range strings.Lines(string(buf)) {
		i := strings.IndexByte(line, '/')
		if i < 0 {
			if j := strings.Index(line, "anon_inode:["); j >= 0 {
				if text := anonymous[strings.TrimSuffix(strings.TrimPrefix(strings.TrimSpace(line[j:]), "anon_inode:["), "]")]; text != "" {
					f.add(p, "device", text+" in memory", "close it: it can't be saved")
				}
			}
			continue
		}
		path, deleted := strings.CutSuffix(strings.TrimSpace(line[i:]), " (deleted)")
		switch {
		case isDevice(path) && path != "/dev/zero" && path != "/dev/null":
			what := "memory of the device " + path
			if gpu(strings.TrimPrefix(path, "/dev/")) {
				what = "memory of the GPU device " + path
			}
			f.add(p, "device", what, "end the programs that use it, or restart the kernel without it: a device's memory can't be saved")
		case deleted:
			for _, m := range f.mounts {
				if m.fuse() && (path == m.path || strings.HasPrefix(path, m.path+"/")) {
					f.add(p, "file", path+" is deleted and still mapped, on a workspace", "close it, or load it from where it is now")
				}
			}
		}
	}
}

// mount is a line of mountinfo.
type mount struct {
	path, kind string
	device     uint64 // as fdinfo writes it: major<<20 | minor
}

func (m mount) fuse() bool { return m.kind == "fuse" || strings.HasPrefix(m.kind, "fuse.") }

func readMounts(pid int) (map[int]mount, error) {
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "mountinfo"))
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
			return nil, ErrGone
		}
		return nil, err
	}
	all := map[int]mount{}
	for line := range strings.Lines(string(text)) {
		left, right, ok := strings.Cut(line, " - ")
		fields, kinds := strings.Fields(left), strings.Fields(right)
		if !ok || len(fields) < 5 || len(kinds) < 1 {
			continue
		}
		id, err := strconv.Atoi(fields[0])
		if err != nil {
			continue
		}
		major, minor, _ := strings.Cut(fields[2], ":")
		a, _ := strconv.ParseUint(major, 10, 32)
		b, _ := strconv.ParseUint(minor, 10, 32)
		all[id] = mount{path: unescape(fields[4]), kind: kinds[0], device: a<<20 | b}
	}
	return all, nil
}

var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace
