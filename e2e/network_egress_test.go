package e2e

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/postern-dev/postern/e2e/netlab"
	"github.com/postern-dev/postern/e2e/nginxtest"
	"github.com/postern-dev/postern/e2e/stack"
)

const (
	proxyUser = "scott"
	// A password that has to be escaped in a URL.
	proxyPassword        = "t1ger-in-the-tank"
	cloudPort            = ":8443"
	cloudAddress         = netlab.CloudIP + cloudPort
	proxyCredentials     = proxyUser + ":" + proxyPassword
	wrongProxyPassword   = "wr0ng-proxy-password"
	wrongProxyCredential = proxyUser + ":" + wrongProxyPassword
)

// cloudStack starts a control plane in the lab's cloud: over TLS under a CA of its
// own, or plain.
func cloudStack(t *testing.T, lab *netlab.Lab, secure bool) *stack.Stack {
	t.Helper()
	o := stack.Options{Netns: lab.Cloud, Listen: cloudAddress}
	if secure {
		dir := t.TempDir()
		if _, err := nginxtest.WriteCertificates(dir, netlab.CloudIP); err != nil {
			t.Fatal(err)
		}
		o.Args = []string{"--tls-cert", filepath.Join(dir, "fullchain.pem"), "--tls-key", filepath.Join(dir, "key.pem")}
		o.URL, o.CAFile = "https://"+cloudAddress, filepath.Join(dir, "ca.pem")
	}
	return newStack(t, o)
}

// TestOutboundOnly runs the whole job on a host that can be reached from nowhere:
// join, query, cancel, a link that goes silent and comes back. Nothing on the host
// listens.
func TestOutboundOnly(t *testing.T) {
	for _, tc := range []struct {
		name   string
		secure bool
		lab    netlab.Options
		env    []string
	}{
		{name: "direct, https", secure: true},
		{name: "through a proxy with a password, https", secure: true, lab: netlab.Options{Egress: netlab.Proxy, Auth: proxyCredentials, Ports: []int{8443}}, env: []string{"HTTPS_PROXY=" + netlab.ProxyURL(proxyCredentials)}},
		{name: "through a proxy with a password, http", lab: netlab.Options{Egress: netlab.Proxy, Auth: proxyCredentials}, env: []string{"HTTP_PROXY=" + netlab.ProxyURL(proxyCredentials)}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			lab := netlab.Up(t, tc.lab)
			s := cloudStack(t, lab, tc.secure)
			a := joinWith(t, s, "host", func(a *stack.Agent) { a.Netns, a.Env = lab.Customer, tc.env })
			answers(t, s, "host/db", "select 6 * 7 as answer", "42")
			if tc.lab.Egress == netlab.Proxy && !strings.Contains(lab.ProxyLog(), "CONNECT "+cloudAddress) {
				t.Errorf("it did not go through the proxy:\n%s", lab.ProxyLog())
			}
			cancelReachesTheDatabase(t, s)
			nobodyListens(t, lab)
			cutIsNoticedAndMended(t, s, lab, a)
			controlPlaneDies(t, s, "host")
			nobodyListens(t, lab)
			if strings.Contains(a.Process.Log()+s.ControlPlane.Log(), proxyPassword) {
				t.Error("the proxy's password is in a log")
			}
		})
	}
}

// cancelReachesTheDatabase cancels a query by its id and wants the database to
// know.
func cancelReachesTheDatabase(t *testing.T, s *stack.Stack) {
	t.Helper()
	const mark = "cancel-me"
	q := startSQL(t, s, "host/db", "select pg_sleep(300) /* "+mark+" */")
	underWay(t, mark, 1)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	list, err := s.Postern(ctx, "query", "list", "-o", "json")
	if err != nil {
		t.Fatal(err)
	}
	id := runningQuery(t, list, mark)
	if _, err := s.Postern(ctx, "query", "cancel", id); err != nil {
		t.Fatal(err)
	}
	code, said := q.exit(t, 10*time.Second)
	if code != 1 || !strings.Contains(said, "cancel") {
		t.Errorf("a cancelled query: got exit code %d, %q", code, said)
	}
	underWay(t, mark, 0)
}

// nobodyListens wants no listening TCP socket on the customer's side.
func nobodyListens(t *testing.T, lab *netlab.Lab) {
	t.Helper()
	addresses, err := netlab.ListeningTCP(lab.Customer)
	if err != nil || len(addresses) > 0 {
		t.Errorf("on the host listen %v, %v", addresses, err)
	}
}

const (
	// noticed bounds how long a dead peer may look alive: 6 s are promised, the
	// rest is for a busy machine.
	noticed = 8 * time.Second
	// patience is for what has no promise here.
	patience = 60 * time.Second
)

// cutIsNoticedAndMended lets the link go silent under a query and come back.
func cutIsNoticedAndMended(t *testing.T, s *stack.Stack, lab *netlab.Lab, a *stack.Agent) {
	t.Helper()
	const mark = "cut-me"
	q := startSQL(t, s, "host/db", "select pg_sleep(300) /* "+mark+" */")
	underWay(t, mark, 1)
	if err := lab.Cut(); err != nil {
		t.Fatal(err)
	}
	took := eventually(t, patience, "the control plane to see the agent offline", online(t, s, a.Name, false))
	t.Logf("a silent link noticed by the control plane after %.1f s", took.Seconds())
	if took > noticed {
		t.Errorf("a silent link was noticed only after %s", took)
	}
	code, said := q.exit(t, noticed)
	if code != 5 || !oneClearLine(said) || !strings.Contains(said, "host") {
		t.Errorf("the query under way: got exit code %d, %q", code, said)
	}
	t.Logf("the query under way ended with: %s", strings.TrimSpace(said))
	// Across the cut, the host ends the statement by itself.
	gone := underWay(t, mark, 0)
	t.Logf("the host ended its statement %.1f s later", gone.Seconds())
	if err := lab.Heal(); err != nil {
		t.Fatal(err)
	}
	back := eventually(t, patience, "the agent to be back", online(t, s, a.Name, true))
	t.Logf("back %.1f s after the link was mended", back.Seconds())
	answers(t, s, "host/db", "select 'back'", "back")
}

func oneClearLine(said string) bool {
	said = strings.TrimSpace(said)
	return said != "" && !strings.Contains(said, "\n") && !strings.Contains(said, "goroutine")
}

// TestProxyRefusals: each way of being refused by a proxy is one clear line, and
// never has the password in it.
func TestProxyRefusals(t *testing.T) {
	lab := netlab.Up(t, netlab.Options{Egress: netlab.Proxy, Auth: proxyCredentials, Ports: []int{8443}})
	s := cloudStack(t, lab, true)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	key, err := s.NewKey(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex // guards s.Agents
	t.Run("refusals", func(t *testing.T) {
		for _, tc := range []struct {
			name  string
			proxy string
			url   string
			want  []string // in the line
		}{
			{"no credentials", netlab.ProxyURL(""), "", []string{"407", "proxy", "HTTPS_PROXY"}},
			// tinyproxy says 401 to wrong credentials, where others say 407.
			{"wrong credentials", netlab.ProxyURL(wrongProxyCredential), "", []string{"407", "proxy", "HTTPS_PROXY"}},
			{"a port that the proxy does not allow", netlab.ProxyURL(proxyCredentials), "https://" + netlab.CloudIP + ":22", []string{"403", "proxy"}},
			{"no proxy there", "http://" + proxyCredentials + "@10.78.0.1:9", "", []string{"proxy", "10.78.0.1:9"}},
		} {
			t.Run(tc.name, func(t *testing.T) {
				t.Parallel()
				mu.Lock()
				a, err := s.NewAgent(strings.ReplaceAll(tc.name, " ", "-"), "")
				mu.Unlock()
				if err != nil {
					t.Fatal(err)
				}
				a.Netns, a.Env = lab.Customer, []string{"HTTPS_PROXY=" + tc.proxy}
				if tc.url != "" {
					a.URL = tc.url
				}
				err = a.Register(ctx, key)
				if err == nil {
					t.Fatal("it joined")
				}
				// The error has the command's own line and what it printed.
				_, said, _ := strings.Cut(err.Error(), "exit status 1: ")
				t.Log(said)
				if !oneClearLine(said) {
					t.Errorf("not one clear line: %v", err)
				}
				for _, want := range tc.want {
					if !strings.Contains(said, want) {
						t.Errorf("%q is not in it", want)
					}
				}
				for _, secret := range []string{proxyPassword, wrongProxyPassword, key} {
					if strings.Contains(err.Error(), secret) {
						t.Errorf("a secret is in it")
					}
				}
			})
		}
	})
	t.Run("a key's use is not lost by all this", func(t *testing.T) {
		a, err := s.NewAgent("host", sources(t, s))
		if err != nil {
			t.Fatal(err)
		}
		a.Netns, a.Env = lab.Customer, []string{"HTTPS_PROXY=" + netlab.ProxyURL(proxyCredentials)}
		if err := errors.Join(a.Register(ctx, key), a.Start(), a.Online(ctx)); err != nil {
			t.Fatal(err)
		}
		answers(t, s, "host/db", "select 1", "1")
	})
	t.Run("wrong credentials of one that runs", func(t *testing.T) {
		a := s.Agents[len(s.Agents)-1]
		if err := a.Process.Stop(patience); err != nil {
			t.Fatal(err)
		}
		a.Env = []string{"HTTPS_PROXY=" + netlab.ProxyURL(wrongProxyCredential)}
		if err := a.Start(); err != nil {
			t.Fatal(err)
		}
		var line string
		eventually(t, patience, "a line about the proxy", func() error {
			for l := range strings.Lines(a.Process.Log()) {
				if strings.Contains(l, "level=WARN") && strings.Contains(l, "407") && strings.Contains(l, "HTTPS_PROXY") {
					line = l
					return nil
				}
			}
			return fmt.Errorf("nothing so far")
		})
		t.Log(strings.TrimSpace(line))
		status, err := a.Run(ctx, "", "status", "--state", a.StateDir(), "--runtime", filepath.Join(a.Dir(), "run"))
		t.Logf("agentd status: %s %v", status, err)
		if strings.Contains(a.Process.Log()+status, wrongProxyPassword) {
			t.Error("the proxy's password is in the log or the status")
		}
	})
}
