package mountd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/attach/fdkeeper"
	"github.com/postern-dev/postern/agentd/attach/fuseserver"
	"github.com/postern-dev/postern/proto"
)

func compare(a, b string) int { return strings.Compare(a, b) }

func duplicate(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// backingFile is the table of backing ids of one connection; its number tells it from one
// of the same workspace that is about to end.
func (d *Daemon) backingFile(s *superblock) string {
	return filepath.Join(d.cfg.Dir, fmt.Sprintf("%s-%d.backings", s.name, s.minor))
}

// attach makes somebody a holder of a workspace's mount, and tells how it may be mounted.
// A second time it changes nothing.
func (d *Daemon) attach(ctx context.Context, want Holder) (Holder, error) {
	if err := checkHolder(want); err != nil {
		return want, err
	}
	may, err := d.cfg.Decide(want.Workspace)
	if err != nil {
		return want, err
	}
	if may.ReadOnly && !want.ReadOnly {
		return want, proto.Errorf(proto.CodePolicyDenied, "workspace %s may only be mounted read-only on this host: ask for that, or see attachments.read_only in agentd.yaml", want.Workspace)
	}
	d.changing.Lock()
	defer d.changing.Unlock()
	o, err := d.get(ctx, want.Workspace, may.ReadOnly)
	if err != nil {
		return want, err
	}
	d.mu.Lock()
	s := o.supers[want.Squash]
	d.mu.Unlock()
	if s == nil {
		if s, err = d.mount(o, want.Squash); err != nil {
			return want, err
		}
	}
	want.Since = time.Now().UTC()
	d.mu.Lock()
	at := slices.IndexFunc(s.state.Holders, func(h Holder) bool { return h.Name == want.Name })
	switch {
	case at >= 0 && s.state.Holders[at].ReadOnly != want.ReadOnly:
		d.mu.Unlock()
		return want, proto.Errorf(proto.CodeAlreadyExists, "%s has mounted %s already, not in the same mode", want.Name, want.Workspace)
	case at >= 0:
		want = s.state.Holders[at]
	default:
		s.state.Holders = append(s.state.Holders, want)
	}
	d.mu.Unlock()
	err = d.keep(s)
	if err == nil {
		err = d.note()
	}
	if err != nil {
		return want, errors.Join(err, d.release(o, s, want.Name))
	}
	return want, nil
}

// checkHolder refuses what is no holder's name.
func checkHolder(h Holder) error {
	kind, rest, ok := strings.Cut(h.Name, ":")
	switch {
	case !ok || kind != "host" && kind != "kernel" || rest == "" || len(h.Name) > 1024 || strings.ContainsAny(h.Name, "\n\x00"):
		return proto.Errorf(proto.CodeInvalid, "not the holder of a mount: %.80q", h.Name)
	case kind == "host" && (!filepath.IsAbs(rest) || filepath.Clean(rest) != rest):
		return proto.Errorf(proto.CodeInvalid, "%.200q is no clean absolute path", rest)
	}
	return nil
}

// mount makes a superblock: first the keeper has it, then it is served.
func (d *Daemon) mount(o *opened, squash bool) (*superblock, error) {
	name := connection(o.name, squash)
	fs, err := o.ws.Mount(squash)
	if err != nil {
		return nil, err
	}
	m, err := fuseserver.NewMount(fuseserver.MountConfig{
		Source: "postern:" + o.name, AllowOther: true, DefaultPermissions: fs.DefaultPermissions, ReadOnly: o.readOnly, MaxRead: fs.Options.MaxWrite,
	})
	if err != nil {
		fs.end()
		return nil, proto.Errorf(proto.CodeUnavailable, "mount workspace %s: %v (see agentd doctor)", o.name, err)
	}
	defer m.Tree.Close() //nolint:errcheck // the keeper has moved it
	s := &superblock{name: name, minor: m.Minor, dev: m.Dev, state: blob{Workspace: o.name, Squash: squash, ReadOnly: o.readOnly}}
	text, err := d.blob(s)
	if err != nil {
		fs.end()
		return nil, errors.Join(err, m.Dev.Close())
	}
	err = d.atKeeper(func(k *fdkeeper.Client) error {
		// What is left under this name is a connection that nobody could take over.
		if err := k.Drop(name); err != nil && !errors.Is(err, fdkeeper.ErrUnknown) {
			return err
		}
		return k.Put(name, m.Minor, text, m.Dev, m.Tree)
	})
	if err != nil {
		fs.end()
		return nil, errors.Join(err, m.Dev.Close())
	}
	d.mu.Lock()
	delete(d.failed, name)
	d.mu.Unlock()
	if err := d.begin(o, s, fs); err != nil {
		return nil, errors.Join(fmt.Errorf("serve workspace %s: %w", o.name, err),
			d.atKeeper(func(k *fdkeeper.Client) error { return k.Drop(name) }))
	}
	return s, nil
}

// find is the superblock that somebody holds.
func (d *Daemon) find(workspace, holder string) (*opened, *superblock, Holder) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, o := range d.open {
		for _, s := range o.supers {
			for _, h := range s.state.Holders {
				if h.Name == holder && (workspace == "" || h.Workspace == workspace) {
					return o, s, h
				}
			}
		}
	}
	return nil, nil, Holder{}
}

// tree gets a detached mount, which a holder moves where it wants it.
func (d *Daemon) tree(name string, readOnly bool) (f *os.File, err error) {
	err = d.atKeeper(func(k *fdkeeper.Client) error {
		f, err = k.Clone(name, readOnly)
		return err
	})
	return f, err
}

// settle waits until a holder's workspace has sent everything, for so long; ErrUnsent if
// it has not. A workspace that others hold need not wait: they go on sending.
func (d *Daemon) settle(ctx context.Context, workspace, holder string, patience time.Duration) (WorkspaceStatus, error) {
	o, _, _ := d.find(workspace, holder)
	if o == nil {
		return WorkspaceStatus{}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := o.ws.Drain(ctx); err == nil {
		return o.ws.Status(), nil
	}
	st := o.ws.Status()
	if st.UnsentOps == 0 && st.UnsentBytes == 0 {
		return st, nil
	}
	return st, proto.Errorf(proto.CodeUnavailable, "workspace %s: %d changes, %d bytes, %v: wait for the link, or use --force: they stay on this host and are sent later",
		o.name, st.UnsentOps, st.UnsentBytes, ErrUnsent)
}

// detach ends what somebody holds. Somebody who holds nothing is no error.
func (d *Daemon) detach(workspace, holder string) error {
	d.changing.Lock()
	defer d.changing.Unlock()
	o, s, _ := d.find(workspace, holder)
	if o == nil {
		return nil
	}
	return errors.Join(d.release(o, s, holder), d.note())
}

// release takes a holder off a superblock and drops it if that was the last one. The
// workspace goes on sending.
func (d *Daemon) release(o *opened, s *superblock, holder string) error {
	d.mu.Lock()
	s.state.Holders = slices.DeleteFunc(s.state.Holders, func(h Holder) bool { return h.Name == holder })
	left := len(s.state.Holders)
	spare := s.spare
	if left == 0 {
		s.spare = nil
		delete(o.supers, s.state.Squash)
	}
	d.mu.Unlock()
	if left > 0 {
		return d.keep(s)
	}
	var errs []error
	if spare != nil {
		errs = append(errs, spare.Close())
	}
	errs = append(errs, d.atKeeper(func(k *fdkeeper.Client) error { return k.Drop(s.name) }))
	// The superblock ends when its last mount does: at once, or when the holder's own
	// mount goes. Its server sees that and ends.
	return errors.Join(errs...)
}
