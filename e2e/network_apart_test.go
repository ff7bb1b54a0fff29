package e2e

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/e2e/netlab"
	"github.com/postern-dev/postern/e2e/nginxtest"
	"github.com/postern-dev/postern/e2e/stack"
	"github.com/postern-dev/postern/proto/regkey"
)

// TestStrangersBehindNginxHarmNobody: limits on failed attempts count each address
// on its own, also where all of them come through one nginx.
func TestStrangersBehindNginxHarmNobody(t *testing.T) {
	lab := netlab.Up(t, netlab.Options{})
	front := nginxtest.Start(t, nginxtest.Options{Netns: lab.Cloud, Listen: cloudAddress, Upstream: "127.0.0.1:8080"})
	s := newStack(t, stack.Options{Netns: lab.Cloud, Listen: "127.0.0.1:8080", URL: front.URL, CAFile: front.CAFile})
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	key, err := s.NewKey(ctx, "--uses", "3")
	if err != nil {
		t.Fatal(err)
	}

	// A stranger on the customer's side tries a key, and tokens until it is told to
	// stop.
	wrong, err := regkey.Parse(key)
	if err != nil {
		t.Fatal(err)
	}
	wrong.Secret[0] ^= 1
	stranger, err := s.NewAgent("stranger", "")
	if err != nil {
		t.Fatal(err)
	}
	stranger.Netns = lab.Customer
	if err := stranger.Register(ctx, wrong.Encode()); err == nil {
		t.Fatal("a stranger joined")
	}
	if log := s.ControlPlane.Log(); !strings.Contains(log, `msg="unknown registration key" remote=`+netlab.CustomerIP+"\n") {
		t.Errorf("the stranger is not known by its own address:\n%s", log)
	}
	outside := &http.Client{Transport: &http.Transport{TLSClientConfig: front.TLS(), DialContext: netlab.Dialer(lab.Customer)}}
	defer outside.CloseIdleConnections()
	status := 0
	for range 1000 {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.URL+"/api/v1/sql/host/db", strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer pst1_wrong")
		req.Header.Set("X-Forwarded-For", netlab.CloudIP) // and it lies about where it comes from
		resp, err := outside.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if status = resp.StatusCode; status != http.StatusUnauthorized {
			break
		}
	}
	if status != http.StatusTooManyRequests {
		t.Errorf("a stranger that tries tokens: got %d, want 429", status)
	}

	// Everybody else, in the cloud, is served meanwhile.
	a, err := s.NewAgent("host", sources(t, s))
	if err != nil {
		t.Fatal(err)
	}
	a.Netns = lab.Cloud
	if err := errors.Join(a.Register(ctx, key), a.Start(), a.Online(ctx)); err != nil {
		t.Fatal(err)
	}
	answers(t, s, "host/db", "select 1", "1")
}
