package replica

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	gproto "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/agentd/attach/content"
	"github.com/postern-dev/postern/agentd/attach/tree"
	"github.com/postern-dev/postern/proto/filechunk"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// A Commit has at most maxOps operations, of which the bodies are at most maxBatch bytes,
// and is sent when maxContent bytes of contents are stored for it.
const (
	maxOps     = 500
	maxBatch   = 2 << 20
	maxContent = 64 << 20
)

func opTime(op tree.Op) time.Time {
	var f posternv1.FileOp
	if gproto.Unmarshal(op.Body, &f) != nil {
		return time.Time{}
	}
	return time.Unix(0, f.TimeNs)
}

// gather is how long after a Commit the next one waits for more: a program that makes one file after
// another would pay for a Commit of each. What comes after a pause is sent at once.
const gather = 50 * time.Millisecond

// After a failure the next try waits for retryAfter, after each more for twice as long, retryWithin at most.
const (
	retryAfter  = 250 * time.Millisecond
	retryWithin = 30 * time.Second
)

// uploadLoop sends the queue to the control plane, in order.
func (r *Replica) uploadLoop() {
	wait, failing := time.Duration(0), false
	var last time.Time // when a Commit ended
	for {
		switch {
		case failing:
			t := time.NewTimer(wait)
			select {
			case <-r.ctx.Done():
			case <-t.C:
			case <-r.linked:
				// What failed without a link says nothing of the one that is there now; if that fails,
				// too, tries begin to be spaced anew.
				wait = 0
			}
			t.Stop()
		case wait > 0:
			pause(r.ctx, wait)
		default:
			select {
			case <-r.ctx.Done():
			case <-r.kick:
				if since := time.Since(last); since < gather {
					pause(r.ctx, gather-since)
				}
			}
		}
		if r.ctx.Err() != nil {
			return
		}
		more, err := r.uploadSome(r.ctx)
		last = time.Now()
		failing = err != nil && !errors.Is(err, errBusy)
		switch {
		case r.ctx.Err() != nil:
			return
		case errors.Is(err, errBusy):
			wait = 200 * time.Millisecond
		case err != nil:
			wait = min(max(2*wait, retryAfter), retryWithin)
			r.failed(err)
			continue
		case more:
			wait = time.Nanosecond
		default:
			wait = 0
		}
		r.failed(nil)
	}
}

// failed notes why uploading stands still, and says it once.
func (r *Replica) failed(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	line := ""
	if err != nil {
		line = err.Error()
	}
	if (line == "") != (r.status.LastError == "") {
		if err != nil {
			r.log.Warn("changes cannot be uploaded; trying again", "err", err)
		} else {
			r.log.Info("changes are uploaded again")
		}
	}
	r.status.LastError = line
}

// errBusy is returned while a file that should be sent is being written to.
var errBusy = errors.New("file is being written to")

// sentContent is what was sent of a file.
type sentContent struct {
	id    uint64
	stamp int64
	skip  bool
	// again: it may have been sent before, with another content.
	again bool
	// digest names the content.
	digest string
	// What was sent of a file that is not here whole.
	size   uint64
	chunks [][]byte
}

// uploadSome sends one Commit; more tells whether there is more to send.
func (r *Replica) uploadSome(ctx context.Context) (more bool, err error) {
	r.mu.Lock()
	queue := r.s.Queue()
	if len(r.stale) > 0 {
		stale := r.takeStaleLocked()
		r.mu.Unlock()
		if err := r.refresh(ctx, stale); err != nil {
			return false, err
		}
		r.mu.Lock()
		queue = r.s.Queue()
	}
	if len(queue) == 0 {
		r.mu.Unlock()
		return false, nil
	}
	take := append([]tree.Op(nil), queue[:min(len(queue), maxOps)]...)
	ws := r.s.Meta().WorkspaceID
	r.mu.Unlock()

	// What is sent must not be forgotten by this host: the control plane remembers
	// numbers of operations.
	if err := r.sync(); err != nil {
		return false, err
	}
	req := &posternv1.CommitRequest{WorkspaceId: ws, MountId: r.cfg.MountID}
	sent, inBatch := map[uint64]sentContent{}, map[uint64]bool{}
	size, stored := 0, int64(0)
	up := &uploader{r: r, ws: ws}
	for _, op := range take {
		var f posternv1.FileOp
		if err := gproto.Unmarshal(op.Body, &f); err != nil {
			return false, fmt.Errorf("operation %d: %w", op.Number, err)
		}
		if op.Content && inBatch[op.ID] {
			break // it is based on the version that the one before it makes
		}
		if op.Content {
			inBatch[op.ID] = true
			r.mu.Lock()
			r.sent = max(r.sent, op.Number)
			r.mu.Unlock()
			s, n, err := up.content(ctx, op.ID, &f)
			if errors.Is(err, errBusy) && len(req.Ops) > 0 {
				break
			}
			if err != nil {
				return false, err
			}
			s.digest = digest(f.GetSetContent())
			s.again = op.Number <= r.maybeSent && r.attempts[op.Number] != s.digest
			sent[op.Number] = s
			stored += n
		}
		size += gproto.Size(&f)
		if size > maxBatch && len(req.Ops) > 0 {
			break
		}
		req.Ops = append(req.Ops, &f)
		if stored > maxContent {
			break
		}
	}
	if err := up.flush(ctx); err != nil {
		return false, err
	}
	cctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	resp, err := r.cfg.Remote.Commit(cctx, req)
	if err != nil {
		r.unanswered(req.Ops, sent)
		return false, err
	}
	n := len(resp.Results)
	if n == 0 || n > len(req.Ops) {
		return false, fmt.Errorf("the control plane answered %d of %d operations", n, len(req.Ops))
	}
	// It stops before one that there is no room for; sent alone, that one gets an error that says so.
	req.Ops = req.Ops[:n]
	for i, res := range resp.Results {
		if res.Number != req.Ops[i].Number {
			return false, fmt.Errorf("the control plane answered operation %d instead of %d", res.Number, req.Ops[i].Number)
		}
	}
	return r.confirm(req.Ops, resp, sent)
}

// digest names what a SetContent makes a file's content.
func digest(op *posternv1.FileOp_SetContent) string {
	names := op.GetChunks()
	if len(op.GetInline()) > 0 {
		names = filechunk.Names(op.Inline)
	}
	return filechunk.ETag(op.GetSize(), names)
}

// unanswered notes operations that were sent, and perhaps applied.
func (r *Replica) unanswered(ops []*posternv1.FileOp, sent map[uint64]sentContent) {
	last := ops[len(ops)-1].Number
	for number, s := range sent {
		if s.skip || number > last { // it did not go along
			continue
		}
		if number <= r.maybeSent && r.attempts[number] != s.digest {
			r.attempts[number] = "" // two contents, of which either may have been taken
			continue
		}
		r.attempts[number] = s.digest
	}
	r.maybeSent = max(r.maybeSent, last)
}

// confirm takes over the control plane's answers.
func (r *Replica) confirm(ops []*posternv1.FileOp, resp *posternv1.CommitResponse, sent map[uint64]sentContent) (more bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.reserveLastLocked(1024 * len(ops)); err != nil {
		return false, err
	}
	b := r.s.Batch()
	for i, res := range resp.Results {
		r.confirmOneLocked(b, ops[i], res, sent)
		delete(r.attempts, res.Number)
	}
	b.Confirm(ops[len(ops)-1].Number)
	m := r.s.Meta()
	m.UsedBytes = resp.UsedBytes
	b.Meta(m)
	if err := r.commitLocked(b); err != nil {
		return false, err
	}
	r.confirmed = r.last
	r.movedLocked()
	return len(r.s.Queue()) > 0 || len(r.stale) > 0, nil
}

func (r *Replica) confirmOneLocked(b *tree.Batch, op *posternv1.FileOp, res *posternv1.FileOpResult, sent map[uint64]sentContent) {
	id := opNode(op)
	if res.Refused != "" || res.RefusedCode != "" {
		r.log.Error("the control plane refused a change; it stays on this host", "node", id, "code", res.RefusedCode, "why", res.Refused)
		r.status.Conflicts++
		r.stale[id] = true
	}
	if c := res.Conflict; c != nil {
		r.log.Warn("changed here and elsewhere; both are kept", "path", fmt.Sprintf("%.1000q", c.Path), "kept_as", fmt.Sprintf("%.1000q", c.KeptAs))
		r.status.Conflicts++
		r.rememberLocked(c)
		r.stale[id] = true
		r.stale[c.KeptId] = true
		for _, at := range opDirs(op) {
			r.stale[at] = true
		}
	}
	s, isContent := sent[op.Number]
	if !isContent || s.skip {
		return
	}
	if r.queued[id] == op.Number {
		delete(r.queued, id)
	}
	n := r.s.Node(id)
	if n == nil {
		return
	}
	c := n.Clone()
	refused := res.Refused != "" || res.RefusedCode != ""
	if refused {
		// Over quota, perhaps: it stays here, and is offered again.
		delete(r.stale, id)
		r.refused[id] = time.Now().Add(refusedFor)
		return
	}
	if res.Conflict != nil {
		// The control plane keeps what was sent somewhere else, or not at all; the node
		// is what it says.
		if n.Stamp == s.stamp {
			r.cleanLocked(c)
			c.Flags &^= tree.Local | tree.Partial | tree.Redo
			c.Version, c.Seq = ^uint64(0), 0
			delete(r.redo, id) // its file goes when the node is taken over, and this is durable
		}
		b.Put(c)
		return
	}
	if !s.again || res.Version != 0 {
		c.Version = res.Version
	} // else it had no content to send the first time, and the answer is about something else
	c.Seq = max(c.Seq, res.Seq)
	if o := r.open[id]; o != nil {
		if r.absorbLocked(n, o) == nil {
			c.Size, c.Mtime, c.Ctime, c.Stamp = n.Size, n.Mtime, n.Ctime, n.Stamp
		}
	}
	if s.again {
		// The answer may be that of the first time, for the content of then. It is sent once
		// more, based on this version; what is the same makes no new one.
		delete(r.queued, id)
		if c.Has(tree.Dirty) {
			r.dirtyLocked(b, c)
			r.resent = r.s.Meta().NextOp - 1
		}
		b.Put(c)
		return
	}
	switch o := r.open[id]; {
	case c.Stamp == s.stamp && r.rebaseLocked(n, c.Version, s):
		r.cleanLocked(c)
	case c.Has(tree.Dirty) && (o == nil || c.Stamp == o.recorded):
		// Nothing that is still to be recorded would send it: it became whole meanwhile, and its
		// times are others now.
		r.dirtyLocked(b, c)
	}
	b.Put(c)
}

// refusedFor is how long after the control plane refused a content it is offered again.
const refusedFor = time.Minute

// offerAgain queues contents again that were refused.
func (r *Replica) offerAgain(now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for id, at := range r.refused {
		if now.Before(at) {
			continue
		}
		delete(r.refused, id)
		n := r.s.Node(id)
		if n == nil || !n.Has(tree.Dirty) || r.reserveLastLocked(1024) != nil {
			continue
		}
		b := r.s.Batch()
		r.dirtyLocked(b, n)
		_ = r.commitLocked(b) //nolint:errcheck // it was logged, and Open queues it again
	}
}

// rebaseLocked makes the map of a file that is not here whole one of the new version. It tells
// whether the file is still what was sent: a write may be on its way, which changes the stamp when it is done.
func (r *Replica) rebaseLocked(n *tree.Node, version uint64, s sentContent) bool {
	if s.chunks == nil || n.Has(tree.Local) {
		return true
	}
	o, err := r.openLocked(n, false)
	if err != nil {
		return true // it was logged
	}
	defer r.closeLocked(n.ID, o)
	err = o.file.Rebase(version, s.size, s.chunks, s.stamp)
	if err != nil && !errors.Is(err, content.ErrChanged) {
		r.log.Warn("map of chunks cannot be written; chunks are fetched again", "node", n.ID, "err", err)
	}
	return !errors.Is(err, content.ErrChanged)
}

func (r *Replica) cleanLocked(c *tree.Node) {
	if c.Has(tree.Dirty) {
		c.Flags &^= tree.Dirty
		r.unsent -= int64(c.Size)
	}
}

func opNode(op *posternv1.FileOp) uint64 {
	switch o := op.Op.(type) {
	case *posternv1.FileOp_Create_:
		return o.Create.GetNode().GetId()
	case *posternv1.FileOp_SetContent_:
		return o.SetContent.Id
	case *posternv1.FileOp_SetAttr_:
		return o.SetAttr.Id
	case *posternv1.FileOp_SetXattr_:
		return o.SetXattr.Id
	case *posternv1.FileOp_MakeLink_:
		return o.MakeLink.Id
	case *posternv1.FileOp_Rename_:
		return o.Rename.Id
	case *posternv1.FileOp_Remove_:
		return o.Remove.Id
	}
	return 0
}

func opDirs(op *posternv1.FileOp) []uint64 {
	switch o := op.Op.(type) {
	case *posternv1.FileOp_Create_:
		return []uint64{o.Create.Parent}
	case *posternv1.FileOp_MakeLink_:
		return []uint64{o.MakeLink.Parent}
	case *posternv1.FileOp_Rename_:
		return []uint64{o.Rename.Parent, o.Rename.NewParent}
	case *posternv1.FileOp_Remove_:
		return []uint64{o.Remove.Parent}
	}
	return nil
}

// noOp is an operation that changes nothing: the place of one that is not needed any more, because numbers
// have no gaps.
func noOp() *posternv1.FileOp_SetAttr_ {
	return &posternv1.FileOp_SetAttr_{SetAttr: &posternv1.FileOp_SetAttr{Id: tree.Root}}
}

// uploader stores chunks, some at a time.
type uploader struct {
	r      *Replica
	ws     string
	chunks [][]byte
	hashes [][]byte
	bytes  int
}

// storeAt is how many bytes of chunks are stored at once: what a Replica keeps of contents in memory.
const storeAt = 4 << 20

// busyFor is how long a file that is written to without pause is waited for; then it is sent as it
// is found, and again when it is closed.
const busyFor = time.Minute

// content makes f the operation that sends a file's content as it is now, and tells how many bytes
// were stored for it.
func (u *uploader) content(ctx context.Context, id uint64, f *posternv1.FileOp) (sentContent, int64, error) {
	r := u.r
	r.mu.Lock()
	n := r.s.Node(id)
	if n == nil || n.Links == 0 || n.Type != tree.File || !n.Has(tree.Dirty) {
		f.Op = noOp()
		if n != nil && n.Links > 0 {
			// An operation before it sent the content, and one between them may have set the time.
			mtime := n.Mtime
			f.Op = &posternv1.FileOp_SetAttr_{SetAttr: &posternv1.FileOp_SetAttr{Id: id, MtimeNs: &mtime}}
		}
		r.mu.Unlock()
		return sentContent{id: id, skip: true}, 0, nil
	}
	o, err := r.openLocked(n, false)
	if err != nil {
		size := n.Size
		r.mu.Unlock()
		if errors.Is(err, syscall.EIO) {
			// Nothing can bring it back; the rest must go on.
			r.log.Error("content that was not uploaded is gone", "node", id, "bytes", size)
			f.Op = noOp()
			return sentContent{id: id, skip: true}, 0, nil
		}
		return sentContent{}, 0, err
	}
	base, mtime := n.Version, n.Mtime
	// What the last close made durable, in its file or in the journal, need not be so once more. Of what
	// was mapped nobody knows.
	durable := !n.Has(tree.Mapped) && n.Stamp == o.recorded && (n.Has(tree.Redo) || n.Stamp == o.flushed)
	r.mu.Unlock()
	defer r.unuse(id, o)

	set := &posternv1.FileOp_SetContent{Id: id, BaseVersion: base, MtimeNs: mtime}
	for begun := time.Now(); ; {
		// Writes through a mapping are seen by their first fault after a sync.
		if !durable {
			if err := o.file.Sync(); err != nil {
				return sentContent{}, 0, err
			}
		}
		durable = false
		size, _, stamp, err := o.file.Stat()
		if err != nil {
			return sentContent{}, 0, err
		}
		stored, err := u.read(ctx, o.file, set, size)
		if err != nil {
			return sentContent{}, 0, err
		}
		size2, _, stamp2, err := o.file.Stat()
		if err != nil {
			return sentContent{}, 0, err
		}
		if size2 == size && stamp2 == stamp || time.Since(begun) > busyFor {
			r.mu.Lock()
			if n := r.s.Node(id); n != nil && n.Stamp == stamp {
				set.MtimeNs = n.Mtime
			}
			r.mu.Unlock()
			f.Op = &posternv1.FileOp_SetContent_{SetContent: set}
			s := sentContent{id: id, stamp: stamp}
			if !o.file.Whole() {
				s.size, s.chunks = size, set.Chunks
			}
			return s, stored, nil
		}
		pause(ctx, 100*time.Millisecond)
		if ctx.Err() != nil {
			return sentContent{}, 0, ctx.Err()
		}
	}
}

func (u *uploader) read(ctx context.Context, f *content.File, set *posternv1.FileOp_SetContent, size uint64) (int64, error) {
	set.Size, set.Chunks, set.Inline = size, nil, nil
	if size <= filechunk.MaxInline {
		set.Inline = make([]byte, size)
		if size > 0 {
			if _, err := f.ReadAt(set.Inline, 0); err != nil {
				return 0, errBusy // it became shorter
			}
		}
		return int64(size), nil
	}
	stored := int64(0)
	for i := range filechunk.Count(size) {
		if name, ok, err := f.Known(int(i), size); err != nil {
			return 0, err
		} else if ok {
			set.Chunks = append(set.Chunks, name)
			continue
		}
		chunk := make([]byte, filechunk.Length(size, i))
		if _, err := f.ReadAt(chunk, int64(i)*filechunk.Size); err != nil {
			return 0, errBusy
		}
		name := filechunk.Name(chunk)
		set.Chunks = append(set.Chunks, name)
		if name == nil {
			continue
		}
		if err := u.add(ctx, name, chunk); err != nil {
			return 0, err
		}
		stored += int64(len(chunk))
	}
	return stored, nil
}

func (u *uploader) add(ctx context.Context, name, chunk []byte) error {
	u.hashes, u.chunks, u.bytes = append(u.hashes, name), append(u.chunks, chunk), u.bytes+len(chunk)
	if u.bytes < storeAt {
		return nil
	}
	return u.flush(ctx)
}

// flush stores the chunks that the control plane has not got.
func (u *uploader) flush(ctx context.Context) error {
	if len(u.chunks) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	resp, err := u.r.cfg.Remote.MissingChunks(ctx, &posternv1.MissingChunksRequest{WorkspaceId: u.ws, Hashes: u.hashes})
	if err != nil {
		return err
	}
	missing := map[string]bool{}
	for _, h := range resp.Hashes {
		missing[string(h)] = true
	}
	var store [][]byte
	for i, h := range u.hashes {
		if missing[string(h)] {
			store = append(store, u.chunks[i])
			delete(missing, string(h))
		}
	}
	if len(store) > 0 {
		if err := u.r.cfg.Remote.StoreChunks(ctx, u.ws, store); err != nil {
			return err
		}
	}
	u.hashes, u.chunks, u.bytes = nil, nil, 0
	return nil
}
