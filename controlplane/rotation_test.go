package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/controlplane/pki"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
	"github.com/postern-dev/postern/tunnel"
)

// renew gets an agent another certificate over a tunnel of its own, as a real one does, and trusts
// what it is told to.
func (a *simulatedAgent) renew(t *testing.T, tn *tunnel.Tunnel) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := linkClient(tn).Renew(t.Context(), connect.NewRequest(&posternv1.RenewRequest{Csr: csr, HostTime: timestamppb.Now()}))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	for _, der := range resp.Msg.Authorities {
		ca, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		roots.AddCert(ca)
	}
	a.roots, a.cert = roots, tls.Certificate{Certificate: [][]byte{resp.Msg.Certificate}, PrivateKey: key}
}

// TestRotationEndsNothing replaces the authority while a statement runs. The agents say nothing of what they
// trust, as those of versions before.
func TestRotationEndsNothing(t *testing.T) {
	s := startServer(t, func(o *Options) { o.CASettle = time.Hour })
	ctx := t.Context()
	ca := posternv1connect.NewCAServiceClient(as(s.token), s.url)
	status := func() *posternv1.CAStatus {
		t.Helper()
		resp, err := ca.GetCAStatus(ctx, connect.NewRequest(&posternv1.GetCAStatusRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		return resp.Msg
	}
	rotate := func(force bool) (*posternv1.CAStatus, error) {
		resp, err := ca.RotateCA(ctx, connect.NewRequest(&posternv1.RotateCARequest{Force: force}))
		if err != nil {
			return nil, proto.FromConnect(err)
		}
		return resp.Msg, nil
	}
	away := joined(t, s, s.token, "away")
	away.answer(func(context.Context, *posternv1.SQLRequest, io.Writer) *posternv1.QueryOutcome { return nil })
	busy := newSimulatedAgent(s)
	if err := busy.register(ctx, s.newKey(t, s.token, 1), "busy"); err != nil {
		t.Fatal(err)
	}
	oldKey := s.newKey(t, s.token, 3)
	tn := busy.attach(t)
	started, finish := make(chan struct{}), make(chan struct{})
	busy.answer(func(_ context.Context, _ *posternv1.SQLRequest, w io.Writer) *posternv1.QueryOutcome {
		close(started)
		<-finish
		w.Write([]byte("rows"))
		return &posternv1.QueryOutcome{Rows: 1}
	})
	ended := make(chan error, 1)
	go func() {
		rows, outcome, err := s.run(context.Background(), s.token, "busy/shop", `{"sql":"x"}`)
		if err == nil && (outcome.Error != nil || string(rows) != "rows") {
			err = fmt.Errorf("%q, %v", rows, outcome)
		}
		ended <- err
	}()
	<-started

	if got := status(); got.Stage != pki.StageStable {
		t.Fatalf("at first: %v", got)
	}
	if _, err := rotate(true); proto.CodeOf(err) != proto.CodeInvalid {
		t.Errorf("--force without a rotation: got %v", err)
	}
	if got, err := rotate(false); err != nil || got.Stage != pki.StageAnnounced || got.BehindTotal != 2 || len(got.Behind) != 2 || !got.Behind[0].Online || got.Keys != 1 {
		t.Fatalf("announced: %v, %v", got, err)
	}
	if got, err := rotate(false); err != nil || got.Stage != pki.StageAnnounced || len(got.Authorities) != 2 {
		t.Fatalf("asked twice: %v, %v", got, err)
	}
	if _, err := rotate(true); proto.CodeOf(err) != proto.CodeInvalid {
		t.Errorf("--force when the new one does not issue yet: got %v", err)
	}
	if err := s.stepCA(ctx, time.Now().Add(2*time.Hour)); err != nil {
		t.Fatal(err)
	}
	if got := status(); got.Stage != pki.StageRenewing || got.BehindTotal != 2 || got.Keys != 1 {
		t.Fatalf("renewing: %v", got)
	}
	step := func() {
		t.Helper()
		if err := s.stepCA(ctx, time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	step()
	select {
	case g := <-tn.GoneAway():
		if g.Deadline != 0 {
			t.Errorf("the tunnel is to end after %s", g.Deadline)
		}
	case <-time.After(time.Minute):
		t.Fatal("the agent was not asked to come back")
	}
	// It comes back with what it has, is told to renew, does, and moves to a tunnel with the new one.
	next, err := busy.dial(ctx, []tls.Certificate{busy.cert})
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close(nil)
	hello, err := linkClient(next).Hello(ctx, connect.NewRequest(&posternv1.HelloRequest{Version: proto.Version(), HostTime: timestamppb.Now()}))
	if err != nil || !hello.Msg.RenewIdentity || len(hello.Msg.Authorities) != 2 {
		t.Fatalf("hello: %v, %v", hello, err)
	}
	busy.renew(t, next)
	if got := status(); got.BehindTotal != 2 { // not used yet
		t.Errorf("renewed, not used: %v", got)
	}
	last, err := busy.dial(ctx, []tls.Certificate{busy.cert})
	if err != nil {
		t.Fatal(err)
	}
	defer last.Close(nil)
	if hello, err = linkClient(last).Hello(ctx, connect.NewRequest(&posternv1.HelloRequest{Version: proto.Version(), HostTime: timestamppb.Now()})); err != nil || hello.Msg.RenewIdentity {
		t.Fatalf("hello with the new certificate: %v, %v", hello, err)
	}
	if got := status(); got.BehindTotal != 1 || got.Behind[0].Agent != "away" {
		t.Errorf("one renewed: %v", got)
	}
	// A host joins with a key of before, and knows the old one alone.
	joins := newSimulatedAgent(s)
	joins.roots = away.roots
	if err := joins.register(ctx, oldKey, "late"); err != nil {
		t.Errorf("a key of before: %v", err)
	}
	step()
	if got := status(); got.Stage != pki.StageRenewing {
		t.Fatalf("the old one is dropped while an agent depends on it: %v", got)
	}
	if _, err := posternv1connect.NewAgentServiceClient(as(s.token), s.url).RevokeAgent(ctx, connect.NewRequest(&posternv1.RevokeAgentRequest{Agent: "away"})); err != nil {
		t.Fatal(err)
	}
	step()
	if got := status(); got.Stage != pki.StageRenewing || got.BehindTotal != 0 || got.Keys != 1 {
		t.Fatalf("the old one is dropped while a key depends on it: %v", got)
	}
	if _, err := posternv1connect.NewKeyServiceClient(as(s.token), s.url).RevokeKey(ctx, connect.NewRequest(&posternv1.RevokeKeyRequest{KeyId: oldKey.ID})); err != nil {
		t.Fatal(err)
	}
	step()
	if got := status(); got.Stage != pki.StageStable || len(got.Authorities) != 1 {
		t.Fatalf("at last: %v", got)
	}
	close(finish)
	if err := <-ended; err != nil {
		t.Errorf("the statement that ran meanwhile: %v", err)
	}
	eventually(t, "the entries in the audit log", func() error {
		for _, action := range []string{"ca.rotate", "ca.activate", "ca.retire"} {
			if len(audited(t, s, action)) == 0 {
				return errors.New("no " + action)
			}
		}
		return nil
	})
}

// TestRotationForced drops the old authority while agents depend on it: they must register anew.
func TestRotationForced(t *testing.T) {
	s := startServer(t, func(o *Options) { o.CASettle = time.Hour })
	a := joined(t, s, s.token, "host")
	for _, f := range []func() error{
		func() error { _, err := rotation{s.Server}.Rotate(t.Context(), false); return err },
		func() error { return s.stepCA(t.Context(), time.Now().Add(2*time.Hour)) },
		func() error { _, err := rotation{s.Server}.Rotate(t.Context(), true); return err },
	} {
		if err := f(); err != nil {
			t.Fatal(err)
		}
	}
	if got := s.ca.Rotation(); got.Stage != pki.StageStable {
		t.Fatalf("got %+v", got)
	}
	if tn, err := a.dial(t.Context(), []tls.Certificate{a.cert}); err == nil {
		tn.Close(nil)
		t.Error("it came back with a certificate of the old authority")
	}
	if _, err := rotationAgain(t, s); err != nil {
		t.Errorf("register anew: %v", err)
	}
}

// rotationAgain registers a host that knows today's authorities.
func rotationAgain(t *testing.T, s *testServer) (*simulatedAgent, error) {
	t.Helper()
	a := newSimulatedAgent(s)
	return a, a.register(t.Context(), s.newKey(t, s.token, 1), "anew")
}
