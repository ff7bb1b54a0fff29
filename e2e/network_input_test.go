package e2e

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/postern-dev/postern/e2e/stack"
)

// TestBadInputAtThePublicPort sends what no client of ours would. Each gets the
// right status and one clear line; nothing is changed by it, and the control
// plane goes on serving.
func TestBadInputAtThePublicPort(t *testing.T) {
	s := newStack(t, stack.Options{})
	token := adminToken(t, s)
	before := everything(t, s)
	const sql = "POST /api/v1/sql/host/db HTTP/1.1\r\n"
	bearer := "Host: x\r\nAuthorization: Bearer " + token + "\r\n"
	rpc := "POST /postern.v1.TokenService/CreateToken HTTP/1.1\r\n" + bearer
	body := func(kind, text string) string {
		return fmt.Sprintf("Content-Type: %s\r\nContent-Length: %d\r\n\r\n%s", kind, len(text), text)
	}
	const big = 6 << 20
	for _, tc := range []struct {
		name, send string
		status     int
		says       string // in the line
	}{
		{"garbage", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 no HTTP at all\r\n\r\n", 400, ""},
		{"a request line without end", "GET /" + strings.Repeat("a", 100<<10), 431, ""},
		{"an oversized header", "GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("a", 80<<10) + "\r\n\r\n", 431, ""},
		{"thousands of headers", "GET /healthz HTTP/1.1\r\nHost: x\r\n" + strings.Repeat("X: a\r\n", 20_000) + "\r\n", 431, ""},
		{"a header with a NUL", "GET /healthz HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n", 400, ""},
		{"two lengths", "POST /api/v1/sql/host/db HTTP/1.1\r\n" + bearer + "Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc", 400, ""},
		{"no token", sql + "Host: x\r\n" + body("application/json", `{"sql":"select 1"}`), 401, "no API token"},
		{"a garbled token", sql + "Host: x\r\nAuthorization: Bearer \xff\xfe\r\n" + body("application/json", `{"sql":"select 1"}`), 401, "token"},
		{"an unknown path", "GET /nowhere HTTP/1.1\r\n" + bearer + "\r\n", 404, "no such path"},
		{"a wrong method", "DELETE /api/v1/sql/host/db HTTP/1.1\r\n" + bearer + "\r\n", 405, "use POST"},
		{"SQL: malformed JSON", sql + bearer + body("application/json", `{"sql": "select 1`), 400, "JSON"},
		{"SQL: another type", sql + bearer + body("application/json", `[1,2,3]`), 400, "JSON"},
		{"SQL: an unknown field", sql + bearer + body("application/json", `{"sql":"select 1","nope":1}`), 400, "nope"},
		{"SQL: binary zeros", sql + bearer + body("application/json", strings.Repeat("\x00", 1000)), 400, "JSON"},
		{"SQL: deep nesting", sql + bearer + body("application/json", `{"sql":`+strings.Repeat("[", 100_000)), 400, ""},
		{"SQL: empty", sql + bearer + body("application/json", `{}`), 400, "empty"},
		{"SQL: a body over the limit", sql + bearer + body("application/json", `{"sql":"`+strings.Repeat("x", big)+`"}`), 413, "more than"},
		{"SQL: an unknown format", "POST /api/v1/sql/host/db?format=xml HTTP/1.1\r\n" + bearer + body("application/json", `{"sql":"select 1"}`), 400, "xml"},
		{"SQL: no such agent", sql + bearer + body("application/json", `{"sql":"select 1"}`), 404, ""},
		{"RPC: malformed JSON", rpc + body("application/json", `{"name": `), 400, ""},
		{"RPC: an unknown role", rpc + body("application/json", `{"name":"x","role":"emperor"}`), 400, "role"},
		{"RPC: malformed protobuf", rpc + body("application/proto", "\x0a\xff\xff\xff\xff\x0f"), 400, ""},
		{"RPC: invalid UTF-8 in protobuf", rpc + body("application/proto", "\x0a\x02\xff\xfe"), 400, ""},
		{"RPC: a malformed gRPC frame", rpc + body("application/grpc-web+proto", "\x00\x7f\xff\xff\xffabc"), 200, ""}, // the status is in its trailer
		{"RPC: another content type", rpc + body("text/plain", "hello"), 415, ""},
		{"RPC: a body over the limit", rpc + body("application/json", `{"name":"`+strings.Repeat("x", big)+`"}`), 429, ""},
		{"RPC: unknown", "POST /postern.v1.TokenService/Nope HTTP/1.1\r\n" + bearer + body("application/json", "{}"), 404, ""},
		{"tunnel: no WebSocket", "GET /tunnel HTTP/1.1\r\nHost: x\r\n\r\n", 426, ""},
		{"tunnel: POST", "POST /tunnel HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", 426, ""},
		{"tunnel: an old WebSocket", "GET /tunnel HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 8\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n", 400, ""},
		{"tunnel: a bad key", "GET /tunnel HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: no\r\n\r\n", 400, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			status, text := raw(t, s.Listen, tc.send)
			if status != tc.status {
				t.Errorf("got %d, want %d: %.300s", status, tc.status, text)
			}
			if strings.Count(strings.TrimSpace(text), "\n") > 0 || len(text) > 1000 {
				t.Errorf("more than one clear line: %.300q", text)
			}
			if !strings.Contains(text, tc.says) {
				t.Errorf("got %q, want %q in it", text, tc.says)
			}
			for _, leak := range []string{"goroutine ", ".go:", "panic", token} {
				if strings.Contains(text, leak) {
					t.Errorf("the answer has %q in it: %.300s", leak, text)
				}
			}
		})
	}
	t.Run("in the tunnel's handshake", func(t *testing.T) { badHandshakes(t, s) })
	if after := everything(t, s); after != before {
		t.Errorf("something was changed:\nbefore: %s\nafter: %s", before, after)
	}
	if log := s.ControlPlane.Log(); strings.Contains(log, "panic") || strings.Contains(log, "goroutine ") {
		t.Error("the control plane's log has a panic in it")
	}
	if resp := get(t, "http://"+s.Listen+"/readyz"); resp != http.StatusOK {
		t.Errorf("/readyz: got %d", resp)
	}
}

// badHandshakes goes wrong at each step of the tunnel's endpoint. The connection
// ends each time; nobody waits for it.
func badHandshakes(t *testing.T, s *stack.Stack) {
	url := "ws://" + s.Listen + "/tunnel"
	dial := func(t *testing.T) (*websocket.Conn, context.Context) {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		t.Cleanup(cancel)
		conn, _, err := websocket.Dial(ctx, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.CloseNow() })
		conn.SetReadLimit(1 << 20)
		return conn, ctx
	}
	ends := func(t *testing.T, conn *websocket.Conn, ctx context.Context) {
		t.Helper()
		for {
			if _, _, err := conn.Read(ctx); err != nil {
				if ctx.Err() != nil {
					t.Error("the connection does not end")
				}
				return
			}
		}
	}
	for name, messages := range map[string][]string{
		"bytes that are no TLS":  {"hello, is this a tunnel?"},
		"a broken ClientHello":   {"\x16\x03\x01\x00\x05\x01\x00\x00\xff\xff"},
		"a message over 1 MiB":   {strings.Repeat("x", 1<<20+1)},
		"thousands of tiny ones": slicesOf("\x16", 5000),
	} {
		t.Run(name, func(t *testing.T) {
			conn, ctx := dial(t)
			for _, m := range messages {
				if err := conn.Write(ctx, websocket.MessageBinary, []byte(m)); err != nil {
					break // it has ended
				}
			}
			ends(t, conn, ctx)
		})
	}
	t.Run("a text message", func(t *testing.T) {
		conn, ctx := dial(t)
		if err := conn.Write(ctx, websocket.MessageText, []byte("hello")); err != nil {
			t.Fatal(err)
		}
		ends(t, conn, ctx)
	})
	t.Run("a frame with reserved bits", func(t *testing.T) {
		conn, err := net.Dial("tcp", s.Listen)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(2 * time.Minute))
		io.WriteString(conn, upgrade+"\xf2\xff\xff\xff\xff\xff\xff\xff\xff\xff")
		if _, err := io.Copy(io.Discard, conn); os.IsTimeout(err) {
			t.Error("the connection does not end")
		}
	})
	for name, tc := range map[string]struct {
		change func(*tls.Config)
		hello  string
	}{
		"another protocol":         {change: func(c *tls.Config) { c.NextProtos = []string{"h2"} }},
		"no protocol":              {change: func(c *tls.Config) { c.NextProtos = nil }},
		"TLS 1.2":                  {change: func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }},
		"a stranger's certificate": {change: func(c *tls.Config) { c.Certificates = []tls.Certificate{stranger(t)} }},
		"a malformed hello":        {hello: "\x00\x05abcde"},
		"a hello that is too long": {hello: "\xff\xff" + strings.Repeat("a", 4096)},
		"another version":          {hello: "\x00\x1c\x63" + strings.Repeat("\x00", 27)},
		"a lane of no tunnel":      {hello: "\x00\x1c\x01\x00" + strings.Repeat("\x07", 16) + "\x01\x00" + strings.Repeat("\x00", 8)},
	} {
		t.Run(name, func(t *testing.T) {
			conn, ctx := dial(t)
			inner := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"postern/1"}} // a stranger trusts anybody
			if tc.change != nil {
				tc.change(inner)
			}
			c := tls.Client(websocket.NetConn(ctx, conn, websocket.MessageBinary), inner)
			err := c.HandshakeContext(ctx)
			if err == nil {
				io.WriteString(c, tc.hello)
				var answer []byte
				answer, err = io.ReadAll(c)
				if len(answer) > 1024 {
					t.Errorf("%d bytes of answer", len(answer))
				}
			}
			if ctx.Err() != nil {
				t.Errorf("the connection does not end: %v", err)
			}
		})
	}
}

// upgrade asks for a WebSocket on the tunnel's endpoint.
const upgrade = "GET /tunnel HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" +
	"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"

func slicesOf(s string, n int) []string {
	all := make([]string, n)
	for i := range all {
		all[i] = s
	}
	return all
}

// stranger is a certificate of nobody's.
func stranger(t *testing.T) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// raw sends bytes and returns the answer's status and body.
func raw(t *testing.T, address, send string) (int, string) {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(2 * time.Minute))
	sent := make(chan struct{})
	go func() { // the answer may come before all was sent
		defer close(sent)
		io.WriteString(conn, send)
	}()
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatalf("no answer: %v", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err != nil {
		t.Errorf("the answer breaks off: %v", err)
	}
	conn.Close()
	<-sent
	return resp.StatusCode, string(body)
}

func get(t *testing.T, url string) int {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer http.DefaultClient.CloseIdleConnections()
	defer resp.Body.Close()
	io.Copy(io.Discard, resp.Body)
	return resp.StatusCode
}

func adminToken(t *testing.T, s *stack.Stack) string {
	t.Helper()
	token, err := os.ReadFile(s.TokenFile)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(token))
}

// everything is what the control plane keeps for its users, without the times at
// which tokens were used.
func everything(t *testing.T, s *stack.Stack) string {
	t.Helper()
	var all []string
	for _, args := range [][]string{{"token", "list"}, {"key", "list"}, {"agent", "list"}, {"query", "list"}, {"audit", "list"}} {
		text, err := s.Postern(t.Context(), append(args, "-o", "json")...)
		if err != nil {
			t.Fatal(err)
		}
		var value any
		if err := json.Unmarshal([]byte(text), &value); err != nil {
			t.Fatalf("%v: %v: %s", args, err, text)
		}
		forget(value, "lastUsed")
		plain, err := json.Marshal(value)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, string(plain))
	}
	return strings.Join(all, "\n")
}

// forget removes a key everywhere in a JSON value.
func forget(value any, key string) {
	switch v := value.(type) {
	case map[string]any:
		delete(v, key)
		for _, inner := range v {
			forget(inner, key)
		}
	case []any:
		for _, inner := range v {
			forget(inner, key)
		}
	}
}
