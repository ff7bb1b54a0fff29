package replica

import "sync"

// notes tells Listeners what changed, from a goroutine of its own, because telling the
// kernel may wait for requests that wait for the replica.
//
// What a mount did itself its kernel knows already; telling it again costs a little, and
// so changes are only noted that a Listener cannot have made: of the control plane's, or where
// there is more than one Listener.
type notes struct {
	r *Replica

	mu      sync.Mutex
	cond    *sync.Cond
	entries map[nameAt]bool
	nodes   map[uint64]bool
	remote  bool // what is noted now comes from elsewhere
	stopped bool
	done    chan struct{}
}

func (n *notes) start(r *Replica) {
	n.r = r
	n.cond = sync.NewCond(&n.mu)
	n.entries, n.nodes = map[nameAt]bool{}, map[uint64]bool{}
	n.done = make(chan struct{})
	go n.run()
}

func (n *notes) stop() {
	n.mu.Lock()
	n.stopped = true
	n.mu.Unlock()
	n.cond.Signal()
	<-n.done
}

// fromElsewhere says whether what is noted from now on comes from the control plane. The replica's
// lock is held.
func (n *notes) fromElsewhere(yes bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.remote = yes
}

func (n *notes) wanted() bool { return n.cond != nil && (n.remote || len(n.r.listeners) > 1) }

// entry notes that a name means something else. The replica's lock is held.
func (n *notes) entry(dir uint64, name string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.wanted() {
		n.entries[nameAt{dir, name}] = true
		n.cond.Signal()
	}
}

// node notes that attributes or content changed. The replica's lock is held.
func (n *notes) node(id uint64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.wanted() {
		n.nodes[id] = true
		n.cond.Signal()
	}
}

// always notes that attributes changed of which no Listener can know. The replica's lock is held.
func (n *notes) always(id uint64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.cond != nil {
		n.nodes[id] = true
		n.cond.Signal()
	}
}

// otherData notes that content was written to through one of many Listeners.
func (n *notes) otherData(id uint64) {
	n.r.mu.Lock()
	many := len(n.r.listeners) > 1
	n.r.mu.Unlock()
	if many {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.nodes[id] = true
		n.cond.Signal()
	}
}

func (n *notes) run() {
	defer close(n.done)
	for {
		n.mu.Lock()
		for len(n.entries) == 0 && len(n.nodes) == 0 && !n.stopped {
			n.cond.Wait()
		}
		if n.stopped {
			n.mu.Unlock()
			return
		}
		entries, nodes := n.entries, n.nodes
		n.entries, n.nodes = map[nameAt]bool{}, map[uint64]bool{}
		n.mu.Unlock()
		n.r.mu.Lock()
		listeners := n.r.listeners
		n.r.mu.Unlock()
		for _, l := range listeners {
			for e := range entries {
				l.InvalEntry(e.dir, e.name)
			}
			for id := range nodes {
				l.InvalInode(id)
			}
		}
	}
}
