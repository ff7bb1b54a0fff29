package checkpoint

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/postern-dev/postern/agentd/atomicfile"
	"github.com/postern-dev/postern/agentd/checkpoint/internal/convoy"
	"github.com/postern-dev/postern/agentd/checkpoint/internal/images"
	"github.com/postern-dev/postern/agentd/checkpoint/pagestore"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// maxComing bounds the kernels that come at once, offerTime how long an offer stands,
	// arrivedTime how long what was received waits for FinishMove.
	maxComing   = 32
	offerTime   = time.Hour
	arrivedTime = 7 * 24 * time.Hour
	// maxArriving bounds a kernel's journal and messages, in bytes and files.
	maxArriving      = 8 << 30
	maxArrivingFiles = 4096
	// movesDir, in the state directory, has a directory for each kernel that comes.
	movesDir   = "moves"
	intentFile = "move.json"
)

// coming is a kernel that this host offered to take; nothing of it is on disk.
type coming struct {
	move    convoy.Move
	owner   *posternv1.Principal
	party   *convoy.Party
	running bool
	until   time.Time
}

// intent is what is on disk of a kernel that comes, before it is a kernel.
type intent struct {
	Move         string          `json:"move"`
	Kernel       string          `json:"kernel"`
	Organization string          `json:"organization"`
	From         string          `json:"from"`
	Owner        json.RawMessage `json:"owner"`
	// Checkpoint is what the kernel is now, Older the others.
	Checkpoint string   `json:"checkpoint"`
	Older      []string `json:"older,omitempty"`
	Ran        bool     `json:"ran,omitempty"`
	// Received: all of it is here, on stable storage.
	Received bool `json:"received,omitempty"`
}

var moveForm = regexp.MustCompile(`^mov_[0-9a-z]{26}$`)

func (e *Engine) moveDir(move string) string { return filepath.Join(e.cfg.State, movesDir, move) }

// openMoves goes on with what moves were when agentd ended: kernels that were not sent
// go on here, and what had not all arrived is removed.
func (e *Engine) openMoves() error {
	root := filepath.Join(e.cfg.State, movesDir)
	if err := ownDir(root); err != nil {
		return fmt.Errorf("kernels that move: %w", err)
	}
	entries, err := os.ReadDir(root)
	if err != nil {
		return fmt.Errorf("kernels that move: %w", err)
	}
	for _, entry := range entries {
		move := entry.Name()
		in, err := e.readIntent(move)
		if err == nil && in.Received {
			continue // FinishMove decides
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			e.cfg.Logger.Error("half of a kernel from another host not removed", "move", move, "err", err)
			continue
		}
		if err := e.abandon(e.ctx, in, move); err != nil {
			e.cfg.Logger.Error("half of a kernel from another host not removed", "move", move, "err", err)
		}
	}
	e.wg.Go(func() {
		for id, m := range e.cfg.Moves.Held(e.ctx) {
			if m.To == "" || m.Sent {
				continue
			}
			k, err := e.cfg.Kernels.Look(e.ctx, id)
			if err == nil {
				e.letGoOn(k.Organization, id, m.ID, "agentd was restarted")
			}
		}
	})
	return nil
}

func (e *Engine) readIntent(move string) (in intent, err error) {
	if !moveForm.MatchString(move) {
		return in, fs.ErrNotExist
	}
	b, err := os.ReadFile(filepath.Join(e.moveDir(move), intentFile))
	if err != nil {
		return in, err
	}
	if err := json.Unmarshal(b, &in); err != nil || in.Move != move {
		return in, fmt.Errorf("%s of move %s is damaged", intentFile, move)
	}
	return in, nil
}

func (e *Engine) writeIntent(in intent) error {
	b, err := json.Marshal(in)
	if err != nil {
		return err
	}
	var files atomicfile.FS
	return files.Write(filepath.Join(e.moveDir(in.Move), intentFile), b, 0o600)
}

// abandon removes what came of a kernel, and the kernel if there is one that the move
// still holds.
func (e *Engine) abandon(ctx context.Context, in intent, move string) error {
	if in.Kernel != "" {
		held, _, err := e.cfg.Moves.Moves(ctx, in.Kernel)
		switch {
		case err == nil && held != nil && held.ID == move:
			if err := e.cfg.Moves.Stop(ctx, in.Kernel); err != nil {
				return err
			}
		case err != nil && proto.CodeOf(err) != proto.CodeNotFound:
			return err
		case err == nil && held == nil: // it is here for good, and so is its checkpoint
			return os.RemoveAll(e.moveDir(move))
		}
	}
	for _, id := range append(in.Older, in.Checkpoint) {
		if id == "" {
			continue
		}
		e.spool.kept.dropCheckpoint(pagestore.ID(id))
		if err := e.store.Delete(pagestore.ID(id)); err != nil && proto.CodeOf(err) != proto.CodeNotFound {
			return err
		}
	}
	return os.RemoveAll(e.moveDir(move))
}

// OfferMove says whether this host takes a kernel, before anything is done to it.
func (e *Engine) OfferMove(ctx context.Context, owner *posternv1.Principal, r *posternv1.OfferMoveRequest) (*posternv1.MoveParty, error) {
	if err := e.canMove(); err != nil {
		return nil, err
	}
	id, n := r.Move.GetKernelId(), r.Needs
	if !moveForm.MatchString(r.Move.GetMoveId()) {
		return nil, proto.Errorf(proto.CodeInvalid, "the request has no good id of a move")
	}
	if err := e.suits(ctx, id, n); err != nil {
		return nil, err
	}
	c := &coming{
		move:  convoy.Move{ID: r.Move.MoveId, Kernel: id, Organization: owner.GetOrganization(), From: r.From, To: e.cfg.Agent()},
		owner: owner, running: n.GetRunning(), until: time.Now().Add(offerTime),
	}
	var err error
	if c.party, err = convoy.NewParty(c.move); err != nil {
		return nil, err
	}
	offer, err := c.party.Offer(e.cfg.Identity)
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for other, c := range e.coming {
		if time.Now().After(c.until) {
			delete(e.coming, other)
		}
	}
	if len(e.coming) >= maxComing && e.coming[id] == nil {
		return nil, proto.Errorf(proto.CodeOverloaded, "%d kernels are on their way to this host: try again when they are here", len(e.coming))
	}
	e.coming[id] = c
	return offer, nil
}

// suits refuses a kernel that this host can't take.
func (e *Engine) suits(ctx context.Context, id string, n *posternv1.KernelNeeds) error {
	version, err := e.cfg.Driver.Version(ctx)
	if err != nil {
		return err
	}
	if d, err := e.cfg.Driver.driver(); err != nil {
		return err
	} else if lack := d.Missing(); lack != "" {
		return proto.Errorf(proto.CodeUnavailable, "this host can't restore kernels: %s: see agentd doctor", lack)
	}
	from := pagestore.Host{Architecture: n.GetArchitecture(), CPU: n.GetCpu(), Kernel: n.GetLinux(), CRIU: n.GetCriu()}
	if reason := misfit(from, hostFacts(version)); reason != "" {
		return proto.Errorf(proto.CodeVersionMismatch, "the kernel does not fit this host: %s", reason)
	}
	err = e.cfg.Moves.CheckMove(id, MoveNeeds{
		Spec: n.GetSpec(), Mounts: n.GetMounts(), Visible: n.GetVisible(), Memory: int64(n.GetMemory()), Private: int64(n.GetPrivate()), Journal: int64(n.GetJournal()),
	})
	if err != nil {
		return err
	}
	var other []string
	for _, f := range n.GetFiles() {
		if !filepath.IsAbs(f.Path) || filepath.Clean(f.Path) != f.Path {
			return proto.Errorf(proto.CodeInvalid, "the request names a file by no good path")
		}
		switch info, err := os.Stat(f.Path); {
		case err != nil:
			other = append(other, f.Path+" is not here")
		case uint64(info.Size()) != f.Size:
			other = append(other, fmt.Sprintf("%s has %d bytes and not %d", f.Path, info.Size(), f.Size))
		}
	}
	if len(other) > 3 {
		other = append(other[:3], fmt.Sprintf("and %d more", len(other)-3))
	}
	if len(other) > 0 {
		return proto.Errorf(proto.CodeVersionMismatch, "the kernel needs the programs and libraries that it has mapped: %s: install the same packages on both hosts", strings.Join(other, "; "))
	}
	_, done, err := e.spool.room(int64(n.GetMemory()))
	if err != nil {
		return err
	}
	done()
	if need := int64(n.GetMemory() + n.GetPrivate() + n.GetJournal()); free(e.cfg.State) < need/2+spareSpace {
		return proto.Errorf(proto.CodeStorageFull, "the kernel has %d MiB, and %s has %d MiB free: make space", need>>20, e.cfg.State, free(e.cfg.State)>>20)
	}
	return nil
}

// Receive takes what Export sends. When it returns nil all of it is on stable storage,
// and waits for FinishMove; otherwise nothing is left of it. Cancelling ctx does not end a
// Read of r: close what is behind it.
func (e *Engine) Receive(ctx context.Context, organization, id, move string, other io.ReadWriter) (err error) {
	if err := e.canMove(); err != nil {
		return err
	}
	done, err := e.enter(id, "a move")
	if err != nil {
		return err
	}
	defer done()
	e.mu.Lock()
	c := e.coming[id]
	if c != nil && c.move.ID == move {
		delete(e.coming, id) // it is for one stream
	}
	e.mu.Unlock()
	if c == nil || c.move.ID != move || c.move.Organization != organization || time.Now().After(c.until) {
		return proto.Errorf(proto.CodeInvalid, "this host did not offer to take kernel %s by move %.64s, or was restarted since: begin again", id, move)
	}
	owner, err := protojson.Marshal(c.owner)
	if err != nil {
		return err
	}
	in := intent{Move: move, Kernel: id, Organization: organization, From: c.move.From, Owner: owner, Ran: c.running}
	dir := e.moveDir(move)
	a := &arriving{e: e, ctx: ctx, in: &in, dir: filepath.Join(dir, "files"), left: maxArriving}
	defer func() {
		if err != nil {
			err = errors.Join(err, e.abandon(context.WithoutCancel(ctx), in, move))
		}
	}()
	if err := errors.Join(os.Mkdir(dir, 0o700), os.Mkdir(a.dir, 0o700), e.writeIntent(in)); err != nil {
		return fmt.Errorf("receive kernel %s: %w", id, err)
	}
	key, err := e.store.HashKey(organization)
	if err != nil {
		return err
	}
	err = convoy.Receive(other, e.cfg.Identity, c.party, key, a)
	switch {
	case errors.Is(err, convoy.ErrCut):
		return &proto.Error{Code: proto.CodeUnavailable, Message: "the kernel did not arrive: the stream from the other host ended early or was altered", Err: err}
	case err != nil:
		return err
	case in.Checkpoint == "":
		return proto.Errorf(proto.CodeInvalid, "the other host sent no checkpoint")
	}
	if err := a.sync(); err != nil {
		return fmt.Errorf("receive kernel %s: %w", id, err)
	}
	in.Received = true
	return e.writeIntent(in)
}

// arriving takes a kernel's parts.
type arriving struct {
	e    *Engine
	ctx  context.Context
	in   *intent
	dir  string
	left int64 // bytes of files that may still come
	n    int
}

// File implements convoy.Parts.
func (a *arriving) File(name string, size int64, r io.Reader) error {
	if name != versionsFile && !a.e.cfg.Moves.FileArrives(name) {
		return proto.Errorf(proto.CodeInvalid, "the other host sent a file %.100q, which no kernel has", name)
	}
	if a.left -= size; a.left < 0 || a.n >= maxArrivingFiles {
		return proto.Errorf(proto.CodeInvalid, "the other host sent more than a kernel has: a journal of over %d GiB", maxArriving>>30)
	}
	a.n++
	path := filepath.Join(a.dir, filepath.FromSlash(name))
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// Checkpoint implements convoy.Parts.
func (a *arriving) Checkpoint(r io.Reader, older bool, answer func([]byte) error) error {
	if a.in.Checkpoint != "" || len(a.in.Older) >= maxOlder {
		return proto.Errorf(proto.CodeInvalid, "the other host sent more checkpoints than a kernel has")
	}
	began := false
	_, _, err := a.e.store.Import(a.ctx, r, func(m *pagestore.Meta) error {
		if m.Organization != a.in.Organization || m.Kernel != a.in.Kernel {
			return proto.Errorf(proto.CodeInvalid, "the other host sent a checkpoint of another kernel")
		}
		if err := a.e.fits(a.ctx, Checkpoint{Meta: *m}); err != nil {
			return err
		}
		// What was made on another host is looked at before each restore.
		m.Attributes = map[string]string{"uid": m.Attributes["uid"], "gid": m.Attributes["gid"], fromAttribute: a.in.From}
		began = true
		if older {
			a.in.Older = append(a.in.Older, string(m.ID))
		} else {
			m.Protected = true // there is no other copy of the kernel here
			a.in.Checkpoint = string(m.ID)
		}
		return a.e.writeIntent(*a.in)
	}, answer)
	if proto.CodeOf(err) == proto.CodeAlreadyExists { // it is not this move's to delete
		if older {
			a.in.Older = a.in.Older[:len(a.in.Older)-1]
		} else {
			a.in.Checkpoint = ""
		}
	}
	if older && began && proto.CodeOf(err) == proto.CodeInvalid {
		a.e.cfg.Logger.Warn("an older checkpoint did not come with its kernel: it is damaged on its host", "kernel", a.in.Kernel, "err", err)
		return convoy.ErrSkip
	}
	return err
}

// maxOlder bounds the older checkpoints that come with a kernel.
const maxOlder = 10_000

// fromAttribute is the agent that a checkpoint came from, in pagestore.Meta.Attributes;
// those that were made here have none.
const fromAttribute = "from"

func (a *arriving) sync() error {
	return filepath.WalkDir(a.dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.IsDir() {
			return err
		}
		d, err := os.Open(path)
		if err != nil {
			return err
		}
		return errors.Join(d.Sync(), d.Close())
	})
}

// FinishMove makes a kernel of what was received, and brings its processes back if it had
// any; without forward it forgets it. It may be repeated. committed says whose the kernel
// is from here on; reason why it is not this host's, if it was to be. With an error
// nothing is decided.
func (e *Engine) FinishMove(ctx context.Context, organization, id, move string, forward bool) (committed bool, reason string, err error) {
	if err := e.canMove(); err != nil {
		return false, "", err
	}
	if !moveForm.MatchString(move) {
		return false, "", proto.Errorf(proto.CodeInvalid, "the request has no good id of a move")
	}
	done, err := e.turn(ctx, id)
	if err != nil {
		return false, "", err
	}
	defer done()
	ctx = context.WithoutCancel(ctx)
	held, came, err := e.cfg.Moves.Moves(ctx, id)
	if err != nil && proto.CodeOf(err) != proto.CodeNotFound {
		return false, "", err
	}
	if err == nil && came == move {
		if k, err := e.look(ctx, organization, id); err != nil || k.ID == "" {
			return false, "", err
		}
		return true, "", e.arrived(ctx, move)
	}
	in, err := e.readIntent(move)
	if errors.Is(err, fs.ErrNotExist) || err == nil && (in.Kernel != id || in.Organization != organization) {
		e.mu.Lock()
		if c := e.coming[id]; c != nil && c.move.ID == move {
			delete(e.coming, id)
		}
		e.mu.Unlock()
		return false, "", nil
	}
	if err != nil {
		return false, "", err
	}
	if forward && in.Received {
		if err = e.bringIn(ctx, in, held != nil && held.ID == move); err == nil {
			return true, "", e.arrived(ctx, move)
		}
		e.cfg.Logger.Error("kernel from another host not restored: it stays there", "kernel", id, "err", err)
		reason = proto.Detail(err).Message
	}
	return false, reason, e.abandon(ctx, in, move)
}

// arrived removes what is needed no more of a kernel that is here.
func (e *Engine) arrived(ctx context.Context, move string) error {
	in, err := e.readIntent(move)
	if err != nil {
		return nil //nolint:nilerr // it was removed already
	}
	if k, err := e.cfg.Kernels.Look(ctx, in.Kernel); err == nil && k.Running {
		if err := e.store.Protect(pagestore.ID(in.Checkpoint), false); err != nil {
			e.cfg.Logger.Warn("checkpoint of a kernel that came stays protected", "checkpoint", in.Checkpoint, "err", err)
		}
	}
	if err := os.RemoveAll(e.moveDir(move)); err != nil {
		e.cfg.Logger.Error("remains of a move not removed", "move", move, "err", err)
	}
	return nil
}

// bringIn makes the kernel. there: an agentd that ended has done so, and has not noted that
// it is here for good.
func (e *Engine) bringIn(ctx context.Context, in intent, there bool) error {
	c, err := e.find(in.Organization, in.Checkpoint)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*dumpTimeout(c.Size))
	defer cancel()
	if !there {
		if err := e.makeArrived(ctx, in, c); err != nil {
			return err
		}
	} else if k, err := e.look(ctx, in.Organization, in.Kernel); err != nil {
		return err
	} else if in.Ran && !k.Running {
		if err := e.bring(ctx, k, c, "move", in.Move); err != nil {
			return err
		}
	}
	return e.cfg.Moves.Let(ctx, in.Kernel, in.Move, true)
}

func (e *Engine) makeArrived(ctx context.Context, in intent, c Checkpoint) error {
	owner := &posternv1.Principal{}
	if err := protojson.Unmarshal(in.Owner, owner); err != nil {
		return err
	}
	dir := e.moveDir(in.Move)
	u, err := e.unpack(ctx, c, filepath.Join(dir, "private"))
	if err != nil {
		return err
	}
	defer u.done()
	versions, err := takeVersions(filepath.Join(dir, "files"))
	if err != nil {
		return err
	}
	a := Arrival{
		ID: in.Kernel, Owner: owner, Kernel: u.kernel, Checkpoint: string(c.ID), Files: filepath.Join(dir, "files"), Private: u.private,
		Move: HeldMove{ID: in.Move, Ran: in.Ran},
	}
	err = e.cfg.Moves.Arrive(ctx, a, func(uid, gid uint32, private string) error {
		to := images.Owners{UID: uid, GID: gid}
		return errors.Join(images.Reown(u.images, u.from, to), images.ReownTree(private, u.from, to))
	})
	if err != nil || !in.Ran {
		return err
	}
	if err := e.awaitFiles(ctx, in, c, u.images, versions); err != nil {
		return err
	}
	return e.cfg.Kernels.Restore(ctx, in.Kernel, RestoreOrder{Images: u.images, Kernel: u.kernel, Checkpoint: string(c.ID), Move: in.Move, Why: "move", SavedAt: c.Time})
}

// expireMoves forgets what was received and never asked for again.
func (e *Engine) expireMoves() {
	entries, err := os.ReadDir(filepath.Join(e.cfg.State, movesDir))
	if err != nil {
		return
	}
	for _, entry := range entries {
		info, err := entry.Info()
		in, ierr := e.readIntent(entry.Name())
		if err != nil || ierr != nil || time.Since(info.ModTime()) < arrivedTime {
			continue
		}
		done, err := e.enter(in.Kernel, "a move")
		if err != nil {
			continue
		}
		err = e.abandon(e.ctx, in, in.Move)
		done()
		e.cfg.Logger.Warn("a kernel from another host was never fetched from here and is forgotten", "kernel", in.Kernel, "err", err)
	}
}
