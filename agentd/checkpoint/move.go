package checkpoint

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/postern-dev/postern/agentd/checkpoint/internal/convoy"
	"github.com/postern-dev/postern/agentd/checkpoint/internal/criu"
	"github.com/postern-dev/postern/agentd/checkpoint/pagestore"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// A kernel moves from host A to host B in these steps, each of which may be the last one
// of a host, a tunnel or the control plane:
//
//	A  BeginMove   holds the kernel, suspends it
//	A  Export      sends it; before the last frame, notes that all was sent
//	B  Receive     stores it; nothing of it is a kernel yet
//	B  FinishMove  makes it a kernel, restores it, and notes that it is B's: from here on
//	               it is there
//	A  EndMove     forgets it, or lets it go on
//
// Until all was sent A may let the kernel go on by itself, and does when the stream
// breaks or agentd was restarted. After that only B knows, and A asks nobody: it waits for
// EndMove. B makes a kernel of what it received only in FinishMove, and says there, for
// good, that it will not. So there is one kernel at any time, living or suspended.

// HeldMove is a move that holds a kernel.
type HeldMove struct {
	ID string
	// To is the agent that it goes to; empty: it comes here.
	To string
	// Ran: it had processes before, Sent: the other host may have all of it.
	Ran, Sent bool
}

// MoveNeeds is what a kernel needs of a host beside what its memory needs.
type MoveNeeds struct {
	Spec string
	// Shown are all paths of the host that it sees, Visible those of them that not every
	// kernel sees.
	Shown, Visible           []string
	Memory, Private, Journal int64
	// Mounts are the workspaces that it sees, Work where the host has them by where the
	// kernel does.
	Mounts []*posternv1.KernelMount
	Work   map[string]string
}

// Arrival is a kernel that comes from another host.
type Arrival struct {
	ID         string
	Owner      *posternv1.Principal
	Kernel     []byte // what Dumped.Kernel was
	Checkpoint string
	// Files has its journal and messages, Private its private files; both are moved.
	Files, Private string
	Move           HeldMove
}

// Moves is what kernels do for moves; package kernel has it. Errors carry codes.
type Moves interface {
	MoveNeeds(ctx context.Context, id string) (MoveNeeds, error)
	// CheckMove refuses a kernel that can't be on this host, in one line.
	CheckMove(id string, n MoveNeeds) error
	// CheckSaved refuses what was saved of a kernel on another host (Dumped.Kernel) if it
	// would see what this host shows to no kernel.
	CheckSaved(kernel []byte) error
	// Settle waits until what was written to a kernel's workspaces on this host is at the
	// control plane, for so long; an error says what is not.
	Settle(ctx context.Context, id string, patience time.Duration) error
	// Hold keeps a kernel from everybody but its move, durably; Let ends that, and
	// committed notes that it came here for good.
	Hold(ctx context.Context, id string, m HeldMove) error
	Let(ctx context.Context, id, move string, committed bool) error
	// Pack makes the files of a held, suspended kernel complete and names them; sent is
	// noted as HeldMove.Sent, durably.
	Pack(ctx context.Context, id, move string, sent bool) (dir string, names []string, err error)
	// FileArrives reports whether a kernel that comes has files of that name.
	FileArrives(name string) bool
	// Moves is the move that holds a kernel, if one does, and the id of the one that
	// brought it here.
	Moves(ctx context.Context, id string) (held *HeldMove, came string, err error)
	// Held are all kernels that moves hold.
	Held(ctx context.Context) map[string]HeldMove
	// Arrive makes a suspended, held kernel. place is called with its user before.
	Arrive(ctx context.Context, a Arrival, place func(uid, gid uint32, private string) error) error
	// Stop ends a kernel and removes it.
	Stop(ctx context.Context, id string) error
}

const (
	// exportWait is how long a kernel that was suspended for a move waits for its export
	// to begin.
	exportWait = 2 * time.Minute
	// turnWait is how long FinishMove and EndMove wait for what is under way.
	turnWait = time.Minute
)

// leaving is a kernel that is moved away.
type leaving struct {
	move       convoy.Move
	offer      *posternv1.MoveParty
	checkpoint pagestore.ID
	// versions are of files on workspaces that are open: see versionsFile.
	versions []byte
	giveUp   *time.Timer
}

var errNoMoves = proto.Errorf(proto.CodeUnavailable, "this host moves no kernels")

func heldError(id string) error {
	return proto.Errorf(proto.CodeUnavailable, "kernel %s is being moved to another host: try again when that is done", id)
}

func (e *Engine) canMove() error {
	if e.cfg.Moves == nil || e.cfg.Identity == nil {
		return errNoMoves
	}
	return nil
}

// turn is enter that waits for what is under way, turnWait at most.
func (e *Engine) turn(ctx context.Context, kernel string) (func(), error) {
	ctx, cancel := context.WithTimeout(ctx, turnWait)
	defer cancel()
	for {
		done, err := e.enter(kernel, "a move")
		if err == nil || e.ctx.Err() != nil {
			return done, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// DescribeMove says what a kernel needs of another host. It changes nothing.
func (e *Engine) DescribeMove(ctx context.Context, organization, id string) (*posternv1.KernelNeeds, error) {
	if err := e.canMove(); err != nil {
		return nil, err
	}
	k, err := e.look(ctx, organization, id)
	if err != nil {
		return nil, err
	}
	n, err := e.cfg.Moves.MoveNeeds(ctx, id)
	if err != nil {
		return nil, err
	}
	out := &posternv1.KernelNeeds{Spec: n.Spec, Running: k.Running, Private: uint64(n.Private), Journal: uint64(n.Journal), Visible: n.Visible, Mounts: n.Mounts}
	var host pagestore.Host
	switch {
	case k.Running:
		tree := criu.Tree(k.InitPID)
		found, err := e.obstacles(ctx, tree)
		if err != nil {
			return nil, err
		}
		if len(found) > 0 {
			return nil, refusal(id, found)
		}
		version, err := e.cfg.Driver.Version(ctx)
		if err != nil {
			return nil, err
		}
		host, out.Memory = hostFacts(version), uint64(resident(tree))
		out.Files = mappedFiles(tree, n.Shown)
	case k.Suspended:
		c, err := e.find(organization, k.Checkpoint)
		if err != nil {
			return nil, err
		}
		host, out.Memory = c.Host, uint64(c.Size)
	default:
		return nil, proto.Errorf(proto.CodeInvalid, "kernel %s does not run: restart it, or start one on the other host", id)
	}
	out.Architecture, out.Cpu, out.Linux, out.Criu = host.Architecture, host.CPU, host.Kernel, host.CRIU
	return out, nil
}

// maxMapped bounds the files that KernelNeeds names.
const maxMapped = 4096

// mappedFiles are the programs and libraries of the host that a tree has mapped, below
// shown. They are not in its images: another host needs the same.
func mappedFiles(tree []int, shown []string) []*posternv1.MappedFile {
	var out []*posternv1.MappedFile
	seen := map[string]bool{}
	for _, pid := range tree {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
		if err != nil {
			continue // it ended
		}
		for line := range strings.Lines(string(b)) {
			at := strings.IndexByte(line, '/')
			if at < 0 {
				continue
			}
			path := strings.TrimSuffix(line[at:], "\n")
			if seen[path] || len(out) >= maxMapped || strings.HasSuffix(path, " (deleted)") || !under(path, shown) {
				continue
			}
			seen[path] = true
			if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
				out = append(out, &posternv1.MappedFile{Path: path, Size: uint64(info.Size())})
			}
		}
	}
	return out
}

func under(path string, dirs []string) bool {
	for _, d := range dirs {
		if path == d || strings.HasPrefix(path, d+"/") {
			return true
		}
	}
	return false
}

// BeginMove suspends a kernel and holds it for a move. On an error it goes on as it was.
func (e *Engine) BeginMove(ctx context.Context, organization string, r *posternv1.BeginMoveRequest) (*posternv1.BeginMoveResponse, error) {
	if err := e.canMove(); err != nil {
		return nil, err
	}
	id := r.Move.GetKernelId()
	done, err := e.enter(id, "a move")
	if err != nil {
		return nil, err
	}
	defer done()
	k, err := e.look(ctx, organization, id)
	if err != nil {
		return nil, err
	}
	switch {
	case k.Running != r.Running || !k.Running && !k.Suspended:
		return nil, proto.Errorf(proto.CodeUnavailable, "kernel %s changed its state meanwhile: try again", id)
	case k.Held:
		return nil, proto.Errorf(proto.CodeUnavailable, "kernel %s is being moved already", id)
	}
	l := &leaving{offer: r.Party, move: convoy.Move{ID: r.Move.MoveId, Kernel: id, Organization: organization, From: e.cfg.Agent(), To: r.To}}
	if err := convoy.CheckOffer(e.cfg.Identity, l.move, r.Party); err != nil {
		return nil, err
	}
	n, err := e.cfg.Moves.MoveNeeds(ctx, id)
	if err != nil {
		return nil, err
	}
	// Most of what it wrote goes up while it runs.
	if err := e.settle(ctx, id, n); err != nil {
		return nil, err
	}
	if err := e.cfg.Moves.Hold(ctx, id, HeldMove{ID: l.move.ID, To: r.To, Ran: k.Running}); err != nil {
		return nil, err
	}
	point := k.Checkpoint
	var open []string
	if k.Running {
		open = openOn(criu.Tree(k.InitPID), n.Work)
		s, err := e.save(ctx, organization, id, KindSuspend, Label{Protected: true}, l.move.ID)
		if err != nil {
			if lerr := e.cfg.Moves.Let(context.WithoutCancel(ctx), id, l.move.ID, false); lerr != nil {
				e.cfg.Logger.Error("kernel that could not be moved is still held", "kernel", id, "err", lerr)
			}
			return nil, err
		}
		point = string(s.ID)
	}
	c, err := e.find(organization, point)
	if err != nil {
		return nil, err // it is suspended in nothing that is there
	}
	l.checkpoint = c.ID
	if l.versions, err = e.settled(ctx, id, n, open); err != nil {
		why := err.Error()
		e.soon(func() { e.letGoOn(organization, id, l.move.ID, why) })
		return nil, err
	}
	l.giveUp = time.AfterFunc(exportWait, func() {
		e.soon(func() { e.letGoOn(organization, id, l.move.ID, "nobody fetched it") })
	})
	e.mu.Lock()
	e.leaving[id] = l
	e.mu.Unlock()
	return &posternv1.BeginMoveResponse{CheckpointId: point, Bytes: uint64(c.Size + n.Journal)}, nil
}

// soon does something that Close waits for; not while the engine closes.
func (e *Engine) soon(do func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.ctx.Err() == nil {
		e.wg.Go(do)
	}
}

// letGoOn ends a move whose kernel the other host can't have.
func (e *Engine) letGoOn(organization, id, move, why string) {
	ctx, cancel := context.WithTimeout(e.ctx, 15*time.Minute)
	defer cancel()
	held, _, err := e.cfg.Moves.Moves(ctx, id)
	if err != nil || held == nil || held.ID != move || held.Sent {
		return
	}
	e.cfg.Logger.Warn("kernel that was to be moved goes on here", "kernel", id, "why", why)
	if err := e.EndMove(ctx, organization, id, move, false, true); err != nil {
		e.cfg.Logger.Error("kernel that was to be moved does not go on", "kernel", id, "err", err)
	}
}

// Export sends a kernel that BeginMove held. When it returns an error before all was
// sent, the kernel goes on here.
func (e *Engine) Export(ctx context.Context, organization, id, move string, other io.ReadWriter) (err error) {
	if err := e.canMove(); err != nil {
		return err
	}
	done, err := e.enter(id, "a move")
	if err != nil {
		return err
	}
	defer done()
	if _, err := e.look(ctx, organization, id); err != nil {
		return err
	}
	e.mu.Lock()
	l := e.leaving[id]
	e.mu.Unlock()
	if l == nil || l.move.ID != move || l.move.Organization != organization {
		return proto.Errorf(proto.CodeInvalid, "kernel %s is not held by move %.64s: begin it again", id, move)
	}
	l.giveUp.Stop()
	sent := false
	defer func() {
		if err != nil && !sent {
			why := "sending it failed: " + err.Error()
			e.soon(func() { e.letGoOn(organization, id, move, why) })
		}
	}()
	dir, names, err := e.cfg.Moves.Pack(ctx, id, move, false)
	if err != nil {
		return err
	}
	out, key, err := convoy.Send(other, e.cfg.Identity, l.move, l.offer)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := sendFile(out, dir, name); err != nil {
			return err
		}
	}
	if l.versions != nil {
		if err := out.File(versionsFile, int64(len(l.versions)), bytes.NewReader(l.versions)); err != nil {
			return err
		}
	}
	history, _ := e.store.List(organization, id)
	for _, c := range history {
		if c.ID == l.checkpoint {
			continue
		}
		if err := e.export(ctx, out, key, c.ID, true); err != nil {
			return err
		}
	}
	if err := e.export(ctx, out, key, l.checkpoint, false); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	sent = true // even if it can't be noted: better held than twice
	if _, _, err := e.cfg.Moves.Pack(ctx, id, move, true); err != nil {
		return err
	}
	return out.End()
}

// export sends one checkpoint. An older one that is damaged is left out: nobody could bring
// it back here either.
func (e *Engine) export(ctx context.Context, out *convoy.Writer, key []byte, id pagestore.ID, older bool) error {
	return out.Checkpoint(older, func(w io.Writer, flush func() error) error {
		return e.store.Export(ctx, id, w, &pagestore.Known{Key: key, Ask: func() ([]byte, error) {
			if err := flush(); err != nil {
				return nil, err
			}
			return out.Answer()
		}})
	}, func(err error) bool {
		damaged := errors.Is(err, pagestore.ErrDamaged)
		if damaged {
			e.cfg.Logger.Error("a damaged checkpoint does not move with its kernel", "checkpoint", id, "err", err)
		}
		return damaged
	})
}

func sendFile(out *convoy.Writer, dir, name string) error {
	f, err := os.Open(filepath.Join(dir, name))
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // it is only read
	info, err := f.Stat()
	if err != nil {
		return err
	}
	return out.File(name, info.Size(), f)
}

// EndMove forgets a kernel that is on another host now, or lets it go on. unsent says that
// no other host was asked, because none could have it: an error if one can. A kernel that
// this move does not hold is let be.
func (e *Engine) EndMove(ctx context.Context, organization, id, move string, gone, unsent bool) error {
	if err := e.canMove(); err != nil {
		return err
	}
	done, err := e.turn(ctx, id)
	if err != nil {
		return err
	}
	defer done()
	k, err := e.look(ctx, organization, id)
	if proto.CodeOf(err) == proto.CodeNotFound {
		return nil
	}
	if err != nil {
		return err
	}
	held, _, err := e.cfg.Moves.Moves(ctx, id)
	if err != nil || held == nil || held.ID != move || held.To == "" {
		return err
	}
	if gone && !held.Sent {
		return proto.Errorf(proto.CodeInvalid, "kernel %s was not sent: no other host can have it", id)
	}
	if unsent && held.Sent {
		return proto.Errorf(proto.CodeUnavailable, "kernel %s was sent meanwhile: the other host may have it and must be asked", id)
	}
	ctx = context.WithoutCancel(ctx)
	e.mu.Lock()
	if l := e.leaving[id]; l != nil && l.move.ID == move {
		l.giveUp.Stop()
		delete(e.leaving, id)
	}
	e.mu.Unlock()
	if gone {
		if err := e.cfg.Moves.Stop(ctx, id); err != nil {
			return err
		}
		return e.Forget(organization, id)
	}
	if err := e.cfg.Moves.Let(ctx, id, move, false); err != nil {
		return err
	}
	if k, err = e.look(ctx, organization, id); err != nil || !held.Ran || k.Running {
		return err
	}
	return e.resume(ctx, organization, k)
}
