package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/postern-dev/postern/controlplane/hub"
	"github.com/postern-dev/postern/controlplane/peer"
	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/tunnel"
)

const (
	// beatEvery is how often a replica says that it lives, and looks who else does.
	beatEvery = time.Second
	// silentAfter is when a replica that says nothing counts as gone; its agents are
	// shown offline until they are back. lostAfter is when what it ran is ended for it,
	// and others take its name out.
	silentAfter = 6 * time.Second
	lostAfter   = 30 * time.Second
	// fenceEvery is how often this replica compares its tunnels with what the store says.
	fenceEvery = 5 * time.Second
	// maxDetaches bounds the ends of tunnels that wait to be written; what is beyond is
	// found by the next comparison.
	maxDetaches = 20_000
	// lanesAtOnce bounds the look-ups of lanes that are not for tunnels here.
	lanesAtOnce = 64
	storeTime   = 10 * time.Second
)

// validatePeers reports the first mistake in what concerns other replicas.
func (o Options) validatePeers() error {
	if o.DrainDelay < 0 {
		return errors.New("--drain-delay cannot be negative")
	}
	if o.PeerListen == "" {
		if o.PeerAdvertise != "" {
			return errors.New("--peer-advertise needs --peer-listen")
		}
		return nil
	}
	switch {
	case o.Database == "":
		return errors.New("--peer-listen needs --database: replicas share one PostgreSQL")
	case o.Blob == "":
		return errors.New("--peer-listen needs --blob: replicas share one object store for the contents of files")
	}
	host, port, err := net.SplitHostPort(o.PeerListen)
	if err != nil {
		return fmt.Errorf("--peer-listen: %w", err)
	}
	if o.PeerAdvertise == "" {
		if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() || port == "0" {
			return fmt.Errorf("--peer-advertise is missing: others cannot reach this replica at %s: give https://HOST:PORT", o.PeerListen)
		}
		return nil
	}
	u, err := url.Parse(o.PeerAdvertise)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" || u.Port() == "" || u.User != nil || u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.Fragment != "" {
		return fmt.Errorf("--peer-advertise %q is not of the form https://HOST:PORT", o.PeerAdvertise)
	}
	return nil
}

// replicas is what this control plane has to do with the others on its database. All
// methods of a nil one say that there are none.
type replicas struct {
	server   *Server
	url      string // of this one, for the others
	started  time.Time
	listener net.Listener
	peers    *peer.Server
	client   *peer.Client
	lanes    chan struct{} // places of look-ups
	online   prometheus.Gauge

	detaches chan detach
	stop     context.CancelFunc
	wg       sync.WaitGroup

	mu     sync.Mutex
	seen   map[string]sighting // by name
	alive  map[string]string   // URLs of the others that live, by name
	passed map[string]*passed  // tunnels with lanes that come by way of this replica, by id
}

// detach is the end of a tunnel.
type detach struct {
	agent      string
	generation int64
}

// sighting is a replica's heartbeat and when it was seen to change.
type sighting struct {
	beat int64
	at   time.Time
}

var _ hub.Directory = (*replicas)(nil)

// newReplicas listens for other replicas and tells them where this one is. Without
// --peer-listen it returns nil.
func (s *Server) newReplicas(registry prometheus.Registerer) (hub.Directory, error) {
	if s.options.PeerListen == "" {
		return nil, nil
	}
	config, err := s.ca.PeerTLS()
	if err != nil {
		return nil, err
	}
	listener, err := net.Listen("tcp", s.options.PeerListen)
	if err != nil {
		return nil, fmt.Errorf("--peer-listen: %w", err)
	}
	metrics := peer.NewMetrics(registry)
	r := &replicas{
		server: s, url: s.options.PeerAdvertise, started: time.Now(), listener: listener, client: peer.NewClient(config, metrics),
		lanes: make(chan struct{}, lanesAtOnce), detaches: make(chan detach, maxDetaches), seen: map[string]sighting{}, alive: map[string]string{}, passed: map[string]*passed{},
		online: prometheus.NewGauge(prometheus.GaugeOpts{Name: "controlplane_replicas_online", Help: "Control planes on this database that live, this one included."}),
	}
	registry.MustRegister(r.online)
	if r.url == "" {
		r.url = "https://" + listener.Addr().String()
	}
	r.peers = peer.NewServer(peer.Config{
		Logger: s.log, TLS: config, Metrics: metrics, Call: r.call,
		Lanes: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) { s.tunnels.ServeHTTP(w, q) }),
		Stream: func(ctx context.Context, agent string, generation int64, class string) (net.Conn, error) {
			for _, c := range []tunnel.Class{tunnel.Control, tunnel.Bulk, tunnel.Solo} {
				if c.String() == class {
					return s.hub.Stream(ctx, agent, generation, c)
				}
			}
			return nil, proto.Errorf(proto.CodeInvalid, "no such class of streams: %q", class)
		},
	})
	ctx, stop := context.WithCancel(context.Background())
	r.stop = stop
	r.wg.Go(func() { r.writeDetaches(ctx) })
	s.replicas = r
	return r, nil
}

// start tells the others that this replica is there and keeps doing so until ctx ends.
// failed is called when the listener breaks.
func (r *replicas) start(ctx context.Context, group *errgroup.Group, failed func()) {
	r.server.log.Info("serving other replicas", "listen", r.listener.Addr().String(), "advertise", r.url, "replica", r.server.replica)
	group.Go(func() error {
		if err := r.peers.Serve(r.listener); !errors.Is(err, http.ErrServerClosed) {
			failed()
			return fmt.Errorf("serve %s: %w", r.listener.Addr(), err)
		}
		return nil
	})
	// What an earlier process with this name had is gone with it.
	if err := r.server.store.ForgetReplica(ctx, r.server.replica); err != nil {
		r.server.log.Warn("tunnels of an earlier process not forgotten", "err", err)
	}
	r.beat(ctx)
	group.Go(func() error { r.live(ctx); return nil })
}

// live beats, watches the others, and compares, until ctx ends.
func (r *replicas) live(ctx context.Context) {
	beat, fence := time.NewTicker(beatEvery), time.NewTicker(fenceEvery)
	defer beat.Stop()
	defer fence.Stop()
	missing := map[string]int64{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-beat.C:
			r.beat(ctx)
			r.follow(ctx)
		case <-fence.C:
			missing = r.fence(ctx, missing)
		}
	}
}

// beat says that this replica lives and looks which others do.
func (r *replicas) beat(ctx context.Context) {
	s := r.server
	err := s.store.BeatReplica(ctx, store.Replica{URL: r.url, Draining: s.draining.Load(), Started: r.started, Software: proto.Software(), MasterKeys: s.ca.Keys().IDs(), MasterActive: s.ca.Keys().Active()})
	all, rerr := s.store.Replicas(ctx)
	if err = errors.Join(err, rerr); err != nil {
		if ctx.Err() == nil {
			s.log.Warn("heartbeat of this replica not written, or others' not read", "err", err)
		}
		return
	}
	now := time.Now()
	var lost []string
	r.mu.Lock()
	alive, known := map[string]string{}, map[string]sighting{}
	for _, one := range all {
		last, ok := r.seen[one.Name]
		if !ok || last.beat != one.Beat {
			last = sighting{one.Beat, now}
		}
		known[one.Name] = last
		switch silent := now.Sub(last.at); {
		case one.Name == s.replica:
		case silent > lostAfter:
			lost = append(lost, one.Name)
		case silent <= silentAfter:
			alive[one.Name] = one.URL
		}
	}
	if !maps.Equal(alive, r.alive) {
		s.log.Info("other replicas", "alive", len(alive))
	}
	r.seen, r.alive = known, alive
	r.mu.Unlock()
	r.online.Set(float64(len(alive) + 1))
	for _, name := range lost {
		r.bury(ctx, name)
	}
}

// bury ends what a replica ran that is dead, and forgets it. One replica does it.
func (r *replicas) bury(ctx context.Context, name string) {
	s := r.server
	_, err := s.store.Exclusively(ctx, "bury "+name, func(ctx context.Context) error {
		if err := recoverQueries(ctx, s.store, s.audit, s.log, name); err != nil {
			return err
		}
		return s.store.ForgetReplica(ctx, name)
	})
	if err != nil && ctx.Err() == nil {
		s.log.Warn("what a lost replica ran was not ended", "replica", name, "err", err)
	}
}

// follow lets requests on tunnels at other replicas know when the agent has moved.
func (r *replicas) follow(ctx context.Context) {
	agents := r.server.hub.Elsewhere()
	if len(agents) == 0 {
		return
	}
	generations, err := r.server.store.Generations(ctx, agents)
	if err != nil {
		return // a second later again
	}
	r.server.hub.Moved(generations)
}

// fence ends tunnels here whose agents have newer ones elsewhere, claims those that
// another replica has taken away from us by mistake, and forgets those that are gone.
// missing are the tunnels that the store had and the hub had not when it was called last.
func (r *replicas) fence(ctx context.Context, missing map[string]int64) map[string]int64 {
	s := r.server
	said, err := s.store.LinksOfReplica(ctx, s.replica)
	if err != nil {
		return missing
	}
	here := s.hub.Generations()
	for agent, generation := range here {
		if said[agent] == generation {
			continue
		}
		mine, err := s.store.ReclaimLink(ctx, agent, generation)
		if err == nil && !mine {
			s.hub.Replace(agent, generation)
		}
	}
	gone := map[string]int64{}
	for agent, generation := range said {
		if l := s.hub.Local(agent); l != nil && l.Generation >= generation {
			continue
		}
		if missing[agent] != generation { // it may be saying hello just now
			gone[agent] = generation
			continue
		}
		r.Detach(hub.Identity{Agent: agent}, generation)
	}
	return gone
}

// Attach implements hub.Directory.
func (r *replicas) Attach(ctx context.Context, id hub.Identity, tunnelID string) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, storeTime)
	defer cancel()
	return r.server.store.AttachLink(ctx, id.Agent, tunnelID, time.Now())
}

// Detach implements hub.Directory.
func (r *replicas) Detach(id hub.Identity, generation int64) {
	select {
	case r.detaches <- detach{id.Agent, generation}:
	default: // fence finds it
	}
}

func (r *replicas) writeDetaches(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case d := <-r.detaches:
			if err := r.server.store.DetachLink(ctx, d.agent, d.generation); err != nil && ctx.Err() == nil {
				r.server.log.Warn("end of a tunnel not written", "agent_id", d.agent, "err", err)
			}
		}
	}
}

// errNowhere is returned for an agent without a tunnel to any replica.
var errNowhere = proto.Errorf(proto.CodeAgentOffline, "the agent is offline: it has no tunnel to any replica of this control plane at present")

// Find implements hub.Directory.
func (r *replicas) Find(ctx context.Context, agent string) (*hub.Place, error) {
	l, err := r.server.store.LinkOf(ctx, agent)
	switch {
	case proto.CodeOf(err) == proto.CodeNotFound:
		return nil, errNowhere
	case err != nil:
		return nil, err
	case l.Replica == r.server.replica:
		return nil, nil
	case l.URL == "":
		return nil, errNowhere
	}
	return &hub.Place{
		Organization: l.Organization, Agent: l.Agent, Name: l.Name, Generation: l.Generation, Since: l.Attached,
		Open: func(ctx context.Context, class tunnel.Class) (net.Conn, error) {
			return r.client.Stream(ctx, l.URL, l.Agent, l.Generation, class.String())
		},
	}, nil
}

// elsewhere are the agents of an organization whose tunnels are at other replicas that
// live.
func (r *replicas) elsewhere(ctx context.Context, organization string) (map[string]bool, error) {
	if r == nil {
		return nil, nil
	}
	return r.server.store.OnlineElsewhere(ctx, organization, r.others())
}

// others are the names of the other replicas that live.
func (r *replicas) others() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	names := make([]string, 0, len(r.alive))
	for name := range r.alive {
		names = append(names, name)
	}
	return names
}

// alone reports whether no other replica lives.
func (r *replicas) alone() bool { return len(r.others()) == 0 }

// urlOf is where a replica is; empty if it is this one or does not live.
func (r *replicas) urlOf(name string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.alive[name]
}

// shutdown ends the service for other replicas: what is under way may end before ctx does.
func (r *replicas) shutdown(ctx context.Context) {
	if err := r.peers.Shutdown(ctx); err != nil {
		r.server.log.Warn("streams of other replicas cut", "err", err)
	}
}

// close says goodbye and ends everything.
func (r *replicas) close() {
	r.peers.Close()
	r.listener.Close() //nolint:errcheck // the server may have closed it
	r.stop()
	r.wg.Wait()
	r.client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), storeTime)
	defer cancel()
	if err := r.server.store.ForgetReplica(ctx, r.server.replica); err != nil {
		r.server.log.Warn("the end of this replica not written", "err", err)
	}
}
