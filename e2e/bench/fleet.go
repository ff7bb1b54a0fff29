package main

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/client"
	"github.com/postern-dev/postern/e2e/stack"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
	"github.com/postern-dev/postern/proto/regkey"
	"github.com/postern-dev/postern/tunnel"
)

// fleetSettle is how long an idle fleet is looked at.
const fleetSettle = 40 * time.Second

// measureFleet attaches simulated idle agents, each with an identity of its own,
// to the real control plane, and restarts it.
func measureFleet(ctx context.Context, o Options, r *Report) error {
	n := 5000
	if o.Short {
		n = 500
	}
	s, err := stack.New(stack.Options{Bin: o.Bin})
	if err != nil {
		return err
	}
	defer s.Close() //nolint:errcheck // a throwaway
	if err := s.StartControlPlane(ctx); err != nil {
		return err
	}
	f, err := newFleet(ctx, s, n)
	if err != nil {
		return err
	}
	began := time.Now()
	if err := f.register(ctx, n); err != nil {
		return err
	}
	r.Printf("%d agents registered in %.1f s", n, time.Since(began).Seconds())
	// What registering took is not what being idle takes.
	s.ControlPlane.Kill()
	if err := s.StartControlPlane(ctx); err != nil {
		return err
	}
	empty, err := uniqueMemory(s.ControlPlane.PID())
	if err != nil {
		return err
	}
	f.start()
	defer f.stop()
	if err := f.await(ctx, n, 2*time.Minute); err != nil {
		return err
	}
	time.Sleep(fleetSettle / 2)
	before := cpuTime(s.ControlPlane.PID())
	time.Sleep(fleetSettle / 2)
	used := cpuTime(s.ControlPlane.PID()) - before
	full, err := uniqueMemory(s.ControlPlane.PID())
	if err != nil {
		return err
	}
	r.AtMost("controlplane_idle_agent_memory", float64(full-empty)/1024/float64(n), 50, "KiB")
	r.AtMost("controlplane_idle_agents_cpu", used.Seconds()/(fleetSettle/2).Seconds()*100, 1, "%")

	s.ControlPlane.Kill()
	if err := s.StartControlPlane(ctx); err != nil {
		return err
	}
	began = time.Now()
	if err := f.await(ctx, n, 2*time.Minute); err != nil {
		return err
	}
	r.AtMost("controlplane_agents_back_after_restart", time.Since(began).Seconds(), 30, "s")
	return nil
}

// fleet is simulated agents: they register, say hello and stay.
type fleet struct {
	stack *stack.Stack
	// urls are where each further tunnel is dialed in turns, as a plain load balancer
	// would bring it there; next counts them. Empty: the stack's.
	urls []string
	next atomic.Uint32
	// apart is how long after each other they come at first.
	apart  time.Duration
	key    regkey.Key
	roots  *x509.CertPool
	certs  []tls.Certificate
	cancel context.CancelFunc
	group  errgroup.Group
}

func newFleet(ctx context.Context, s *stack.Stack, n int) (*fleet, error) {
	text, err := s.NewKey(ctx, "--uses", strconv.Itoa(n))
	if err != nil {
		return nil, err
	}
	key, err := regkey.Parse(text)
	if err != nil {
		return nil, err
	}
	token, err := os.ReadFile(s.TokenFile)
	if err != nil {
		return nil, err
	}
	c, err := client.New(client.Config{URL: s.URL, Token: client.StaticToken(client.NewSecret(strings.TrimSpace(string(token))))})
	if err != nil {
		return nil, err
	}
	defer c.Close()
	shown, err := c.CA.ShowCA(ctx, connect.NewRequest(&posternv1.ShowCARequest{}))
	if err != nil {
		return nil, err
	}
	f := &fleet{stack: s, key: key, roots: x509.NewCertPool()}
	for _, a := range shown.Msg.Authorities {
		f.roots.AppendCertsFromPEM([]byte(a.Certificate))
	}
	return f, nil
}

func (f *fleet) dial(ctx context.Context, certs ...tls.Certificate) (*tunnel.Tunnel, error) {
	urls, first := f.urls, f.next.Add(1)
	if len(urls) == 0 {
		urls = []string{f.stack.URL}
	}
	for i := uint32(0); ; i++ {
		t, err := tunnel.Dial(ctx, tunnel.DialConfig{
			URL: urls[(first+i)%uint32(len(urls))], TLS: &tls.Config{RootCAs: f.roots, Certificates: certs, ServerName: "controlplane.postern.internal"},
		})
		// Where nothing listens a load balancer tries the next one.
		if !errors.Is(err, syscall.ECONNREFUSED) || int(i) == len(urls)-1 {
			return t, err
		}
	}
}

func linkOf(t *tunnel.Tunnel) posternv1connect.LinkServiceClient {
	return posternv1connect.NewLinkServiceClient(&http.Client{Transport: t.Transport(tunnel.Control)}, "http://controlplane")
}

func (f *fleet) register(ctx context.Context, n int) error {
	f.certs = make([]tls.Certificate, n)
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(16)
	for i := range n {
		group.Go(func() (err error) {
			f.certs[i], err = f.registerOne(ctx, fmt.Sprintf("idle-%d", i))
			return err
		})
	}
	return group.Wait()
}

func (f *fleet) registerOne(ctx context.Context, name string) (tls.Certificate, error) {
	var cert tls.Certificate
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return cert, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, private)
	if err != nil {
		return cert, err
	}
	t, err := f.dial(ctx)
	if err != nil {
		return cert, err
	}
	defer t.Close(nil) //nolint:errcheck // it was only for this
	resp, err := linkOf(t).Register(ctx, connect.NewRequest(&posternv1.RegisterRequest{
		KeyId: f.key.ID, KeySecret: f.key.Secret[:], Csr: csr, Name: name, HostTime: timestamppb.Now(), Version: proto.Version(),
	}))
	if err != nil {
		return cert, err
	}
	return tls.Certificate{Certificate: [][]byte{resp.Msg.Certificate}, PrivateKey: private}, nil
}

// start attaches all and keeps them attached until stop.
func (f *fleet) start() {
	ctx, cancel := context.WithCancel(context.Background())
	f.cancel = cancel
	for i, cert := range f.certs {
		f.group.Go(func() error {
			// They come one after the other; after a loss they come as they like.
			select {
			case <-time.After(time.Duration(i) * f.apart):
			case <-ctx.Done():
				return nil
			}
			return tunnel.KeepUp(ctx, tunnel.BackoffConfig{}, func(ctx context.Context) (*tunnel.Tunnel, error) {
				return f.dial(ctx, cert)
			}, func(ctx context.Context, t *tunnel.Tunnel) error {
				hello := &posternv1.HelloRequest{Version: proto.Version(), Features: proto.Features(), HostTime: timestamppb.Now()}
				if _, err := linkOf(t).Hello(ctx, connect.NewRequest(hello)); err != nil {
					return err
				}
				select {
				case <-ctx.Done():
				case <-t.Done():
				}
				return nil
			})
		})
	}
}

func (f *fleet) stop() {
	f.cancel()
	f.group.Wait() //nolint:errcheck // they end because they are told to
}

// await waits until the control plane counts n agents.
func (f *fleet) await(ctx context.Context, n int, limit time.Duration) error {
	return await(ctx, n, limit, f.stack.URL)
}

// await waits until the replicas at these URLs together count n agents.
func await(ctx context.Context, n int, limit time.Duration, urls ...string) error {
	var got int
	for end := time.Now().Add(limit); time.Now().Before(end) && ctx.Err() == nil; time.Sleep(50 * time.Millisecond) {
		sum := 0
		for _, url := range urls {
			one, err := online(ctx, url)
			if err != nil {
				sum = -1
				break
			}
			sum += one
		}
		if got = max(sum, 0); sum >= n {
			return nil
		}
	}
	return errors.Join(ctx.Err(), fmt.Errorf("only %d of %d agents after %s", got, n, limit))
}

// online reads the control plane's own count.
func online(ctx context.Context, url string) (int, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url+"/metrics", nil)
	if err != nil {
		return 0, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close() //nolint:errcheck // read far enough
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		if value, ok := strings.CutPrefix(lines.Text(), "controlplane_agents_online "); ok {
			return strconv.Atoi(value)
		}
	}
	return 0, errors.Join(lines.Err(), errors.New("the control plane counts no agents"))
}
