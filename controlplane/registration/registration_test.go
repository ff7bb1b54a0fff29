package registration_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/controlplane/audit"
	"github.com/postern-dev/postern/controlplane/pki"
	"github.com/postern-dev/postern/controlplane/ratelimit"
	"github.com/postern-dev/postern/controlplane/registration"
	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/e2e/storetest"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/regkey"
)

var ctx = context.Background()

const remote = "192.0.2.7:4711"

func wantCode(t *testing.T, err error, want proto.Code) {
	t.Helper()
	if proto.CodeOf(err) != want {
		t.Fatalf("got error %v (%v), want %v", err, proto.CodeOf(err), want)
	}
}

// clock is a settable clock.
type clock struct {
	mu sync.Mutex
	at time.Time
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = c.at.Add(d)
}

// plane is the part of a control plane that joining needs, for real.
type plane struct {
	*registration.Service
	t     *testing.T
	clock *clock
	store *store.Store
	ca    *pki.Authority
	log   *audit.Log
	org   string
}

func newPlane(t *testing.T, s *store.Store) *plane {
	t.Helper()
	p := &plane{t: t, clock: &clock{at: time.Now()}, store: s}
	var err error
	p.ca, err = pki.Open(ctx, pki.Config{Store: s, MasterKeyFile: filepath.Join(t.TempDir(), "master.key"), Now: p.clock.now})
	if err != nil {
		t.Fatal(err)
	}
	p.log = audit.New(audit.Config{Store: s, DefaultOrganization: store.DefaultOrganizationID, Now: p.clock.now})
	p.Service = p.replica()
	org, err := s.CreateOrganization(ctx, "acme", p.clock.now())
	if err != nil {
		t.Fatal(err)
	}
	p.org = org.Id
	return p
}

// replica is another process of the same control plane.
func (p *plane) replica() *registration.Service {
	return registration.New(registration.Config{
		Store: p.store, CA: p.ca, Audit: p.log, Now: p.clock.now,
		Failures: ratelimit.New(1e-6, 40), Renewals: ratelimit.New(1e-6, 6),
	})
}

func (p *plane) key(ttl time.Duration, uses uint32) regkey.Key {
	p.t.Helper()
	_, text, err := p.Create(ctx, p.org, ttl, uses, map[string]string{"zone": "north"}, "token admin")
	if err != nil {
		p.t.Fatal(err)
	}
	k, err := regkey.Parse(text)
	if err != nil {
		p.t.Fatal(err)
	}
	return k
}

func csr(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func (p *plane) request(k regkey.Key) *posternv1.RegisterRequest {
	return &posternv1.RegisterRequest{
		KeyId: k.ID, KeySecret: k.Secret[:], Csr: csr(p.t), Name: "host", HostTime: timestamppb.New(p.clock.now()),
		Version: proto.Version(), Host: &posternv1.HostFacts{Hostname: "h", Os: "linux", Arch: "amd64", Kernel: "6.1"},
	}
}

// identify is what the tunnel endpoint makes of a certificate.
func (p *plane) identify(der []byte) registration.Identity {
	p.t.Helper()
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		p.t.Fatal(err)
	}
	id, err := p.ca.Identify(tls.ConnectionState{PeerCertificates: []*x509.Certificate{cert}})
	if err != nil {
		p.t.Fatal(err)
	}
	return registration.Identity(id)
}

func (p *plane) join() registration.Identity {
	p.t.Helper()
	r, err := p.Register(ctx, p.request(p.key(0, 1)), remote)
	if err != nil {
		p.t.Fatal(err)
	}
	return p.identify(r.Certificate)
}

func (p *plane) renew(id registration.Identity) registration.Identity {
	p.t.Helper()
	r, err := p.Renew(ctx, id, &posternv1.RenewRequest{Csr: csr(p.t), HostTime: timestamppb.New(p.clock.now())}, remote)
	if err != nil {
		p.t.Fatal(err)
	}
	return p.identify(r.Certificate)
}

// actions lists the audit log's actions, oldest first.
func (p *plane) actions() string {
	p.t.Helper()
	lines, err := p.log.List(ctx, p.org, 1, 1000)
	if err != nil {
		p.t.Fatal(err)
	}
	var all []string
	for _, line := range lines {
		e, err := auditchain.Decode(line)
		if err != nil {
			p.t.Fatal(err)
		}
		all = append(all, e.Action+":"+e.Outcome)
	}
	return strings.Join(all, " ")
}

func TestRegister(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		p := newPlane(t, s)
		k := p.key(0, 2)
		if k.Fingerprint != p.ca.Fingerprint() {
			t.Error("the key does not carry the CA's fingerprint")
		}
		first, err := p.Register(ctx, p.request(k), remote)
		if err != nil {
			t.Fatal(err)
		}
		if first.Name != "host" || first.Organization != "acme" || first.Labels["zone"] != "north" || len(first.Authorities) != 1 ||
			sha256.Sum256(first.Authorities[0]) != k.Fingerprint {
			t.Errorf("got %v", first)
		}
		id := p.identify(first.Certificate)
		if id.Organization != p.org || id.Agent != first.AgentId || id.Expired {
			t.Errorf("got %+v", id)
		}
		if err := p.Admit(ctx, id, remote); err != nil {
			t.Fatal(err)
		}
		second, err := p.Register(ctx, p.request(k), remote)
		if err != nil || second.Name != "host-2" || second.AgentId == first.AgentId {
			t.Errorf("got %v, %v", second, err)
		}
		_, err = p.Register(ctx, p.request(k), remote)
		wantCode(t, err, proto.CodeKeyUsedUp)
		if got := p.actions(); got != "agent.register:done agent.register:done agent.register:denied" {
			t.Errorf("audit log: %s", got)
		}
		a, err := s.FindAgent(ctx, p.org, "host")
		if err != nil || a.RemoteAddress != remote || a.Kernel != "6.1" || a.Software == "" {
			t.Errorf("got %v, %v", a, err)
		}
	})
}

func TestRegisterRefuses(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		p := newPlane(t, s)
		for _, test := range []struct {
			name   string
			change func(k regkey.Key, req *posternv1.RegisterRequest)
			want   proto.Code
			text   string
		}{
			{"unknown key", func(_ regkey.Key, req *posternv1.RegisterRequest) { req.KeyId = "aaaaaaaaaaaaaaaa" }, proto.CodeKeyUnknown, "does not know"},
			{"wrong secret", func(_ regkey.Key, req *posternv1.RegisterRequest) { req.KeySecret = make([]byte, 32) }, proto.CodeKeyUnknown, "does not know"},
			{"no secret", func(_ regkey.Key, req *posternv1.RegisterRequest) { req.KeySecret = nil }, proto.CodeKeyUnknown, "does not know"},
			{"no key", func(_ regkey.Key, req *posternv1.RegisterRequest) { req.KeyId = strings.Repeat("\xff\x00", 100) }, proto.CodeKeyUnknown, "does not know"},
			{"revoked", func(k regkey.Key, _ *posternv1.RegisterRequest) {
				if _, err := s.RevokeKey(ctx, p.org, k.ID, p.clock.now()); err != nil {
					t.Fatal(err)
				}
			}, proto.CodeKeyRevoked, "revoked on"},
			{"clock behind", func(_ regkey.Key, req *posternv1.RegisterRequest) {
				req.HostTime = timestamppb.New(p.clock.now().Add(-6 * time.Minute))
			}, proto.CodeClockSkew, "6m0s behind"},
			{"clock ahead", func(_ regkey.Key, req *posternv1.RegisterRequest) {
				req.HostTime = timestamppb.New(p.clock.now().Add(72 * time.Hour))
			}, proto.CodeClockSkew, "72h0m0s ahead of"},
			{"no time", func(_ regkey.Key, req *posternv1.RegisterRequest) { req.HostTime = nil }, proto.CodeInvalid, "what time it is"},
			{"impossible time", func(_ regkey.Key, req *posternv1.RegisterRequest) { req.HostTime = &posternv1TimestampTooFar }, proto.CodeInvalid, "what time it is"},
			{"bad name", func(_ regkey.Key, req *posternv1.RegisterRequest) { req.Name = "Host; rm -rf /" }, proto.CodeInvalid, "a-z"},
			{"no name", func(_ regkey.Key, req *posternv1.RegisterRequest) { req.Name = "" }, proto.CodeInvalid, "--name"},
			{"bad request", func(_ regkey.Key, req *posternv1.RegisterRequest) { req.Csr = []byte("no") }, proto.CodeInvalid, "PKCS #10"},
			{"another version", func(_ regkey.Key, req *posternv1.RegisterRequest) {
				req.Version = &posternv1.ProtocolVersion{Major: 9}
			}, proto.CodeVersionMismatch, "9.0"},
		} {
			t.Run(test.name, func(t *testing.T) {
				k := p.key(0, 1)
				req := p.request(k)
				test.change(k, req)
				_, err := p.Register(ctx, req, remote)
				wantCode(t, err, test.want)
				if !strings.Contains(err.Error(), test.text) || strings.Contains(err.Error(), "\n") {
					t.Errorf("got %q, want %q", err, test.text)
				}
				if _, key, _, err := s.KeyByID(ctx, k.ID); err != nil || key.Uses != 0 {
					t.Errorf("it cost %d uses, %v", key.GetUses(), err)
				}
			})
		}
		t.Run("expired", func(t *testing.T) {
			req := p.request(p.key(time.Minute, 1))
			p.clock.advance(time.Minute)
			req.HostTime = timestamppb.New(p.clock.now())
			_, err := p.Register(ctx, req, remote)
			wantCode(t, err, proto.CodeKeyExpired)
		})
		t.Run("organization disabled", func(t *testing.T) {
			req := p.request(p.key(0, 1))
			for _, disabled := range []bool{true, false} {
				if _, err := s.SetOrganizationDisabled(ctx, p.org, disabled, p.clock.now()); err != nil {
					t.Fatal(err)
				}
				_, err := p.Register(ctx, req, remote)
				if disabled {
					wantCode(t, err, proto.CodeOrganizationDisabled)
				} else if err != nil {
					t.Error(err)
				}
			}
		})
	})
}

var posternv1TimestampTooFar = timestamppb.Timestamp{Seconds: 1 << 60}

// TestRace: fifty hosts with one key, good for seven.
func TestRace(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		p := newPlane(t, s)
		k := p.key(0, 7)
		services := []*registration.Service{p.replica(), p.replica()}
		requests := make([]*posternv1.RegisterRequest, 50)
		for i := range requests {
			requests[i] = p.request(k)
		}
		var mu sync.Mutex
		outcome := map[proto.Code]int{}
		names := map[string]bool{}
		var wg sync.WaitGroup
		for i, req := range requests {
			wg.Go(func() {
				r, err := services[i%2].Register(ctx, req, fmt.Sprintf("192.0.2.%d:1", i))
				mu.Lock()
				defer mu.Unlock()
				outcome[proto.CodeOf(err)]++
				if err == nil {
					names[r.Name] = true
				}
			})
		}
		wg.Wait()
		if outcome[0] != 7 || outcome[proto.CodeKeyUsedUp] != 43 || len(names) != 7 {
			t.Errorf("got %v, names %v", outcome, names)
		}
	})
}

func TestFailedJoinsAreLimited(t *testing.T) {
	p := newPlane(t, storetest.SQLite(t))
	bad := p.request(p.key(0, 1))
	bad.KeySecret = nil
	for range 40 {
		_, err := p.Register(ctx, bad, remote)
		wantCode(t, err, proto.CodeKeyUnknown)
	}
	_, err := p.Register(ctx, p.request(p.key(0, 1)), remote)
	wantCode(t, err, proto.CodeRateLimited)
	if _, err := p.Register(ctx, p.request(p.key(0, 1)), "192.0.2.8:1"); err != nil {
		t.Errorf("another address: %v", err)
	}
}

func TestCreateKey(t *testing.T) {
	dir := t.TempDir()
	db := filepath.Join(dir, "postern.db")
	p := newPlane(t, storetest.Open(t, store.Config{SQLitePath: db}))
	key, text, err := p.Create(ctx, p.org, 0, 0, nil, "token admin")
	if err != nil || key.MaxUses != 1 || key.Expires.AsTime().Sub(key.Created.AsTime()) != time.Hour {
		t.Errorf("got %v, %v", key, err)
	}
	k, err := regkey.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	if storetest.Contains(t, db, k.Secret[:]) || storetest.Contains(t, db, []byte(text)) {
		t.Error("the database holds the key's secret")
	}
	many := map[string]string{}
	for i := range 33 {
		many[fmt.Sprint("a", i)] = ""
	}
	for _, bad := range []struct {
		ttl    time.Duration
		uses   uint32
		labels map[string]string
	}{
		{ttl: 31 * 24 * time.Hour},
		{ttl: time.Millisecond},
		{ttl: -time.Hour},
		{uses: 10_001},
		{labels: map[string]string{"": "x"}},
		{labels: map[string]string{"$(id)": "x"}},
		{labels: map[string]string{"a": "x y"}},
		{labels: map[string]string{"a": strings.Repeat("x", 64)}},
		{labels: many},
	} {
		_, _, err := p.Create(ctx, p.org, bad.ttl, bad.uses, bad.labels, "")
		wantCode(t, err, proto.CodeInvalid)
	}
}

// TestRenewOverlaps: the old certificate works until the new one has been used.
func TestRenewOverlaps(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		p := newPlane(t, s)
		old := p.join()
		if err := p.Admit(ctx, old, remote); err != nil {
			t.Fatal(err)
		}
		lost := p.renew(old) // the reply never arrives
		if err := p.CheckIdentity(ctx, old); err != nil {
			t.Fatal(err)
		}
		fresh := p.renew(old)
		if err := p.CheckIdentity(ctx, old); err != nil {
			t.Fatal(err)
		}
		// As the hub does it: check, then confirm.
		if err := p.CheckIdentity(ctx, fresh); err != nil {
			t.Fatal(err)
		}
		if err := p.ConfirmSerial(ctx, fresh); err != nil {
			t.Fatal(err)
		}
		if err := p.CheckIdentity(ctx, fresh); err != nil {
			t.Fatal(err)
		}
		for _, gone := range []registration.Identity{old, lost} {
			wantCode(t, p.CheckIdentity(ctx, gone), proto.CodeUnauthenticated)
		}
		if got := p.actions(); strings.Contains(got, "copied") {
			t.Errorf("an old tunnel on its way out raised an alarm: %s", got)
		}
		_, err := p.Renew(ctx, old, &posternv1.RenewRequest{Csr: csr(t), HostTime: timestamppb.New(p.clock.now())}, remote)
		wantCode(t, err, proto.CodeUnauthenticated)

		// A new tunnel with it is an alarm, and only one an hour.
		for range 3 {
			wantCode(t, p.Admit(ctx, old, remote), proto.CodeUnauthenticated)
		}
		if got := p.actions(); strings.Count(got, "agent.copied:denied") != 1 {
			t.Errorf("audit log: %s", got)
		}
		p.clock.advance(time.Hour)
		wantCode(t, p.CheckIdentity(ctx, lost), proto.CodeUnauthenticated)
		if got := p.actions(); strings.Count(got, "agent.copied:denied") != 2 {
			t.Errorf("audit log: %s", got)
		}
	})
}

func TestRejoin(t *testing.T) {
	p := newPlane(t, storetest.SQLite(t))
	id := p.join()
	if err := p.Admit(ctx, id, remote); err != nil {
		t.Fatal(err)
	}
	p.clock.advance(25*time.Hour + time.Minute)
	wantCode(t, p.CheckIdentity(ctx, id), proto.CodeIdentityExpired) // a tunnel that outlived it
	id.Expired = true                                                // a new tunnel
	again := p.renew(id)
	if err := p.Admit(ctx, again, remote); err != nil {
		t.Fatal(err)
	}
	wantCode(t, p.CheckIdentity(ctx, id), proto.CodeUnauthenticated)
	if got := p.actions(); got != "agent.register:done agent.rejoin:done" {
		t.Errorf("audit log: %s", got)
	}
	bad := &posternv1.RenewRequest{Csr: csr(t), HostTime: timestamppb.New(p.clock.now().Add(time.Hour))}
	_, err := p.Renew(ctx, again, bad, remote)
	wantCode(t, err, proto.CodeClockSkew)
	_, err = p.Renew(ctx, again, &posternv1.RenewRequest{Csr: []byte{1}, HostTime: timestamppb.New(p.clock.now())}, remote)
	wantCode(t, err, proto.CodeInvalid)
}

func TestRenewalsAreLimited(t *testing.T) {
	p := newPlane(t, storetest.SQLite(t))
	id := p.join()
	for range 6 {
		p.renew(id)
	}
	_, err := p.Renew(ctx, id, &posternv1.RenewRequest{Csr: csr(t), HostTime: timestamppb.New(p.clock.now())}, remote)
	wantCode(t, err, proto.CodeRateLimited)
}

func TestRevocationBites(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		p := newPlane(t, s)
		replica := p.replica()
		id := p.join()
		for _, service := range []*registration.Service{p.Service, replica} {
			if err := service.Admit(ctx, id, remote); err != nil {
				t.Fatal(err)
			}
		}
		other := id
		other.Organization = store.DefaultOrganizationID
		wantCode(t, p.CheckIdentity(ctx, other), proto.CodeUnauthenticated)
		other = id
		other.Serial = strings.Repeat("0", 32)
		wantCode(t, p.CheckIdentity(ctx, other), proto.CodeUnauthenticated)

		if _, err := s.RevokeAgent(ctx, p.org, "host", p.clock.now()); err != nil {
			t.Fatal(err)
		}
		p.Forget()
		wantCode(t, p.CheckIdentity(ctx, id), proto.CodeAgentRevoked)
		p.clock.advance(time.Second)
		wantCode(t, replica.CheckIdentity(ctx, id), proto.CodeAgentRevoked)
		_, err := p.Renew(ctx, id, &posternv1.RenewRequest{Csr: csr(t), HostTime: timestamppb.New(p.clock.now())}, remote)
		wantCode(t, err, proto.CodeAgentRevoked)

		id = p.join()
		if _, err := s.SetOrganizationDisabled(ctx, p.org, true, p.clock.now()); err != nil {
			t.Fatal(err)
		}
		wantCode(t, p.CheckIdentity(ctx, id), proto.CodeOrganizationDisabled)
	})
}

func TestHello(t *testing.T) {
	p := newPlane(t, storetest.SQLite(t))
	id := p.join()
	var head auditchain.Head
	chain := make([]auditchain.Head, 0, 5)
	for range 5 {
		e := auditchain.Entry{Time: p.clock.now(), Action: "x"}
		head = e.Seal(head)
		chain = append(chain, head)
	}
	hello := func(h auditchain.Head) auditchain.Head {
		t.Helper()
		r, err := p.Hello(ctx, id, &posternv1.HelloRequest{
			Version: proto.Version(), Host: &posternv1.HostFacts{Kernel: "6.18"}, AuditHead: h.Proto(), Sources: []*posternv1.SourceInfo{{Name: "db"}},
		})
		if err != nil {
			t.Fatal(err)
		}
		if r.Name != "host" || r.Organization != "acme" || r.AgentId != id.Agent || len(r.Authorities) != 1 {
			t.Errorf("got %v", r)
		}
		known, err := auditchain.HeadFromProto(r.KnownAuditHead)
		if err != nil {
			t.Fatal(err)
		}
		return known
	}
	for i, step := range []struct{ report, known auditchain.Head }{
		{auditchain.Head{}, auditchain.Head{}},
		{chain[1], auditchain.Head{}},
		{chain[3], chain[1]},
		{chain[3], chain[3]},
		{chain[2], chain[3]}, // entries were removed
		{chain[4], chain[3]},
	} {
		if got := hello(step.report); got != step.known {
			t.Errorf("step %d: got %v, want %v", i, got.Sequence, step.known.Sequence)
		}
	}
	if got := p.actions(); got != "agent.register:done audit.mismatch:failed" {
		t.Errorf("audit log: %s", got)
	}
	if err := p.UpdateInventory(ctx, id, nil); err != nil {
		t.Error(err)
	}
	a, err := p.store.FindAgent(ctx, p.org, "host")
	if err != nil || a.Kernel != "6.18" || len(a.Sources) != 0 || a.RemoteAddress != remote {
		t.Errorf("got %v, %v", a, err)
	}
	_, err = p.Hello(ctx, id, &posternv1.HelloRequest{AuditHead: &posternv1.AuditHead{Sequence: 9, Hash: []byte{1}}})
	wantCode(t, err, proto.CodeInvalid)
	_, err = p.Hello(ctx, id, &posternv1.HelloRequest{Sources: make([]*posternv1.SourceInfo, 1001)})
	wantCode(t, err, proto.CodeInvalid)
}
