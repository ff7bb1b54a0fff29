package replica

import (
	"container/list"
	"context"
	"slices"
	"sync"
	"time"

	"github.com/postern-dev/postern/agentd/attach/tree"
)

const (
	// idle is how long nobody has used a directory before what is in it may be forgotten.
	idle = time.Second
	// unknownListings is how long after a takeover directories may be in the midst of being listed
	// by handles of before it, which nobody counts.
	unknownListings = time.Minute
	// askAtOnce is how many names the kernel is asked to forget before we look whether it has.
	askAtOnce = 16384
	// giveWayFor is how long whoever lists a directory that is not known waits at most for others to
	// be forgotten, if there is twice as much as there should be.
	giveWayFor = 2 * time.Second
)

// dirs remembers when the directories that have names here were used, the last one in front. The
// replica's lock is held for all of it but step.
type dirs struct {
	order list.List // of *directory
	at    map[uint64]*list.Element
	open  map[uint64]int // handles
	after time.Time      // nothing is forgotten before
	busy  bool           // things are being forgotten
	idle  time.Duration  // idle, but for tests

	mu    sync.Mutex
	steps list.List // of time.Time: when operations on names that are under way began
}

type directory struct {
	id   uint64
	used time.Time
}

func (d *dirs) start(s *tree.State) {
	d.at, d.open, d.idle = map[uint64]*list.Element{}, map[uint64]int{}, idle
	s.Each(func(n *tree.Node) {
		if n.Dir != nil && n.Dir.Len() > 0 {
			d.use(n)
		}
	})
}

// use says that somebody uses a directory now; nil and other nodes are nobody's.
func (d *dirs) use(n *tree.Node) {
	if n == nil || n.Dir == nil || d.at == nil {
		return
	}
	if e := d.at[n.ID]; e != nil {
		e.Value.(*directory).used = time.Now()
		d.order.MoveToFront(e)
		return
	}
	d.at[n.ID] = d.order.PushFront(&directory{n.ID, time.Now()})
}

func (d *dirs) remove(id uint64) {
	if e := d.at[id]; e != nil {
		d.order.Remove(e)
		delete(d.at, id)
	}
}

// step begins an operation that finds names more than once, without the lock in between: none of
// those that it uses are forgotten until it has ended. The lock is not held.
func (d *dirs) step() (end func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	e := d.steps.PushBack(time.Now())
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.steps.Remove(e)
	}
}

// before is the time since which nobody must have used what is forgotten.
func (d *dirs) before() time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	at := time.Now().Add(-d.idle)
	if e := d.steps.Front(); e != nil && e.Value.(time.Time).Before(at) {
		return e.Value.(time.Time)
	}
	return at
}

// Step says that somebody is about to tell the kernel of what Lookup finds: it is not forgotten
// before end is called.
func (r *Replica) Step() (end func()) { return r.dirs.step() }

// OpenDir says that a handle on a directory is open: what is in it stays as it is until ReleaseDir.
func (r *Replica) OpenDir(id uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.dirs.open[id]++
}

// ReleaseDir ends an OpenDir, perhaps of a process before this one.
func (r *Replica) ReleaseDir(id uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.dirs.open[id]--; r.dirs.open[id] <= 0 {
		delete(r.dirs.open, id)
	}
}

// crowdedLocked wakes trimLoop if there is too much.
func (r *Replica) crowdedLocked() {
	if r.s.Bytes() > r.cfg.MetadataBytes {
		select {
		case r.crowded <- struct{}{}:
		default:
		}
	}
}

// trimLoop keeps names and attributes within their limit.
func (r *Replica) trimLoop() {
	tick := time.NewTicker(2 * time.Second)
	defer tick.Stop()
	var rest time.Time
	for {
		select {
		case <-r.ctx.Done():
			return
		case <-tick.C:
		case <-r.crowded:
		}
		if time.Now().Before(rest) {
			continue
		}
		began := time.Now()
		better := r.trim()
		r.mu.Lock()
		r.dirs.busy = false
		r.mu.Unlock()
		if !better {
			// Looking at everything in vain must not be what this process does.
			rest = time.Now().Add(max(2*time.Second, 20*time.Since(began)))
		}
	}
}

// giveWay waits, if there is far too much, for what is being forgotten.
func (r *Replica) giveWay(ctx context.Context) {
	for end := time.Now().Add(giveWayFor); ; {
		r.mu.Lock()
		wait := r.dirs.busy && r.s.Bytes() > 2*r.cfg.MetadataBytes
		r.mu.Unlock()
		if !wait || ctx.Err() != nil || time.Now().After(end) {
			return
		}
		pause(ctx, 10*time.Millisecond)
	}
}

// letGo is a name that the kernel is asked to forget.
type letGo struct {
	parent uint64
	name   string
	id     uint64
}

// trim forgets names and attributes until they are within their limit, and tells whether they are, or
// at least fewer.
func (r *Replica) trim() (better bool) {
	for range 64 {
		r.mu.Lock()
		over := r.s.Bytes() - r.cfg.MetadataBytes
		if over <= 0 {
			r.mu.Unlock()
			return true
		}
		// Without a link nothing could be listed again.
		if !r.status.Connected || time.Now().Before(r.dirs.after) {
			r.mu.Unlock()
			return better
		}
		over += r.cfg.MetadataBytes / 10 // not again for the next name
		freed, ask := r.trimLocked(over, false)
		if freed < over && len(ask) == 0 {
			more, besides := r.trimLocked(over-freed, true)
			freed, ask = freed+more, besides
		}
		r.dirs.busy = freed > 0 || len(ask) > 0
		listeners := slices.Clone(r.listeners)
		r.mu.Unlock()
		better = better || freed > 0
		if freed == 0 && len(ask) == 0 {
			return better
		}
		for _, a := range ask {
			r.mu.Lock()
			opened := r.open[a.id] != nil // meanwhile
			r.mu.Unlock()
			if opened {
				continue
			}
			for _, l := range listeners {
				l.LetGo(a.parent, a.name, a.id)
			}
		}
		if len(ask) > 0 {
			pause(r.ctx, 20*time.Millisecond) // its answers are requests
		}
		if r.ctx.Err() != nil {
			return better
		}
	}
	return better
}

// trimLocked forgets what directories hold that nobody uses, the one used longest ago first, until
// it was so many bytes; and lists names that the kernel would have to forget before. contents: also files
// of which contents are in the cache, which then go too.
func (r *Replica) trimLocked(over int64, contents bool) (freed int64, ask []letGo) {
	before := r.dirs.before()
	var next *list.Element
	for e := r.dirs.order.Back(); e != nil && freed < over && len(ask) < askAtOnce; e = next {
		next = e.Prev()
		at := e.Value.(*directory)
		if !at.used.Before(before) {
			break
		}
		d := r.s.Node(at.id)
		if d == nil || d.Dir == nil || d.Dir.Len() == 0 {
			r.dirs.remove(at.id)
			continue
		}
		if r.dirs.open[at.id] > 0 || r.loading[at.id] != nil || r.s.Touched(at.id) > 0 || r.stale[at.id] {
			continue
		}
		bytes, err := r.trimDirectoryLocked(d, contents, &ask)
		if err != nil {
			return freed, ask // the disk is full, or the journal broken
		}
		freed += bytes
	}
	return freed, ask
}

// trimDirectoryLocked forgets what can be forgotten of what is in a directory.
func (r *Replica) trimDirectoryLocked(d *tree.Node, contents bool, ask *[]letGo) (freed int64, err error) {
	var names []tree.Entry
	size := 64
	d.Dir.From(0, func(e tree.Entry) bool {
		n := r.s.Node(e.ID)
		if n == nil || !r.listableLocked(n, contents) {
			return true
		}
		if r.otherHoldsLocked(nil, n.ID) {
			if n.Type != tree.Directory && n.Links == 1 && len(*ask) < askAtOnce {
				*ask = append(*ask, letGo{d.ID, e.Name, n.ID})
			}
			return true
		}
		names = append(names, e)
		size += len(e.Name) + 48
		return true
	})
	if len(names) == 0 {
		return 0, nil
	}
	// Before anything is forgotten: what the journal says must not be more than what is known.
	if err := r.reserveLocked(size); err != nil {
		return 0, err
	}
	b := r.s.Batch()
	if d.Dir.Loaded {
		b.Loaded(d.ID, false)
	}
	for _, e := range names {
		n := r.s.Node(e.ID)
		b.Unlink(d.ID, e.Name)
		freed += e.Bytes()
		if n.Names > 0 {
			continue // by another name
		}
		freed += n.Bytes()
		r.dirs.remove(n.ID)
		r.dropLocked(b, n.ID)
	}
	return freed, r.commitLocked(b)
}

// listableLocked tells whether the control plane can say again all that is known of a node. Whether
// the kernel holds it is another question.
func (r *Replica) listableLocked(n *tree.Node, contents bool) bool {
	if r.s.Touched(n.ID) > 0 || r.stale[n.ID] || r.unknown[n.ID] || r.open[n.ID] != nil || n.Links == 0 {
		return false
	}
	switch n.Type {
	case tree.Directory:
		return n.Dir.Len() == 0 && r.dirs.open[n.ID] == 0 && r.loading[n.ID] == nil
	case tree.Symlink:
		return true
	}
	if n.Version == 0 && n.Size > 0 || !r.refused[n.ID].IsZero() || n.Flags&(tree.Dirty|tree.Writing|tree.Cached) != 0 {
		return false
	}
	if n.Flags&(tree.Local|tree.Partial|tree.Redo|tree.Mapped) == 0 {
		return true
	}
	if contents && n.Has(tree.Mapped) {
		r.settleLocked(n)
		n = r.s.Node(n.ID)
	}
	return contents && !n.Has(tree.Dirty)
}

// IDs are the nodes that are known.
func (r *Replica) IDs() map[uint64]struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	ids := make(map[uint64]struct{}, r.s.Len())
	r.s.Each(func(n *tree.Node) { ids[n.ID] = struct{}{} })
	return ids
}
