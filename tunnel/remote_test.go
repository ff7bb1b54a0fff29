package tunnel_test

import (
	"net/http"
	"strings"
	"testing"

	"github.com/postern-dev/postern/tunnel"
	"github.com/postern-dev/postern/tunnel/tunneltest"
)

func TestRemoteAddr(t *testing.T) {
	for _, tc := range []struct{ name, says, want string }{
		{"another's", "198.51.100.7", "198.51.100.7"},
		{"the peer's", "127.0.0.1", "127.0.0.1:"},
		{"nonsense", "unknown", "127.0.0.1:"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, a := tunneltest.Pair(t, tunneltest.WithServer(func(c *tunnel.ServerConfig) {
				c.RemoteIP = func(*http.Request) string { return tc.says }
			}))
			if got := a.RemoteAddr().String(); !strings.HasPrefix(got, tc.want) {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}
