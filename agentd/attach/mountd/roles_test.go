package mountd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/postern-dev/postern/agentd/attach/fdkeeper"
	"github.com/postern-dev/postern/agentd/attach/fuseserver"
	"github.com/postern-dev/postern/proto"
)

func role(name string, args ...string) ([]string, []string) {
	return append([]string{os.Args[0]}, args...), append(os.Environ(), "MOUNTD_TEST_ROLE="+name)
}

func keeperMain() int {
	dir := os.Args[1]
	ready := os.NewFile(3, "ready")
	control, err := fuseserver.OpenControl()
	if err != nil {
		_, _ = ready.WriteString(err.Error())
		return 1
	}
	command, env := role("mountd", dir)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	err = fdkeeper.Run(ctx, fdkeeper.Config{
		Dir: dir, Command: command, Env: env, Control: control, Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)),
	}, func() { _, _ = ready.WriteString("ready"); _ = ready.Close() })
	if errors.Is(err, fdkeeper.ErrTaken) {
		_, _ = ready.WriteString("ready")
		return 0
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// replicaForTest is a workspace of one file, "f", whose content is a file on the host.
// What the file "unsent" exists is not sent.
type replicaForTest struct {
	fuse.RawFileSystem
	dir string
}

func (r *replicaForTest) attr(node uint64, a *fuse.Attr) fuse.Status {
	a.Ino, a.Nlink, a.Mode = node, 1, syscall.S_IFDIR|0o755
	if node == 2 {
		st, err := os.Stat(filepath.Join(r.dir, "f"))
		if err != nil {
			return fuse.ToStatus(err)
		}
		a.Mode, a.Size = syscall.S_IFREG|0o666, uint64(st.Size())
	}
	return fuse.OK
}

func (r *replicaForTest) Lookup(_ <-chan struct{}, _ *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if name != "f" {
		return fuse.ENOENT
	}
	out.NodeId = 2
	return r.attr(2, &out.Attr)
}

func (r *replicaForTest) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	return r.attr(in.NodeId, &out.Attr)
}

func (*replicaForTest) Open(_ <-chan struct{}, _ *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	out.OpenFlags = fuse.FOPEN_DIRECT_IO
	return fuse.OK
}

func (*replicaForTest) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.OK }

func (r *replicaForTest) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	f, err := os.Open(filepath.Join(r.dir, "f"))
	if err != nil {
		return nil, fuse.ToStatus(err)
	}
	defer f.Close()
	n, err := f.ReadAt(buf, int64(in.Offset))
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fuse.ToStatus(err)
	}
	return fuse.ReadResultData(buf[:n]), fuse.OK
}

func (r *replicaForTest) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	f, err := os.OpenFile(filepath.Join(r.dir, "f"), os.O_WRONLY, 0)
	if err != nil {
		return 0, fuse.ToStatus(err)
	}
	defer f.Close()
	n, err := f.WriteAt(data, int64(in.Offset))
	return uint32(n), fuse.ToStatus(err)
}

func (r *replicaForTest) Mount(bool) (Mount, error) {
	return Mount{FS: r, Options: fuse.MountOptions{MaxWrite: 64 << 10}}, nil
}
func (*replicaForTest) Inherit()     {}
func (*replicaForTest) Fresh() error { return nil }
func (r *replicaForTest) Status() WorkspaceStatus {
	if _, err := os.Stat(filepath.Join(r.dir, "unsent")); err == nil {
		return WorkspaceStatus{UnsentOps: 3, UnsentBytes: 1000}
	}
	return WorkspaceStatus{Connected: true}
}

func (r *replicaForTest) Drain(ctx context.Context) error {
	for r.Status().UnsentOps > 0 {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
	return nil
}
func (*replicaForTest) Close() error { return nil }

// Unsent are more paths than a message has room for.
func (r *replicaForTest) Unsent() (paths []string) {
	for i := range r.Status().UnsentOps * 100 {
		paths = append(paths, fmt.Sprintf("/%d%s", i, strings.Repeat("\xff", 1000)))
	}
	return paths
}

func (r *replicaForTest) Conflicts() []Conflict {
	return []Conflict{{Path: []byte("/a"), KeptAs: []byte("/a (conflict)"), TimeNs: 1}}
}

func (r *replicaForTest) Gone() bool {
	_, err := os.Stat(filepath.Join(r.dir, "gone"))
	return err == nil
}

func mountdMain() int {
	dir := os.Args[1]
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	code, err := Run(ctx, Config{
		Dir: dir,
		Open: func(_ context.Context, name string, _ bool) (Workspace, error) {
			if name == "missing" {
				return nil, proto.Errorf(proto.CodeNotFound, "there is no workspace %s", name)
			}
			return &replicaForTest{RawFileSystem: fuse.NewDefaultRawFileSystem(), dir: dir}, nil
		},
		Decide: func(name string) (Permission, error) {
			if name == "secret" {
				return Permission{}, proto.Errorf(proto.CodePolicyDenied, "no")
			}
			return Permission{ReadOnly: strings.HasPrefix(name, "ro")}, nil
		},
		SpawnKeeper: func(ctx context.Context) error {
			command, env := role("keeper", dir)
			p, err := fdkeeper.Spawn(ctx, fdkeeper.SpawnConfig{Command: command, Env: env, LogFile: filepath.Join(dir, "log")})
			if err != nil {
				return err
			}
			return p.Release()
		},
		Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)),
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, "mountd:", err)
	}
	return code
}

// readMain reads a file until a time is over, or once, and prints the last content and
// the longest read in milliseconds; any error ends it.
func readMain() int {
	span, _ := time.ParseDuration(os.Args[2])
	var worst time.Duration
	for until := time.Now().Add(span); ; {
		began := time.Now()
		text, err := os.ReadFile(os.Args[1])
		worst = max(worst, time.Since(began))
		if err != nil || time.Now().After(until) {
			var errno syscall.Errno
			errors.As(err, &errno)
			fmt.Printf("%q %d %d\n", text, errno, worst.Milliseconds())
			return 0
		}
	}
}

func writeMain() int {
	f, err := os.OpenFile(os.Args[1], os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteString("67890")
		err = errors.Join(err, f.Close())
	}
	var errno syscall.Errno
	errors.As(err, &errno)
	fmt.Printf("%d\n", errno)
	return 0
}
