package mountd

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/postern-dev/postern/agentd/attach/fdkeeper"
	"github.com/postern-dev/postern/agentd/attach/fuseserver"
	"github.com/postern-dev/postern/agentd/attach/packet"
	"github.com/postern-dev/postern/proto"
)

// blob is what the keeper has of a superblock, for the next mountd.
type blob struct {
	Workspace string            `json:"workspace"`
	Squash    bool              `json:"squash"`
	ReadOnly  bool              `json:"read_only"`
	Saved     *fuseserver.Saved `json:"saved,omitempty"`
	Holders   []Holder          `json:"holders,omitempty"`
}

// superblock is one connection of the kernel.
type superblock struct {
	name   string // at the keeper
	minor  uint32
	dev    *os.File // for another keeper
	spare  *os.File // a detached mount, for another keeper
	state  blob     // guarded by Daemon.mu
	server *fuseserver.Server
	mount  Mount
	done   chan struct{} // Serve has returned
}

// opened is an open workspace.
type opened struct {
	name     string
	readOnly bool
	ws       Workspace
	supers   map[bool]*superblock // by squash
}

// Daemon is a running mountd.
type Daemon struct {
	cfg     Config
	started time.Time
	wg      sync.WaitGroup
	serve   context.Context // ends when servers shall hand over
	stop    context.CancelFunc
	fatal   chan error // a server that cannot go on

	// changing makes attaches and detaches wait for each other; mu guards memory alone.
	changing sync.Mutex

	mu      sync.Mutex
	keeper  *fdkeeper.Client
	known   bool // the keeper is there
	open    map[string]*opened
	failed  map[string]string // connections that could not be taken over
	leaving bool
}

// Run serves until ctx ends, which hands everything over to the next mountd (it returns
// fdkeeper.ExitReplaced), or until it was told that nothing is needed any more (0).
// The process must exit then.
func Run(ctx context.Context, cfg Config) (int, error) {
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return 1, err
	}
	d := &Daemon{cfg: cfg, started: time.Now().UTC(), fatal: make(chan error, 1), open: map[string]*opened{}, failed: map[string]string{}}
	d.serve, d.stop = context.WithCancel(context.Background())
	defer d.stop()
	if err := d.takeOver(ctx); err != nil {
		return 1, err
	}
	listener, err := packet.Listen(cfg.Dir, SocketName)
	if err != nil {
		return 1, fmt.Errorf("mountd's socket: %w", err)
	}
	idle := make(chan struct{})
	life, end := context.WithCancel(ctx)
	defer end()
	d.wg.Go(func() { d.accept(life, listener, sync.OnceFunc(func() { close(idle) })) })
	d.wg.Go(func() { d.beat(life) })
	d.wg.Go(func() { d.reopen(life) })
	code := fdkeeper.ExitReplaced
	select {
	case <-ctx.Done():
	case <-idle:
		code = 0
	case err = <-d.fatal:
		code = 1
	}
	end()
	return code, errors.Join(err, listener.Close(), d.close())
}

// takeOver claims everything that the keeper has and goes on serving it.
func (d *Daemon) takeOver(ctx context.Context) error {
	k, err := fdkeeper.Dial(d.cfg.Dir)
	if err != nil {
		return err
	}
	names, err := k.Claim(ctx)
	if err != nil {
		return err
	}
	began := time.Now()
	d.keeper, d.known = k, true
	opening, opened := context.WithCancel(ctx)
	defer opened()
	d.wg.Go(func() { d.opening(opening, k) })
	var wg sync.WaitGroup
	byWorkspace := map[string][]*superblock{}
	for _, name := range names {
		s, err := d.fetch(name)
		if err != nil {
			d.refuse(name, err)
			continue
		}
		byWorkspace[s.state.Workspace] = append(byWorkspace[s.state.Workspace], s)
	}
	for workspace, supers := range byWorkspace {
		wg.Go(func() {
			if err := d.inherit(ctx, workspace, supers); err != nil {
				for _, s := range supers {
					d.refuse(s.name, err)
				}
			}
		})
	}
	wg.Wait()
	d.clean()
	if len(names) > 0 {
		d.cfg.Logger.Info("mounts taken over", "connections", len(names), "duration_seconds", time.Since(began).Seconds())
	}
	return nil
}

// refuse notes a connection that cannot be served; the keeper aborts it when somebody
// waits for it.
func (d *Daemon) refuse(name string, err error) {
	d.cfg.Logger.Error("mount not taken over", "connection", name, "err", err)
	d.mu.Lock()
	d.failed[name] = err.Error()
	d.mu.Unlock()
}

func (d *Daemon) fetch(name string) (*superblock, error) {
	kept, err := d.keeper.Fetch(name)
	if err != nil {
		return nil, err
	}
	s := &superblock{name: name, minor: kept.Minor, dev: kept.Dev}
	if err := json.Unmarshal(kept.Blob, &s.state); err != nil {
		return nil, errors.Join(fmt.Errorf("what the keeper has of it: %w", err), kept.Dev.Close())
	}
	return s, nil
}

// inherit opens a workspace and serves the superblocks that it has already.
func (d *Daemon) inherit(ctx context.Context, workspace string, supers []*superblock) error {
	readOnly := true
	for _, s := range supers {
		readOnly = readOnly && s.state.ReadOnly
	}
	ctx, cancel := context.WithTimeout(ctx, openTime)
	defer cancel()
	ws, err := d.cfg.Open(ctx, workspace, readOnly)
	if err != nil {
		return err
	}
	ws.Inherit()
	o := &opened{name: workspace, readOnly: readOnly, ws: ws, supers: map[bool]*superblock{}}
	d.mu.Lock()
	d.open[workspace] = o
	d.mu.Unlock()
	for _, s := range supers {
		m, err := ws.Mount(s.state.Squash)
		if err != nil {
			err = errors.Join(err, s.dev.Close())
		} else {
			err = d.begin(o, s, m)
		}
		if err != nil {
			d.refuse(s.name, err)
		}
	}
	return nil
}

// begin serves a superblock that the keeper has. A failure closes its descriptor, and the
// file system.
func (d *Daemon) begin(o *opened, s *superblock, m Mount) (err error) {
	defer func() {
		if err != nil {
			m.end()
			err = errors.Join(err, s.dev.Close())
		}
	}()
	inherited := s.state.Saved != nil
	// The server's own copy; s.dev stays for another keeper.
	dev, err := duplicate(s.dev)
	if err != nil {
		return err
	}
	s.mount, s.done = m, make(chan struct{})
	server, err := fuseserver.New(fuseserver.Config{
		Dev: dev, FS: m.FS, Options: m.Options, Saved: s.state.Saved, BackingFile: d.backingFile(s),
		Save: func(v fuseserver.Saved) error {
			d.mu.Lock()
			s.state.Saved = &v
			d.mu.Unlock()
			return d.keep(s)
		},
		Conn: func(k *fuseserver.Conn) {
			if m.SetKernel != nil {
				m.SetKernel(k, inherited)
			}
		},
		SyncDeadline: m.SyncDeadline,
		Logger:       d.cfg.Logger.With("workspace", o.name),
	})
	if err != nil {
		return err
	}
	s.server = server
	d.wg.Go(func() { d.run(o, s) })
	if err := d.atKeeper(func(k *fdkeeper.Client) error { return k.Serving(s.name) }); err != nil {
		d.cfg.Logger.Warn("keeper not told of a mount", "err", err)
	}
	spare, terr := d.tree(s.name, false)
	if terr != nil {
		d.cfg.Logger.Warn("no spare of a mount: it would end with the keeper", "err", terr)
	}
	d.mu.Lock()
	s.spare = spare
	o.supers[s.state.Squash] = s
	d.mu.Unlock()
	return nil
}

// run serves a superblock to its end.
func (d *Daemon) run(o *opened, s *superblock) {
	defer close(s.done)
	err := s.server.Serve(d.serve)
	if err == nil { // handed over
		return
	}
	if !errors.Is(err, fuseserver.ErrGone) {
		d.cfg.Logger.Error("mount cannot be served any more: mountd starts anew", "workspace", o.name, "err", err)
		select {
		case d.fatal <- err:
		default:
		}
		return
	}
	d.mu.Lock()
	if o.supers[s.state.Squash] == s {
		delete(o.supers, s.state.Squash)
	}
	holders := s.state.Holders
	spare := s.spare
	s.spare = nil
	d.mu.Unlock()
	s.mount.end()
	if len(holders) > 0 {
		d.cfg.Logger.Warn("mount has ended although it was in use: aborted, or unmounted by hand", "workspace", o.name, "holders", len(holders))
		_ = d.atKeeper(func(k *fdkeeper.Client) error { return k.Drop(s.name) })
	}
	if spare != nil {
		_ = spare.Close()
	}
	_ = s.dev.Close()
	_ = os.Remove(d.backingFile(s))
}

// keep writes a superblock's blob to the keeper.
func (d *Daemon) keep(s *superblock) error {
	text, err := d.blob(s)
	if err != nil {
		return err
	}
	return d.atKeeper(func(k *fdkeeper.Client) error { return k.Update(s.name, text) })
}

func (d *Daemon) blob(s *superblock) ([]byte, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return json.Marshal(s.state)
}

// connection is the name of a superblock at the keeper.
func connection(workspace string, squash bool) string {
	sum := sha256.Sum256([]byte(workspace))
	kind := "host"
	if squash {
		kind = "kernels"
	}
	return kind + "-" + hex.EncodeToString(sum[:12])
}

// get opens a workspace, or finds it open.
func (d *Daemon) get(ctx context.Context, name string, readOnly bool) (*opened, error) {
	d.mu.Lock()
	o, leaving := d.open[name], d.leaving
	mounted := o != nil && len(o.supers) > 0
	d.mu.Unlock()
	switch {
	case leaving:
		return nil, proto.Errorf(proto.CodeUnavailable, "mountd is being replaced: try again")
	case o != nil && o.readOnly && !readOnly:
		// It was opened when the policy let nobody write.
		if mounted {
			return nil, proto.Errorf(proto.CodeUnavailable, "workspace %s is mounted read-only on this host since before that was allowed: unmount it everywhere first", name)
		}
		if err := d.shut(o); err != nil {
			return nil, err
		}
	case o != nil && !mounted && o.ws.Gone():
		// Removed since the last unmount: what is open here is of no use, and tidy was not yet here.
		d.cfg.Logger.Info("what this host had of a workspace was removed; beginning anew", "workspace", name)
		if err := d.shut(o); err != nil {
			d.cfg.Logger.Warn("workspace that was removed not closed", "workspace", name, "err", err)
		}
	case o != nil:
		return o, nil
	}
	ctx, cancel := context.WithTimeout(ctx, openTime)
	defer cancel()
	ws, err := d.cfg.Open(ctx, name, readOnly)
	if err != nil {
		return nil, err
	}
	if err := ws.Fresh(); err != nil {
		return nil, errors.Join(err, ws.Close())
	}
	o = &opened{name: name, readOnly: readOnly, ws: ws, supers: map[bool]*superblock{}}
	d.mu.Lock()
	d.open[name] = o
	d.mu.Unlock()
	return o, nil
}

// shut closes a workspace that is not mounted.
func (d *Daemon) shut(o *opened) error {
	d.mu.Lock()
	if d.open[o.name] == o {
		delete(d.open, o.name)
	}
	d.mu.Unlock()
	return o.ws.Close()
}

// close ends the process's part: requests that were read are answered, replicas are made
// durable, for at most closeTime.
func (d *Daemon) close() error {
	d.mu.Lock()
	d.leaving = true
	all := make([]*opened, 0, len(d.open))
	for _, o := range d.open {
		all = append(all, o)
	}
	d.mu.Unlock()
	d.stop()
	done := make(chan error, 1)
	go func() {
		var errs []error
		for _, o := range all {
			d.mu.Lock()
			supers := []*superblock{}
			for _, s := range o.supers {
				supers = append(supers, s)
			}
			d.mu.Unlock()
			for _, s := range supers {
				<-s.done
			}
			errs = append(errs, o.ws.Close())
		}
		done <- errors.Join(errs...)
	}()
	select {
	case err := <-done:
		return err
	case <-time.After(closeTime):
		return fmt.Errorf("workspaces not closed within %v: the next mountd recovers them", closeTime)
	}
}

// details lists what a message has room for, from an index on: first what is not sent, then conflicts.
func (d *Daemon) details(workspace string, from int) (*Details, error) {
	d.mu.Lock()
	o := d.open[workspace]
	d.mu.Unlock()
	if o == nil {
		return nil, proto.Errorf(proto.CodeNotFound, "workspace %.80q is not open on this host", workspace)
	}
	const room = packet.MaxMessage / 2 // what is base64 is a third longer
	out, size := &Details{}, 0
	unsent, conflicts := o.ws.Unsent(), o.ws.Conflicts()
	for i := max(from, 0); i < len(unsent)+len(conflicts); i++ {
		if size > 0 && size > room {
			out.Next = i
			break
		}
		if i < len(unsent) {
			path := unsent[i]
			if len(path) > maxTold {
				continue
			}
			out.Unsent = append(out.Unsent, []byte(path))
			size += len(path) + 8
			continue
		}
		c := conflicts[i-len(unsent)]
		out.Conflicts = append(out.Conflicts, c)
		size += len(c.Path) + len(c.KeptAs) + 64
	}
	return out, nil
}

// maxTold is the longest path in bytes that is told.
const maxTold = 16 << 10

// status tells how things are.
func (d *Daemon) status() Status {
	d.mu.Lock()
	s := Status{PID: os.Getpid(), Software: proto.Version().Software, Started: d.started, Keeper: d.known, Workspaces: []MountedStatus{}, Holders: []Holder{}}
	type pair struct {
		o      *opened
		supers []*superblock
	}
	var all []pair
	for _, o := range d.open {
		p := pair{o: o}
		for _, x := range o.supers {
			p.supers = append(p.supers, x)
			s.Holders = append(s.Holders, x.state.Holders...)
		}
		all = append(all, p)
	}
	if len(d.failed) > 0 {
		s.Failed = map[string]string{}
		for name, why := range d.failed {
			s.Failed[name] = why
		}
	}
	d.mu.Unlock()
	for _, p := range all {
		m := MountedStatus{Workspace: p.o.name, ReadOnly: p.o.readOnly, WorkspaceStatus: p.o.ws.Status()}
		for _, x := range p.supers {
			m.Requests += x.server.Running()
		}
		for _, h := range s.Holders {
			if h.Workspace == p.o.name {
				m.Mounts++
			}
		}
		s.Workspaces = append(s.Workspaces, m)
	}
	slices.SortFunc(s.Workspaces, func(a, b MountedStatus) int { return compare(a.Workspace, b.Workspace) })
	slices.SortFunc(s.Holders, func(a, b Holder) int {
		return compare(a.Workspace+"\x00"+a.Name, b.Workspace+"\x00"+b.Name)
	})
	return s
}
