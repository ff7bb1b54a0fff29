package main

import (
	"net/url"

	"golang.org/x/net/http/httpproxy"

	"github.com/postern-dev/postern/agentd/config"
	"github.com/postern-dev/postern/agentd/egress"
)

// newEgress makes what requests to one destination go through: a process of their own without
// rights. executable is for tests; "" means this program. The caller owes a Close.
func newEgress(executable string, c *config.Config, e egress.Config) *egress.Client {
	e.Executable, e.UID = executable, c.SQL.UIDBase+egress.UIDs
	return egress.New(e)
}

// proxyFor is the proxy that the tunnel is dialed through, too: the configuration's, else the environment's.
func proxyFor(c *config.Config) func(*url.URL) (*url.URL, error) {
	if c.Proxy != nil {
		return func(to *url.URL) (*url.URL, error) { return c.Proxy(to) }
	}
	return httpproxy.FromEnvironment().ProxyFunc()
}
