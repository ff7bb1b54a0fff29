package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/postern-dev/postern/agentd/checkpoint/internal/criu"
	"github.com/postern-dev/postern/agentd/checkpoint/internal/obstacle"
	"github.com/postern-dev/postern/agentd/checkpoint/pagestore"
	"github.com/postern-dev/postern/proto"
)

// Obstacle is one thing that stands in the way of a checkpoint, see Check.
type Obstacle = obstacle.Obstacle

// Checkpoint is a stored one.
type Checkpoint = pagestore.Checkpoint

// Saved is a checkpoint that is on stable storage.
type Saved struct {
	Checkpoint
	// Standstill is how long the kernel did not run, Busy whether a cell was under way.
	Standstill time.Duration
	Busy       bool
}

// Label is what a caller says of a checkpoint; each at most 256 bytes.
type Label struct {
	Label, Cell string
	Protected   bool
	// Wait is how long a running cell may go on before the kernel is saved in its midst;
	// at most a minute.
	Wait time.Duration
}

// What the trees in a checkpoint are called, and the kinds of checkpoints.
const (
	treeImages  = "images"
	treePrivate = "private"
	treeKernel  = "kernel"
	kernelFile  = "kernel.json"

	KindCheckpoint = "checkpoint"
	KindSuspend    = "suspend"
	KindFork       = "fork"
)

// RunInside is where a kernel's channels are, inside: they are closed before a dump.
const runInside = "/run/postern"

const (
	maxLabel   = 256
	maxWait    = time.Minute
	maxKernel  = 4 << 20 // of kernel.json, in bytes
	checkTime  = 15 * time.Second
	dumpTime   = time.Minute
	dumpPerGiB = 30 * time.Second
)

// dumpTimeout bounds a dump or a restore of so many bytes: some 40 times what it takes
// on a quiet machine.
func dumpTimeout(bytes int64) time.Duration {
	return dumpTime + time.Duration(float64(dumpPerGiB)*float64(bytes)/(1<<30))
}

// look finds a kernel of an organization; those of others are not there.
func (e *Engine) look(ctx context.Context, organization, id string) (Kernel, error) {
	k, err := e.cfg.Kernels.Look(ctx, id)
	if err != nil {
		return k, err
	}
	if k.Organization != organization {
		return k, proto.Errorf(proto.CodeNotFound, "no kernel %s on this host", id)
	}
	return k, nil
}

// Check is the dry check: what stands in the way of a checkpoint of a kernel now. It
// changes nothing and does not stop the kernel.
func (e *Engine) Check(ctx context.Context, organization, id string) ([]Obstacle, error) {
	k, err := e.look(ctx, organization, id)
	if err != nil {
		return nil, err
	}
	if !k.Running {
		return nil, proto.Errorf(proto.CodeInvalid, "kernel %s does not run: there is nothing to save", id)
	}
	if _, err := e.cfg.Driver.driver(); err != nil {
		return nil, err
	}
	return e.obstacles(ctx, criu.Tree(k.InitPID))
}

func (e *Engine) obstacles(ctx context.Context, tree []int) ([]Obstacle, error) {
	ctx, cancel := context.WithTimeout(ctx, checkTime)
	defer cancel()
	found, err := obstacle.Find(ctx, tree, runInside)
	if errors.Is(err, obstacle.ErrGone) {
		return nil, proto.Errorf(proto.CodeUnavailable, "the kernel does not run: restart it")
	}
	return found, err
}

// refusal is the error of a dump that obstacles prevent: one line that names up to five.
func refusal(id string, found []Obstacle) error {
	var parts []string
	for i, o := range found {
		if i == 5 {
			parts = append(parts, fmt.Sprintf("and %d more", len(found)-i))
			break
		}
		parts = append(parts, o.String())
	}
	return proto.Errorf(proto.CodeInvalid, "kernel %s can't be saved: %s", id, strings.Join(parts, "; "))
}

// Save makes a checkpoint of a kernel, which goes on. When it returns nil the
// checkpoint is on stable storage.
func (e *Engine) Save(ctx context.Context, organization, id string, l Label) (Saved, error) {
	done, err := e.enter(id, "a checkpoint")
	if err != nil {
		return Saved{}, err
	}
	defer done()
	return e.save(ctx, organization, id, KindCheckpoint, l, "")
}

// Suspend saves a kernel and ends it. If it can't be stored the kernel goes on.
func (e *Engine) Suspend(ctx context.Context, organization, id string) (Saved, error) {
	done, err := e.enter(id, "a suspend")
	if err != nil {
		return Saved{}, err
	}
	defer done()
	return e.save(ctx, organization, id, KindSuspend, Label{Protected: true}, "")
}

// save does both. The caller has the kernel. move is the one that it is for, if any.
func (e *Engine) save(ctx context.Context, organization, id, kind string, l Label, move string) (saved Saved, err error) {
	if len(l.Label) > maxLabel || len(l.Cell) > maxLabel {
		return saved, proto.Errorf(proto.CodeInvalid, "checkpoint: a label has at most %d bytes", maxLabel)
	}
	l.Wait = min(max(l.Wait, 0), maxWait)
	k, err := e.look(ctx, organization, id)
	switch {
	case err != nil:
		return saved, err
	case k.Held && move == "":
		return saved, heldError(id)
	case k.Suspended:
		return saved, proto.Errorf(proto.CodeInvalid, "kernel %s is suspended: resume it first", id)
	case !k.Running:
		return saved, proto.Errorf(proto.CodeInvalid, "kernel %s does not run: there is nothing to save", id)
	}
	tree := criu.Tree(k.InitPID)
	found, err := e.obstacles(ctx, tree)
	if err != nil {
		return saved, err
	}
	if len(found) > 0 {
		return saved, refusal(id, found)
	}
	need := resident(tree)
	dir, done, err := e.spool.room(need)
	if err != nil {
		return saved, err
	}
	o := DumpOrder{Images: filepath.Join(dir, treeImages)}
	defer func() {
		if err != nil || !e.spool.holds(dir) {
			done()
			return
		}
		e.spool.kept.keep(id, saved.ID, o.Images, saved.Size, done)
	}()
	// On the private directory's own file system, where contents can be shared.
	private := k.PrivateDir + ".copy"
	o = DumpOrder{Images: filepath.Join(dir, treeImages), Private: private, Stay: kind == KindSuspend, Wait: l.Wait, Move: move}
	kernel := filepath.Join(dir, treeKernel)
	if err := errors.Join(os.RemoveAll(private), os.Mkdir(o.Images, 0o700), os.Mkdir(kernel, 0o700), os.Mkdir(private, 0o700)); err != nil {
		return saved, fmt.Errorf("checkpoint of %s: %w", id, err)
	}
	defer func() { _ = os.RemoveAll(private) }()
	version, err := e.cfg.Driver.Version(ctx)
	if err != nil {
		return saved, err
	}
	dumping, cancel := context.WithTimeout(ctx, dumpTimeout(need)+l.Wait)
	d, err := e.cfg.Kernels.Dump(dumping, id, o)
	cancel()
	if err != nil {
		return saved, err
	}
	if o.Stay {
		defer func() {
			if err != nil { // whatever failed: it is there and stopped
				err = errors.Join(err, e.cfg.Kernels.GoOn(context.WithoutCancel(ctx), id))
			}
		}()
	}
	if err := os.WriteFile(filepath.Join(kernel, kernelFile), d.Kernel, 0o600); err != nil {
		return saved, fmt.Errorf("checkpoint of %s: %w", id, err)
	}
	_ = os.Remove(filepath.Join(o.Images, "criu.log"))
	m := pagestore.Meta{
		Organization: organization, Kernel: id, Parent: e.parent(k), Label: l.Label, Cell: l.Cell, Kind: kind,
		Protected: l.Protected, Host: hostFacts(version), Attributes: map[string]string{"uid": fmt.Sprint(k.UID), "gid": fmt.Sprint(k.GID)},
	}
	c, _, err := e.store.Put(ctx, m, []pagestore.Tree{{Name: treeImages, Dir: o.Images}, {Name: treePrivate, Dir: private}, {Name: treeKernel, Dir: kernel}})
	if err != nil {
		return saved, err
	}
	if o.Stay {
		if err = e.cfg.Kernels.Suspend(context.WithoutCancel(ctx), id, string(c.ID)); err != nil {
			return saved, err
		}
	}
	e.retain(ctx, organization, id)
	return Saved{Checkpoint: c, Standstill: d.Standstill, Busy: d.Busy}, nil
}

// parent is the checkpoint that a kernel's state descends from: the newest that was made
// since it was started or restored, else what it was restored from.
func (e *Engine) parent(k Kernel) pagestore.ID {
	list, _ := e.store.List(k.Organization, k.ID)
	for _, c := range slices.Backward(list) {
		if c.Time.After(k.Started) {
			return c.ID
		}
		break
	}
	return pagestore.ID(k.Checkpoint)
}

// retain deletes what the host's limits do not keep.
func (e *Engine) retain(ctx context.Context, organization, kernel string) {
	if e.cfg.Keep == 0 && e.cfg.MaxAge == 0 {
		return
	}
	gone, err := e.store.Retain(ctx, organization, kernel, pagestore.Policy{Last: e.cfg.Keep, MaxAge: e.cfg.MaxAge})
	if err != nil {
		e.cfg.Logger.Warn("old checkpoints not deleted", "kernel", kernel, "err", err)
	}
	if len(gone) > 0 {
		e.collectSoon()
	}
}
