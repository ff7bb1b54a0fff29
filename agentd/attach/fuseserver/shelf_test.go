package fuseserver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// shelf is a file system for tests: files f0 to f9 are read and written by requests, p0 to
// p9 are passed through, "slow" takes a while to read, "stuck" for ever. Nodes are numbers
// that mean the same in each life; all state is in dir.
type shelf struct {
	fuse.RawFileSystem
	dir  string
	conn *Conn
}

const (
	slowNode  = 100
	stuckNode = 101
	slowTime  = 300 * time.Millisecond
)

func (s *shelf) name(node uint64) string {
	switch {
	case node == slowNode:
		return "slow"
	case node == stuckNode:
		return "stuck"
	case node >= 20 && node < 30:
		return "p" + strconv.Itoa(int(node-20))
	case node >= 10 && node < 20:
		return "f" + strconv.Itoa(int(node-10))
	}
	return ""
}

func (s *shelf) node(name string) uint64 {
	switch name {
	case "slow":
		return slowNode
	case "stuck":
		return stuckNode
	}
	n, err := strconv.Atoi(name[1:])
	switch {
	case err != nil || n > 9:
		return 0
	case name[0] == 'f':
		return uint64(10 + n)
	case name[0] == 'p':
		return uint64(20 + n)
	}
	return 0
}

func (s *shelf) attr(node uint64, a *fuse.Attr) fuse.Status {
	a.Ino, a.Nlink = node, 1
	if node == 1 {
		a.Mode = syscall.S_IFDIR | 0o755
		return fuse.OK
	}
	a.Mode = syscall.S_IFREG | 0o644
	st, err := os.Stat(filepath.Join(s.dir, s.name(node)))
	if err != nil {
		return fuse.ToStatus(err)
	}
	a.Size = uint64(st.Size())
	return fuse.OK
}

func (s *shelf) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	node := s.node(name)
	if node == 0 {
		return fuse.ENOENT
	}
	out.NodeId, out.Generation = node, 1
	return s.attr(node, &out.Attr)
}

func (s *shelf) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	return s.attr(in.NodeId, &out.Attr)
}

func (s *shelf) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	if size, ok := in.GetSize(); ok {
		if err := os.Truncate(filepath.Join(s.dir, s.name(in.NodeId)), int64(size)); err != nil {
			return fuse.ToStatus(err)
		}
	}
	return s.attr(in.NodeId, &out.Attr)
}

func (s *shelf) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if in.NodeId < 20 || in.NodeId >= 30 || !s.conn.Passthrough() {
		// Without it an open during a write lets a READ overtake the WRITE and leave old
		// bytes in the page cache: the kernel's pages are not locked while it waits.
		out.OpenFlags = fuse.FOPEN_KEEP_CACHE
		return fuse.OK
	}
	f, err := os.OpenFile(filepath.Join(s.dir, s.name(in.NodeId)), os.O_RDWR, 0)
	if err != nil {
		return fuse.ToStatus(err)
	}
	defer f.Close()
	key := in.Unique &^ ResentBit
	id, _, err := s.conn.OpenBacking(in.NodeId, key, int(f.Fd()))
	if err != nil {
		return fuse.ToStatus(err)
	}
	out.Fh, out.BackingID, out.OpenFlags = key, id, fuse.FOPEN_PASSTHROUGH
	return fuse.OK
}

func (s *shelf) Release(_ <-chan struct{}, in *fuse.ReleaseIn) {
	_ = s.conn.CloseBacking(in.NodeId, in.Fh)
}

func (s *shelf) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status   { return fuse.OK }
func (s *shelf) Fsync(<-chan struct{}, *fuse.FsyncIn) fuse.Status   { return fuse.OK }
func (s *shelf) Access(<-chan struct{}, *fuse.AccessIn) fuse.Status { return fuse.OK }
func (s *shelf) OnUnmount()                                         {}
func (s *shelf) StatFs(_ <-chan struct{}, _ *fuse.InHeader, _ *fuse.StatfsOut) fuse.Status {
	return fuse.OK
}

func (s *shelf) Read(cancel <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	switch in.NodeId {
	case slowNode:
		time.Sleep(slowTime)
	case stuckNode:
		select {} // ignores cancel on purpose
	}
	f, err := os.Open(filepath.Join(s.dir, s.name(in.NodeId)))
	if err != nil {
		return nil, fuse.ToStatus(err)
	}
	defer f.Close()
	n, err := f.ReadAt(buf, int64(in.Offset))
	if n == 0 && err != nil && !strings.Contains(err.Error(), "EOF") {
		return nil, fuse.ToStatus(err)
	}
	return fuse.ReadResultData(buf[:n]), fuse.OK
}

// ReadFile implements Files, for files that are not passed through; FUSESERVER_TEST_SPLICE=off: for none.
func (s *shelf) ReadFile(node uint64, offset int64, size int) (int, func(), bool) {
	if node >= 20 || os.Getenv("FUSESERVER_TEST_SPLICE") == "off" {
		return 0, nil, false
	}
	f, err := os.Open(filepath.Join(s.dir, s.name(node)))
	if err != nil {
		return 0, nil, false
	}
	if st, err := f.Stat(); err != nil || st.Size() < offset+int64(size) {
		f.Close()
		return 0, nil, false
	}
	return int(f.Fd()), func() { f.Close() }, true
}

func (s *shelf) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	f, err := os.OpenFile(filepath.Join(s.dir, s.name(in.NodeId)), os.O_WRONLY, 0)
	if err != nil {
		return 0, fuse.ToStatus(err)
	}
	defer f.Close()
	n, err := f.WriteAt(data, int64(in.Offset))
	return uint32(n), fuse.ToStatus(err)
}

// shelfOptions are those of every life; FUSESERVER_TEST_WRITE changes them.
func shelfOptions() fuse.MountOptions {
	o := fuse.MountOptions{MaxWrite: 256 << 10, MaxBackground: 64, DisableXAttrs: true}
	if v, err := strconv.Atoi(os.Getenv("FUSESERVER_TEST_WRITE")); err == nil {
		o.MaxWrite = v
	}
	return o
}

// serveMain serves descriptor 3 with the files of argument 1 until it is told to stop,
// or killed. It says "ready" on standard output, or what is wrong.
func serveMain() int {
	dir, state := os.Args[1], os.Args[2]
	deadline, _ := time.ParseDuration(os.Args[3])
	savedFile := filepath.Join(state, "saved")
	var saved *Saved
	if text, err := os.ReadFile(savedFile); err == nil {
		saved = &Saved{}
		if err := json.Unmarshal(text, saved); err != nil {
			fmt.Println(err)
			return 1
		}
	}
	s := &shelf{RawFileSystem: fuse.NewDefaultRawFileSystem(), dir: dir}
	server, err := New(Config{
		Dev: os.NewFile(3, "/dev/fuse"), FS: s, Options: shelfOptions(), Saved: saved, BackingFile: filepath.Join(state, "backings"),
		Save: func(v Saved) error {
			text, err := json.Marshal(v)
			return errors.Join(err, os.WriteFile(savedFile, text, 0o600))
		},
		Conn: func(c *Conn) { s.conn = c }, Deadline: deadline,
		Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)),
	})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("ready", server.Conn().Passthrough(), len(server.Conn().Backings()))
	ctx, stop := context.WithCancel(context.Background())
	go func() { // standard input's end is the wish to stop
		var b [1]byte
		_, _ = os.Stdin.Read(b[:])
		stop()
	}()
	if err := server.Serve(ctx); err != nil && !errors.Is(err, ErrGone) {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}
