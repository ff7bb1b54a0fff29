package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/atomicfile"
	"github.com/postern-dev/postern/agentd/attach/fdkeeper"
	"github.com/postern-dev/postern/agentd/attach/fusefs"
	"github.com/postern-dev/postern/agentd/attach/fuseserver"
	"github.com/postern-dev/postern/agentd/attach/mountd"
	"github.com/postern-dev/postern/agentd/attach/remote"
	"github.com/postern-dev/postern/agentd/attach/replica"
	"github.com/postern-dev/postern/agentd/config"
	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/proto"
)

const (
	// mountdArg and keeperArg are agentd's first argument in the process that serves mounts
	// and in the one that keeps them; the state directory and the configuration's file
	// follow.
	mountdArg = "mountd"
	keeperArg = "fdkeeper"

	// attachDir, in the state directory, has sockets, replicas and logs of mounts.
	attachDir = "attach"
	// replicasDir, in attachDir, has a directory for each workspace, and its id beside it.
	replicasDir = "workspaces"
	// proxySocket, in attachDir, is where agentd lends mountd the tunnel.
	proxySocket = "agentd.sock"
	attachLog   = "mountd.log"

	// remoteDeadline is how long a request of a file system waits for the control plane;
	// fuseserver.DefaultDeadline is longer.
	remoteDeadline = 20 * time.Second
)

// keeperMain is the process that keeps mounts: agentd fdkeeper STATE CONFIG [ready]. With
// the last one it says on descriptor 3 when it can be reached.
func keeperMain(args []string) int {
	say := func(string) {}
	if len(args) == 3 && args[2] == "ready" {
		ready := os.NewFile(3, "ready")
		unix.CloseOnExec(3)
		say = func(s string) { _, _ = ready.WriteString(s); _ = ready.Close() }
	} else if len(args) != 2 {
		fmt.Fprintln(os.Stderr, "agentd: "+keeperArg+" is started by agentd")
		return proto.ExitUsage
	}
	fail := func(err error) int {
		say(oneLine(err.Error()))
		fmt.Fprintln(os.Stderr, "agentd "+keeperArg+": "+oneLine(err.Error()))
		return proto.ExitFailed
	}
	program, err := programPath()
	if err != nil {
		return fail(err)
	}
	dir := filepath.Join(args[0], attachDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fail(err)
	}
	control, err := fuseserver.OpenControl()
	if err != nil {
		return fail(fmt.Errorf("%w: does this kernel have FUSE, and this process CAP_SYS_ADMIN? With systemd: systemctl enable --now agentd-mountd", err))
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	for {
		err = fdkeeper.Run(ctx, fdkeeper.Config{
			Dir: dir, Command: []string{program, mountdArg, args[0], args[1]}, Env: attachEnvironment(), Control: control,
			Logger: processLogger("keeper"),
		}, func() { say("ready") })
		switch {
		case !errors.Is(err, fdkeeper.ErrTaken):
			if err != nil {
				return fail(err)
			}
			return proto.ExitDone
		case len(args) == 3:
			say("ready")
			return proto.ExitDone
		}
		// The unit's: mountd has started another one meanwhile. Take its place when it ends.
		select {
		case <-ctx.Done():
			return proto.ExitDone
		case <-time.After(time.Second):
		}
	}
}

// programPath is this program where the next one will be after an upgrade.
func programPath() (string, error) {
	path, err := os.Executable()
	return strings.TrimSuffix(path, " (deleted)"), err
}

// attachEnvironment is all that keeper and mountd get: agentd's own may hold secrets.
func attachEnvironment() []string {
	env := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"}
	for _, name := range []string{"GOCOVERDIR", "GORACE"} { // of tests
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	return env
}

func processLogger(name string) *slog.Logger {
	return newLogger("text", new(slog.LevelVar), os.Stderr).With("process", name)
}

// mountdMain is the process that serves mounts: agentd mountd STATE CONFIG.
func mountdMain(args []string) int {
	if len(args) != 2 {
		fmt.Fprintln(os.Stderr, "agentd: "+mountdArg+" is started by agentd")
		return proto.ExitUsage
	}
	state, file := args[0], args[1]
	logger := processLogger("mountd")
	harden(logger)
	dir := filepath.Join(state, attachDir)
	replicas := filepath.Join(dir, replicasDir)
	if err := os.MkdirAll(replicas, 0o700); err != nil {
		logger.Error("mountd not started", "err", err)
		return proto.ExitFailed
	}
	client := remote.Dial(filepath.Join(dir, proxySocket))
	defer client.Close()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	var small sync.WaitGroup
	defer small.Wait()
	defer stop()
	small.Go(func() { keepSmall(ctx, logger, func() bool { return true }) })
	code, err := mountd.Run(ctx, mountd.Config{
		Dir:     dir,
		Pending: func() []string { return append(replicaNames(replicas), bucketNames(dir, file)...) },
		Open: func(ctx context.Context, name string, readOnly bool) (mountd.Workspace, error) {
			if w, found, err := openBucketMount(dir, file, name, readOnly, logger); found {
				return w, err
			}
			return openReplica(ctx, replicas, file, name, readOnly, client, logger)
		},
		Decide: func(name string) (mountd.Permission, error) {
			c, err := config.Load(file, sqlsession.ValidateDSN)
			if err != nil {
				return mountd.Permission{}, proto.Errorf(proto.CodePolicyDenied, "the configuration does not say whether workspaces may be mounted: %v", err)
			}
			readOnly, reason := c.Attachments.Mount(name)
			if b, ok := c.Attachments.Bind(name); ok && reason == "" {
				reason = fmt.Sprintf("%s is the directory %s of this host, not a workspace: it is for kernels alone", name, b.Path)
			}
			if reason != "" {
				return mountd.Permission{}, proto.Errorf(proto.CodePolicyDenied, "%s", reason)
			}
			return mountd.Permission{ReadOnly: readOnly}, nil
		},
		SpawnKeeper: func(ctx context.Context) error {
			program, err := programPath()
			if err != nil {
				return err
			}
			p, err := spawnKeeper(ctx, program, state, file)
			if err != nil {
				return err
			}
			return p.Release()
		},
		Logger: logger,
	})
	if err != nil {
		logger.Error("mountd has ended", "err", err)
	}
	return code
}

// spawnKeeper starts a keeper, unless there is one.
func spawnKeeper(ctx context.Context, program, state, file string) (*os.Process, error) {
	return fdkeeper.Spawn(ctx, fdkeeper.SpawnConfig{
		Command: []string{program, keeperArg, state, file, "ready"}, Env: attachEnvironment(), LogFile: filepath.Join(state, attachDir, attachLog),
	})
}

// workspaceName is what a workspace may be called, and thus its directory.
var workspaceName = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)

// replicaNames are the workspaces that this host has a replica of.
func replicaNames(dir string) []string {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	var out []string
	for _, e := range entries {
		if e.IsDir() && workspaceName.MatchString(e.Name()) {
			out = append(out, e.Name())
		}
	}
	return out
}

// openReplica opens this host's replica of a workspace.
func openReplica(ctx context.Context, replicas, file, name string, readOnly bool, client remote.Remote, logger *slog.Logger) (mountd.Workspace, error) {
	if !workspaceName.MatchString(name) {
		return nil, proto.Errorf(proto.CodeInvalid, "%.80q is no name of a workspace: 1 to 63 of a-z, 0-9, - _ and ., beginning with a letter or digit", name)
	}
	limits := config.Default().Attachments
	if c, err := config.Load(file, sqlsession.ValidateDSN); err == nil {
		limits = c.Attachments
	}
	dir := filepath.Join(replicas, name)
	id, fresh, err := mountID(dir)
	if err != nil {
		return nil, err
	}
	r, err := replica.Open(ctx, replica.Config{
		Dir: dir, Workspace: name, MountID: id, Remote: client, Log: logger, ReadOnly: readOnly,
		CacheBytes: int64(limits.Cache), MaxUnsent: int64(limits.Unsent), Deadline: remoteDeadline,
	})
	if err != nil && fresh {
		// Nothing of it is here, so nothing can be lost: a mistyped name leaves no trace.
		err = errors.Join(err, os.RemoveAll(dir), os.Remove(dir+".id"))
	}
	if err != nil {
		return nil, openError(name, err)
	}
	return &replicaWorkspace{Replica: r, readOnly: readOnly, logger: logger.With("workspace", name)}, nil
}

// openError is what whoever asked for a mount is told.
func openError(name string, err error) error {
	switch code := proto.CodeOf(err); code {
	case proto.CodeInternal, proto.CodeTimeout, proto.CodeUnavailable:
		return proto.Errorf(proto.CodeUnavailable, "workspace %s cannot be opened on this host: %v", name, err)
	default:
		return proto.Errorf(code, "workspace %s: %v", name, err)
	}
}

// mountID is the UUID of this host's replica, made the first time: fresh.
func mountID(dir string) (id string, fresh bool, err error) {
	text, err := os.ReadFile(dir + ".id")
	if err == nil {
		return strings.TrimSpace(string(text)), false, nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		return "", false, err
	}
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", false, err
	}
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	id = fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
	return id, true, atomicfile.FS{}.Write(dir+".id", []byte(id+"\n"), 0o600)
}

// replicaWorkspace makes a replica what mountd asks for.
type replicaWorkspace struct {
	*replica.Replica
	readOnly bool
	logger   *slog.Logger
}

// attachedKernel makes a connection what a file system asks for.
type attachedKernel struct {
	*fuseserver.Conn
	logger *slog.Logger
}

var _ fusefs.Kernel = attachedKernel{}

// CloseBacking implements fusefs.Kernel.
func (k attachedKernel) CloseBacking(node, key uint64) {
	if err := k.Conn.CloseBacking(node, key); err != nil {
		k.logger.Warn("backing file not released", "err", err)
	}
}

var _ mountd.Workspace = (*replicaWorkspace)(nil)

// Mount implements mountd.Workspace.
func (w *replicaWorkspace) Mount(squash bool) (mountd.Mount, error) {
	options := fusefs.Options{Squash: squash, ReadOnly: w.readOnly}
	if squash {
		options.Slot = 1
	}
	fs := fusefs.New(w.Replica, options)
	opts := fusefs.MountOptions(options)
	return mountd.Mount{
		// In a squashed one every caller is the owner, whatever its user id.
		FS: fs, Options: opts, DefaultPermissions: !squash,
		SetKernel: func(k *fuseserver.Conn, inherited bool) { fs.SetKernel(attachedKernel{k, w.logger}, inherited) }, Ended: fs.Close,
	}, nil
}

// Conflicts implements mountd.Workspace.
func (w *replicaWorkspace) Conflicts() (out []mountd.Conflict) {
	for _, c := range w.Replica.Conflicts() {
		out = append(out, mountd.Conflict{Path: []byte(c.Path), KeptAs: []byte(c.KeptAs), TimeNs: c.TimeNs})
	}
	return out
}

// Status implements mountd.Workspace.
func (w *replicaWorkspace) Status() mountd.WorkspaceStatus {
	s := w.Replica.Status()
	return mountd.WorkspaceStatus{
		UnsentOps: s.Ops, UnsentBytes: s.Bytes, Oldest: s.Oldest, Conflicts: s.Conflicts, CacheBytes: s.CacheBytes,
		Nodes: s.Nodes, Connected: s.Connected, LastError: s.LastError,
	}
}
