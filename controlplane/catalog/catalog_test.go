package catalog

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// memory is a Store of one agent's one source, and its Audit.
type memory struct {
	mu        sync.Mutex
	there     bool
	schemas   []*posternv1.CatalogSchema
	sizes     map[string][2]int64
	truncated bool
	refreshed time.Time
	staged    map[string]int
	entries   []auditchain.Entry
	refuse    error   // of Append
	finish    []error // of FinishCatalog, one for each call
	kept      []string
}

func (m *memory) FindAgent(_ context.Context, _, name string) (*posternv1.Agent, error) {
	if name != "host" && name != "agt_1" {
		return nil, proto.Errorf(proto.CodeNotFound, "no agent")
	}
	return &posternv1.Agent{Id: "agt_1", Name: "host", Sources: []*posternv1.SourceInfo{{Name: "db"}}}, nil
}

func (m *memory) CatalogState(context.Context, string, string) ([]*posternv1.CatalogSchema, map[string][2]int64, time.Time, bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.there {
		return nil, nil, time.Time{}, false, proto.Errorf(proto.CodeNotFound, "nothing cached")
	}
	return m.schemas, m.sizes, m.refreshed, m.truncated, nil
}

func (m *memory) StageCatalog(_ context.Context, _, _, generation string, page *posternv1.CatalogPage) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.staged[generation] += len(page.Tables) + len(page.Functions) + len(page.Types) + len(page.Sequences)
	return nil
}

func (m *memory) FinishCatalog(_ context.Context, _, _, generation string, schemas []*posternv1.CatalogSchema, kept map[string]bool, sizes map[string][2]int64, truncated bool, now time.Time) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.finish) > 0 {
		err := m.finish[0]
		m.finish = m.finish[1:]
		return err
	}
	m.there, m.schemas, m.truncated, m.refreshed = true, schemas, truncated, now
	for name := range kept {
		sizes[name] = m.sizes[name]
	}
	m.sizes = sizes
	return nil
}

func (m *memory) DropStaged(_ context.Context, _, _, generation string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.staged, generation)
	return nil
}

func (m *memory) KeepCatalogs(_ context.Context, _ string, sources []string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.kept = sources
	return nil
}

func (m *memory) SearchCatalog(_ context.Context, _ string, r *posternv1.IntrospectSourceRequest) (*posternv1.IntrospectSourceResponse, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.there {
		return nil, proto.Errorf(proto.CodeNotFound, "nothing cached")
	}
	return &posternv1.IntrospectSourceResponse{Schemas: m.schemas, Truncated: m.truncated}, nil
}

func (m *memory) Append(_ context.Context, e auditchain.Entry) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.refuse != nil {
		return m.refuse
	}
	m.entries = append(m.entries, e)
	return nil
}

// hostAgent answers as agentd does.
type hostAgent struct {
	mu      sync.Mutex
	asked   int
	tables  map[string]int // by schema; the number is the fingerprint, too
	fail    error
	partial bool
	hold    chan struct{}
}

func (h *hostAgent) Introspect(ctx context.Context, r *posternv1.IntrospectRequest, take func(*posternv1.CatalogPage) error) error {
	h.mu.Lock()
	h.asked++
	fail, partial, hold := h.fail, h.partial, h.hold
	tables := map[string]int{}
	for name, n := range h.tables {
		tables[name] = n
	}
	h.mu.Unlock()
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	last := &posternv1.CatalogPage{Complete: !partial}
	for name, n := range tables {
		fingerprint := fmt.Sprint(n)
		last.Schemas = append(last.Schemas, &posternv1.CatalogSchema{Name: name, Fingerprint: []byte(fingerprint)})
		if slices.ContainsFunc(r.Known, func(k *posternv1.CatalogSchema) bool { return k.Name == name && string(k.Fingerprint) == fingerprint }) {
			continue
		}
		page := &posternv1.CatalogPage{}
		for i := range n {
			page.Tables = append(page.Tables, &posternv1.CatalogTable{Schema: name, Name: fmt.Sprint(i)})
		}
		if err := take(page); err != nil {
			return err
		}
	}
	if fail != nil {
		return fail
	}
	return take(last)
}

func (h *hostAgent) set(f func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f()
}

func (h *hostAgent) count() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.asked
}

func service(t *testing.T, h *hostAgent) (*Service, *memory) {
	t.Helper()
	m := &memory{staged: map[string]int{}}
	generation := 0
	s := New(Config{
		Store: m, Audit: m, Logger: slog.New(slog.DiscardHandler), MaxColumns: 100, Delay: func() time.Duration { return 0 },
		Generation: func(time.Time) string { generation++; return fmt.Sprint(generation) },
		Connect: func(string) (Agent, error) {
			if h == nil {
				return nil, proto.Errorf(proto.CodeAgentOffline, "offline")
			}
			return h, nil
		},
	})
	t.Cleanup(s.Close)
	return s, m
}

var analyst = &posternv1.Principal{Organization: "org", TokenName: "ann", Role: "analyst"}

func ask(s *Service, refresh bool) (*posternv1.IntrospectSourceResponse, error) {
	return s.Introspect(context.Background(), analyst, "192.0.2.1", &posternv1.IntrospectSourceRequest{Agent: "host", Source: "db", Refresh: refresh})
}

func TestIntrospect(t *testing.T) {
	h := &hostAgent{tables: map[string]int{"a": 10, "b": 20}}
	s, m := service(t, h)
	for i, refresh := range []bool{false, false, true} {
		if resp, err := ask(s, refresh); err != nil || len(resp.Schemas) != 2 {
			t.Fatalf("%d: %v, %v", i, resp, err)
		}
	}
	if h.count() != 2 || m.staged["1"] != 30 || m.staged["2"] != 0 {
		t.Errorf("asked %d times, staged %v", h.count(), m.staged)
	}
	var actions []string
	for _, e := range m.entries {
		actions = append(actions, e.Action)
		if e.Actor != "token ann" || e.Outcome != "done" || e.Source != "db" || e.Agent != "host" || e.Remote != "192.0.2.1" {
			t.Errorf("entry %+v", e)
		}
	}
	// What is read from the cache leaves an entry, too.
	if got := strings.Join(actions, " "); got != "source.introspect source.introspect.read source.introspect.read source.introspect source.introspect.read" || m.entries[0].Rows != 32 {
		t.Errorf("entries %+v", m.entries)
	}
	if _, err := s.Introspect(context.Background(), analyst, "", &posternv1.IntrospectSourceRequest{Agent: "host", Source: "db", Table: "t*"}); err != nil || m.entries[5].Target != "*.t*" {
		t.Errorf("got %v, %+v", err, m.entries[5:])
	}
	m.refuse = proto.Errorf(proto.CodeStorageFull, "no room")
	if resp, err := ask(s, false); proto.CodeOf(err) != proto.CodeStorageFull || resp != nil {
		t.Errorf("without an entry: got %v, %v", resp, err)
	}
	m.refuse = nil
	for _, r := range []*posternv1.IntrospectSourceRequest{{Agent: "nobody", Source: "db"}, {Agent: "host", Source: "nothing"}} {
		if _, err := s.Introspect(context.Background(), analyst, "", r); proto.CodeOf(err) != proto.CodeNotFound {
			t.Errorf("%v: %v", r, err)
		}
	}
	// A failure leaves what there was, and nothing half.
	h.set(func() { h.tables["a"], h.fail = 11, proto.Errorf(proto.CodeAgentLost, "the tunnel went away") })
	if _, err := ask(s, true); proto.CodeOf(err) != proto.CodeAgentLost {
		t.Errorf("got %v", err)
	}
	h.set(func() { h.fail, h.partial = nil, true })
	if _, err := ask(s, true); proto.CodeOf(err) != proto.CodeAgentLost {
		t.Errorf("an incomplete catalog: %v", err)
	}
	if _, there := m.staged["3"]; there || len(m.staged) != 1 {
		t.Errorf("left over: %v", m.staged)
	}
	if resp, err := ask(s, false); err != nil || len(resp.Schemas) != 2 {
		t.Errorf("afterwards: %v, %v", resp, err)
	}
}

func TestBounds(t *testing.T) {
	h := &hostAgent{tables: map[string]int{"a": 40, "b": 50}}
	s, m := service(t, h)
	if resp, err := ask(s, false); err != nil || resp.Truncated {
		t.Fatalf("%v, %v", resp, err)
	}
	// Too much only together with what is kept: all of it is asked for again.
	h.set(func() { h.tables["b"] = 70 })
	if resp, err := ask(s, true); err != nil || !resp.Truncated {
		t.Fatalf("%v, %v", resp, err)
	}
	total := int64(0)
	for _, size := range m.sizes {
		total += size[0]
	}
	if h.count() != 3 || total > 100 {
		t.Errorf("asked %d times, %d columns", h.count(), total)
	}
	h.set(func() { h.tables["b"] = 10 })
	if resp, err := ask(s, true); err != nil || resp.Truncated {
		t.Errorf("when it fits again: %v, %v", resp, err)
	}
}

func TestTogether(t *testing.T) {
	h := &hostAgent{tables: map[string]int{"a": 1}, hold: make(chan struct{})}
	s, _ := service(t, h)
	var wg sync.WaitGroup
	for range 5 {
		wg.Go(func() {
			if _, err := ask(s, true); err != nil {
				t.Error(err)
			}
		})
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	for h.count() == 0 {
		time.Sleep(time.Millisecond)
	}
	if _, err := s.Introspect(ctx, analyst, "", &posternv1.IntrospectSourceRequest{Agent: "host", Source: "db"}); proto.CodeOf(err) != proto.CodeCancelled {
		t.Errorf("somebody who does not wait: %v", err)
	}
	close(h.hold)
	wg.Wait()
	if n := h.count(); n > 5 {
		t.Errorf("the host was asked %d times", n)
	}
}

func TestBackground(t *testing.T) {
	h := &hostAgent{tables: map[string]int{"a": 1}}
	s, m := service(t, h)
	wait := func(want int) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
			m.mu.Lock()
			n := len(m.entries)
			m.mu.Unlock()
			if n == want {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%d refreshes, want %d", n, want)
			}
		}
	}
	s.Came("org", "agt_1")
	wait(1)
	if m.entries[0].Actor != "control plane" || len(m.kept) != 1 {
		t.Errorf("entry %+v, kept %v", m.entries[0], m.kept)
	}
	s.Came("org", "agt_1") // it is fresh
	s.Came("org", "agt_2") // nobody knows it
	s.Changed("org", "agt_1")
	wait(2)
	m.mu.Lock()
	m.refreshed = time.Now().Add(-2 * maxAge)
	m.mu.Unlock()
	s.Came("org", "agt_1")
	wait(3)
	s.Restarted("org", "agt_1")
	wait(4)
	// One that fails before anything came leaves no entry.
	h.set(func() { h.tables, h.fail = nil, proto.Errorf(proto.CodeSourceUnreachable, "down") })
	asked := h.count()
	s.Changed("org", "agt_1")
	for h.count() == asked {
		time.Sleep(time.Millisecond)
	}
	wait(4)
}

// TestChangedDoesNotWait behind those that do.
func TestChangedDoesNotWait(t *testing.T) {
	h := &hostAgent{tables: map[string]int{"a": 1}}
	s, _ := service(t, h)
	s.cfg.Delay = func() time.Duration { return time.Hour }
	for i := range 10 {
		s.Came("org", fmt.Sprint("agt_", 100+i))
	}
	s.Restarted("org", "agt_1")
	s.Changed("org", "agt_1")
	for deadline := time.Now().Add(time.Minute); h.count() == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the host was not asked")
		}
	}
}

// TestAnotherFinished: who asks is not told that another control plane has refreshed the same data source meanwhile.
func TestAnotherFinished(t *testing.T) {
	h := &hostAgent{tables: map[string]int{"a": 1}}
	s, m := service(t, h)
	changed := proto.Errorf(proto.CodeUnavailable, "the cached catalog of %q changed meanwhile: try again", "db")
	for _, test := range []struct {
		name  string
		fail  []error
		asked int
		code  posternv1.ErrorCode
	}{
		{"once", []error{changed}, 2, 0},
		{"again and again", []error{changed, changed, changed}, 3, proto.CodeUnavailable},
		{"another error", []error{proto.Errorf(proto.CodeStorageFull, "full")}, 1, proto.CodeStorageFull},
	} {
		before := h.count()
		m.mu.Lock()
		m.finish = test.fail
		m.mu.Unlock()
		resp, err := ask(s, true)
		if n := h.count() - before; n != test.asked || (err != nil) != (test.code != 0) || err != nil && proto.CodeOf(err) != test.code || err == nil && len(resp.Schemas) != 1 {
			t.Errorf("%s: asked %d times, %v, %v", test.name, n, resp, err)
		}
		m.mu.Lock()
		if left := len(m.staged); test.code != 0 && left != 1 { // that of the refresh that counts
			t.Errorf("%s: %d refreshes are staged: %v", test.name, left, m.staged)
		}
		m.mu.Unlock()
	}
}

// TestMovedAway: what is old of an agent that has gone to another control plane is left to that one.
func TestMovedAway(t *testing.T) {
	h := &hostAgent{tables: map[string]int{"a": 1}}
	s, m := service(t, h)
	s.cfg.Here = func(string) bool { return false }
	s.look(job{organization: "org", agent: "agt_1"})
	if n := h.count(); n != 0 || len(m.kept) != 0 {
		t.Errorf("asked %d times, kept %v", n, m.kept)
	}
	s.look(job{organization: "org", agent: "agt_1", force: true}) // nobody else knows
	if n := h.count(); n != 1 {
		t.Errorf("asked %d times", n)
	}
}

func TestOffline(t *testing.T) {
	s, _ := service(t, nil)
	if _, err := ask(s, false); proto.CodeOf(err) != proto.CodeAgentOffline {
		t.Errorf("got %v", err)
	}
	s.Came("org", "agt_1")
	s.Close()
	if _, err := ask(s, true); proto.CodeOf(err) != proto.CodeUnavailable {
		t.Errorf("after Close: %v", err)
	}
	s.Came("org", "agt_1")
}
