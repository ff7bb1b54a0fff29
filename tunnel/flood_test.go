package tunnel_test

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/tunnel"
	"github.com/postern-dev/postern/tunnel/tunneltest"
)

// rawUpgrade asks for a WebSocket and says no more; header are further lines.
func rawUpgrade(t *testing.T, url, header string) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", strings.TrimPrefix(url, "ws://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
	_, err = io.WriteString(c, "GET /tunnel HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+header+
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n")
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func status(t *testing.T, c net.Conn) int {
	t.Helper()
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode
}

// A tunnel that is up gets further lanes while strangers hold every place for a
// handshake, and only so many at once.
func TestFloodDoesNotKeepLanesOut(t *testing.T) {
	h := tunneltest.NewHost(t, tunneltest.WithServer(func(c *tunnel.ServerConfig) {
		c.MaxHandshakes, c.MaxHandshakesPerIP, c.HandshakeTimeout = 1, 1, time.Minute
	}))
	d, a := h.Dial(t)
	echoOn(t, a)
	echoOn(t, d)
	exchange(t, open(t, d, tunnel.Control), 100)
	for range 2 { // the second round takes what the first found held by the dial itself
		for range 12 { // one is let in, eight wait, the others are refused
			rawUpgrade(t, h.URL, "")
		}
		exchange(t, open(t, d, tunnel.Control), 100)
	}
	if got := status(t, rawUpgrade(t, h.URL, "")); got != http.StatusServiceUnavailable {
		t.Fatalf("the gate is not full: got %d", got)
	}
	began := time.Now()
	for _, class := range []tunnel.Class{tunnel.Bulk, tunnel.Solo, tunnel.Solo} {
		exchange(t, open(t, d, class), 1000)
		exchange(t, open(t, a, class), 1000)
	}
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("lanes took %s", took)
	}
	for name, header := range map[string]string{
		"another tunnel's id": "Postern-Tunnel: " + strings.Repeat("ab", 16) + "\r\n",
		"a long one":          "Postern-Tunnel: " + strings.Repeat("ab", 1000) + "\r\n",
		"no hex":              "Postern-Tunnel: " + strings.Repeat("xy", 16) + "\r\n",
		"nothing":             "Postern-Tunnel: \r\n",
	} {
		if got := status(t, rawUpgrade(t, h.URL, header)); got != http.StatusServiceUnavailable {
			t.Errorf("%s: got %d, want 503", name, got)
		}
	}
	const places = 8
	own := "Postern-Tunnel: " + d.ID() + "\r\n"
	for i := range places {
		if got := status(t, rawUpgrade(t, h.URL, own)); got != http.StatusSwitchingProtocols {
			t.Fatalf("place %d: got %d, want 101", i, got)
		}
	}
	if got := status(t, rawUpgrade(t, h.URL, own)); got != http.StatusServiceUnavailable {
		t.Errorf("one more than a tunnel's places: got %d, want 503", got)
	}
}
