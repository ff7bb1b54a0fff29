package nginxtest

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
)

// behind starts a handler and nginx before it.
func behind(t *testing.T, h http.HandlerFunc) (*Server, *http.Client) {
	t.Helper()
	upstream := httptest.NewServer(h)
	t.Cleanup(upstream.Close)
	s := Start(t, Options{Upstream: strings.TrimPrefix(upstream.URL, "http://")})
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: s.TLS()}, Timeout: 20 * time.Second}
	t.Cleanup(client.CloseIdleConnections)
	return s, client
}

func TestRequestsCarryWhereTheyComeFrom(t *testing.T) {
	s, client := behind(t, func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, r.Host+" "+r.Header.Get("X-Forwarded-For")+" "+r.Header.Get("Upgrade"))
	})
	resp, err := client.Get(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	if want := strings.TrimPrefix(s.URL, "https://") + " 127.0.0.1 "; string(body) != want {
		t.Errorf("got %q, want %q", body, want)
	}
}

func TestWebSocketsPass(t *testing.T) {
	s, client := behind(t, func(w http.ResponseWriter, r *http.Request) {
		conn, err := websocket.Accept(w, r, nil)
		if err != nil {
			return
		}
		defer conn.CloseNow()
		kind, word, err := conn.Read(r.Context())
		if err == nil {
			conn.Write(r.Context(), kind, word)
		}
		conn.Close(websocket.StatusNormalClosure, "")
	})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	conn, _, err := websocket.Dial(ctx, s.URL, &websocket.DialOptions{HTTPClient: client})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.CloseNow()
	if err := conn.Write(ctx, websocket.MessageBinary, []byte("hello")); err != nil {
		t.Fatal(err)
	}
	if _, word, err := conn.Read(ctx); err != nil || string(word) != "hello" {
		t.Errorf("got %q, %v", word, err)
	}
}

// TestRowsAreNotHeldBack: what the control plane has written is there at once,
// before the response ends.
func TestRowsAreNotHeldBack(t *testing.T) {
	goOn := make(chan struct{})
	s, client := behind(t, func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, "first")
		http.NewResponseController(w).Flush()
		<-goOn
		io.WriteString(w, "last")
	})
	resp, err := client.Get(s.URL)
	if err != nil {
		close(goOn)
		t.Fatal(err)
	}
	defer resp.Body.Close()
	first := make([]byte, 5)
	_, err = io.ReadFull(resp.Body, first)
	close(goOn)
	rest, _ := io.ReadAll(resp.Body)
	if err != nil || string(first) != "first" || string(rest) != "last" {
		t.Errorf("got %q, %v, then %q", first, err, rest)
	}
}

func TestBodiesUpToTheControlPlanesLimitPass(t *testing.T) {
	s, client := behind(t, func(w http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body)
		if n != 5<<20 {
			w.WriteHeader(http.StatusTeapot)
		}
	})
	resp, err := client.Post(s.URL, "text/plain", strings.NewReader(strings.Repeat("x", 5<<20)))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Errorf("got %s", resp.Status)
	}
}
