package zmtp

import (
	"bytes"
	"crypto/rand"
	"net"
	"os"
	"strings"
	"sync"
	"time"
)

// socket listens and keeps its peers.
type socket struct {
	kind     string
	listener net.Listener
	work     sync.WaitGroup
	serve    func(*peer)

	mu     sync.Mutex
	peers  map[*peer]struct{}
	closed bool
}

// listen listens on tcp://HOST:PORT or ipc://PATH; a socket that a dead process left at
// the path is replaced.
func (s *socket) listen(endpoint string) error {
	network, address := "tcp", strings.TrimPrefix(endpoint, "tcp://")
	if path, ok := strings.CutPrefix(endpoint, "ipc://"); ok {
		network, address = "unix", path
		if conn, err := net.Dial("unix", path); err == nil {
			conn.Close() //nolint:errcheck // somebody listens: the next line says so
		} else {
			os.Remove(path) //nolint:errcheck // the next line tells
		}
	}
	l, err := net.Listen(network, address)
	if err != nil {
		return err
	}
	s.listener, s.peers = l, map[*peer]struct{}{}
	s.work.Go(s.accept)
	return nil
}

func (s *socket) accept() {
	for {
		conn, err := s.listener.Accept()
		if err != nil {
			if s.over() {
				return
			}
			time.Sleep(10 * time.Millisecond) // out of descriptors, say
			continue
		}
		s.work.Go(func() {
			defer conn.Close() //nolint:errcheck // it is over
			stop := s.guard(conn)
			p, err := greet(conn, s.kind)
			stop()
			if err != nil || !s.add(p) {
				return
			}
			s.work.Go(p.write)
			s.serve(p)
			p.close()
			s.mu.Lock()
			delete(s.peers, p)
			s.mu.Unlock()
		})
	}
}

// guard closes a connection that shakes hands while the socket is closed.
func (s *socket) guard(conn net.Conn) (stop func()) {
	done := make(chan struct{})
	var once sync.WaitGroup
	once.Go(func() {
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for !s.over() {
			select {
			case <-done:
				return
			case <-tick.C:
			}
		}
		conn.Close() //nolint:errcheck // it is not wanted any more
	})
	return func() { close(done); once.Wait() }
}

func (s *socket) over() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

func (s *socket) add(p *peer) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || len(s.peers) >= maxPeers {
		return false
	}
	s.peers[p] = struct{}{}
	return true
}

func (s *socket) all() []*peer {
	s.mu.Lock()
	defer s.mu.Unlock()
	peers := make([]*peer, 0, len(s.peers))
	for p := range s.peers {
		peers = append(peers, p)
	}
	return peers
}

// Close ends the socket; what is queued is written first, for at most a second. It
// may be called once.
func (s *socket) Close() {
	for _, p := range s.all() {
		p.drained(time.Second)
	}
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.listener.Close() //nolint:errcheck // it was only listening
	for _, p := range s.all() {
		p.close()
	}
	s.work.Wait()
}

// Router is a ROUTER socket: messages come with the identity of their sender and go
// to one.
type Router struct {
	socket
	take func(identity string, frames [][]byte)
	of   map[string]*peer // by identity; guarded by socket.mu
}

// NewRouter listens on an endpoint. take gets each message; a sender waits until it returns.
func NewRouter(endpoint string, take func(identity string, frames [][]byte)) (*Router, error) {
	r := &Router{take: take, of: map[string]*peer{}}
	r.kind, r.serve = "ROUTER", r.run
	return r, r.listen(endpoint)
}

func (r *Router) run(p *peer) {
	if p.identity == "" {
		p.identity = "\x00" + rand.Text()
	}
	r.mu.Lock()
	if older := r.of[p.identity]; older != nil {
		older.close() // it came back
	}
	r.of[p.identity] = p
	r.mu.Unlock()
	for {
		frames, err := p.message(nil)
		if err != nil {
			break
		}
		r.take(p.identity, frames)
	}
	r.mu.Lock()
	if r.of[p.identity] == p {
		delete(r.of, p.identity)
	}
	r.mu.Unlock()
}

// Send sends frames to a peer; one that is gone misses them.
func (r *Router) Send(identity string, frames [][]byte) {
	r.mu.Lock()
	p := r.of[identity]
	r.mu.Unlock()
	if p != nil {
		p.put(encode(frames))
	}
}

// Pub is a PUB socket: a message goes to all that have subscribed to how its first
// frame begins.
type Pub struct {
	socket
	joined chan struct{}
	topics map[*peer][][]byte // guarded by socket.mu
}

// NewPub listens on an endpoint.
func NewPub(endpoint string) (*Pub, error) {
	s := &Pub{topics: map[*peer][][]byte{}, joined: make(chan struct{}, 1)}
	s.kind, s.serve = "PUB", s.run
	return s, s.listen(endpoint)
}

// Joined gets a value when somebody has subscribed since the last one.
func (s *Pub) Joined() <-chan struct{} { return s.joined }

func (s *Pub) run(p *peer) {
	defer func() {
		s.mu.Lock()
		delete(s.topics, p)
		s.mu.Unlock()
	}()
	for {
		frames, err := p.message(func(name string, topic []byte) { s.subscribe(p, name == "SUBSCRIBE", name == "CANCEL", topic) })
		if err != nil {
			return
		}
		if len(frames) == 1 && len(frames[0]) > 0 {
			s.subscribe(p, frames[0][0] == 1, frames[0][0] == 0, frames[0][1:])
		}
	}
}

// maxTopics bounds a peer's subscriptions.
const maxTopics = 1000

func (s *Pub) subscribe(p *peer, on, off bool, topic []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case on && len(s.topics[p]) < maxTopics && len(topic) < 4096:
		s.topics[p] = append(s.topics[p], bytes.Clone(topic))
		select {
		case s.joined <- struct{}{}:
		default:
		}
	case off:
		for i, t := range s.topics[p] {
			if bytes.Equal(t, topic) {
				s.topics[p] = append(s.topics[p][:i:i], s.topics[p][i+1:]...)
				return
			}
		}
	}
}

// Send sends frames to the subscribers; it waits for the slowest.
func (s *Pub) Send(frames [][]byte) {
	s.mu.Lock()
	var peers []*peer
	for p, topics := range s.topics {
		for _, t := range topics {
			if bytes.HasPrefix(frames[0], t) {
				peers = append(peers, p)
				break
			}
		}
	}
	s.mu.Unlock()
	if len(peers) == 0 {
		return
	}
	message := encode(frames)
	for _, p := range peers {
		p.put(message)
	}
}

// Echo is a REP socket that sends back what it gets.
type Echo struct{ socket }

// NewEcho listens on an endpoint.
func NewEcho(endpoint string) (*Echo, error) {
	s := &Echo{}
	s.kind = "REP"
	s.serve = func(p *peer) {
		for {
			frames, err := p.message(nil)
			if err != nil || !p.put(encode(frames)) {
				return
			}
		}
	}
	return s, s.listen(endpoint)
}
