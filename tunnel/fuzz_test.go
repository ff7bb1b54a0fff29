package tunnel

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"testing"
	"testing/iotest"
	"time"

	"github.com/coder/websocket"
)

func FuzzHello(f *testing.F) {
	f.Add((&hello{major: 1, id: [16]byte{1}, class: Solo, opener: 1, rtt: time.Second, token: 7}).append(nil))
	f.Add((&answer{major: 1, code: RefusedLimit, maxStreams: 9, text: "too many"}).append(nil))
	f.Add([]byte{0, 1, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		m, err := readMessage(iotest.OneByteReader(r), maxHello)
		if err != nil {
			return
		}
		if len(m) > maxHello || len(b)-r.Len() != len(m)+2 {
			t.Fatalf("read %d of %d bytes for a message of %d", len(b)-r.Len(), len(b), len(m))
		}
		var h hello
		if h.decode(m) == nil {
			var again hello
			if err := again.decode(h.append(nil)[2:]); err != nil || again != h {
				t.Fatalf("%+v became %+v, %v", h, again, err)
			}
		}
		var a answer
		if a.decode(m) == nil {
			var again answer
			if err := again.decode(a.append(nil)[2:]); err != nil || again != a {
				t.Fatalf("%+v became %+v, %v", a, again, err)
			}
		}
	})
}

func FuzzMessage(f *testing.F) {
	for _, m := range []message{
		{typ: msgPing, nonce: 1},
		{typ: msgPong, nonce: 1 << 60},
		{typ: msgOpenLane, token: 3, class: Bulk},
		{typ: msgLaneFailed, token: 3, code: 5, text: "no"},
		{typ: msgGoAway, reconnectAfter: time.Second, deadline: time.Minute, text: "drain"},
		{typ: msgBye, code: 1, text: "bye"},
		{typ: msgRetire},
		{typ: 99},
	} {
		b := m.append(nil)
		f.Add(b[1], b[messageHeader:])
	}
	f.Fuzz(func(t *testing.T, typ byte, b []byte) {
		m := message{typ: messageType(typ)}
		if m.decode(b) != nil {
			return
		}
		enc := m.append(nil)
		again := message{typ: m.typ}
		if n := int(binary.BigEndian.Uint16(enc[2:])); n != len(enc)-messageHeader || n > maxMessage {
			t.Fatalf("length %d of %d", n, len(enc))
		}
		if err := again.decode(enc[messageHeader:]); err != nil || again != m {
			t.Fatalf("%+v became %+v, %v", m, again, err)
		}
	})
}

// fuzzLane is a lane of a tunnel that writes nowhere.
func fuzzLane(in io.Reader) *lane {
	cfg := Config{MaxStreams: 8, WindowBudget: 1 << 20}.withDefaults()
	t := newTunnel(&cfg, false, [16]byte{}, cfg.Logger)
	a, b := net.Pipe()
	_ = b.Close()
	l := newLane(t, Control, &wsConn{wire: newWire(a)}, nil)
	l.mux.inner = struct {
		io.Reader
		io.Writer
	}{in, io.Discard}
	t.control = l
	_ = t.addLane(l)
	return l
}

// FuzzMux feeds a peer's bytes to the layer between TLS and yamux. It must give
// the same result whatever the sizes of the reads, and stay within its bounds.
func FuzzMux(f *testing.F) {
	syn := appendYamux(nil, yamuxWindow, flagSYN, 1, 0)
	data := append(appendYamux(nil, yamuxData, 0, 1, 3), "abc"...)
	f.Add(append(append([]byte{}, syn...), data...))
	f.Add(append((&message{typ: msgPing, nonce: 5}).append(nil), appendYamux(nil, yamuxPing, flagSYN, 0, 1)...))
	f.Add(append(append([]byte{}, syn...), appendYamux(nil, yamuxData, flagFIN, 1, 1<<30)...))
	f.Add(appendYamux(nil, yamuxGoAway, 0, 0, 1))
	f.Fuzz(func(t *testing.T, b []byte) {
		whole := fuzzLane(bytes.NewReader(b))
		out1, err1 := io.ReadAll(whole.mux)
		single := fuzzLane(iotest.OneByteReader(bytes.NewReader(b)))
		out2, err2 := io.ReadAll(single.mux)
		if errors.Is(err1, ErrProtocol) != errors.Is(err2, ErrProtocol) {
			t.Fatalf("%v, by single bytes %v", err1, err2)
		}
		if err1 == nil && !bytes.Equal(out1, out2) {
			t.Fatalf("%x, by single bytes %x", out1, out2)
		}
		if n := whole.tunnel.inbound.Load(); n > 8 {
			t.Fatalf("%d streams", n)
		}
		for _, l := range []*lane{whole, single} {
			_ = l.tunnel.Close(nil)
			if n := l.tunnel.inbound.Load() + l.tunnel.opened.Load(); n != 0 {
				t.Fatalf("%d streams counted after the end", n)
			}
			if left := l.tunnel.windows.left; left != 1<<20 {
				t.Fatalf("window budget %d after the end", left)
			}
		}
	})
}

// FuzzFrames checks that the tracker finds the same frames whatever the sizes of
// the pieces.
func FuzzFrames(f *testing.F) {
	f.Add([]byte{0x82, 0x83, 1, 2, 3, 4, 'a', 'b', 'c'}, uint8(2))
	f.Add([]byte{0x82, 126, 0, 5, 1, 2, 3, 4, 5, 0x82, 0}, uint8(3))
	f.Add([]byte{0x82, 0xff, 0, 0, 0, 0, 0, 0, 0, 1, 9, 9, 9, 9, 1}, uint8(1))
	f.Fuzz(func(t *testing.T, b []byte, size uint8) {
		var a, c frameTracker
		a.advance(b)
		for rest := b; len(rest) > 0; {
			n := min(int(size)+1, len(rest))
			c.advance(rest[:n])
			rest = rest[n:]
		}
		if a.boundary() != c.boundary() || a.left != c.left || a.n != c.n {
			t.Fatalf("%+v, in pieces %+v", a, c)
		}
	})
}

// FuzzWebSocket lets the adapter read arbitrary bytes of a peer.
func FuzzWebSocket(f *testing.F) {
	f.Add([]byte{0x82, 0x83, 0, 0, 0, 0, 'a', 'b', 'c'})
	f.Add([]byte{0x89, 0x80, 0, 0, 0, 0, 0x88, 0x82, 0, 0, 0, 0, 3, 0xe8})
	f.Add([]byte{0x02, 0x81, 0, 0, 0, 0, 'a', 0x80, 0x81, 0, 0, 0, 0, 'b'})
	f.Add([]byte{0x82, 0xff, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		ours, theirs := net.Pipe()
		go func() {
			_, _ = theirs.Write(b)
			_ = theirs.Close()
		}()
		go func() { _, _ = io.Copy(io.Discard, theirs) }()
		w := newWire(ours)
		w.startFrames(nil)
		rec := &hijackRecorder{ResponseRecorder: httptest.NewRecorder(), wire: w}
		req := httptest.NewRequest(http.MethodGet, "/tunnel", nil)
		req.Header = http.Header{"Connection": {"Upgrade"}, "Upgrade": {"websocket"}, "Sec-Websocket-Version": {"13"}, "Sec-Websocket-Key": {"AAAAAAAAAAAAAAAAAAAAAA=="}}
		ws, err := websocket.Accept(rec, req, &websocket.AcceptOptions{OnPingReceived: ignorePing})
		if err != nil {
			t.Fatal(err)
		}
		c := newWSConn(ws, w, false)
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		n, err := io.Copy(io.Discard, c)
		if n > int64(len(b)) {
			t.Fatalf("%d bytes out of %d", n, len(b))
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal("stuck")
		}
		_ = c.Close()
	})
}

type hijackRecorder struct {
	*httptest.ResponseRecorder
	wire *wire
}

func (h *hijackRecorder) Hijack() (net.Conn, *bufioReadWriter, error) {
	return h.wire, smallBuffers(h.wire), nil
}

// FuzzEndpoint sends arbitrary bytes to the whole endpoint before any
// authentication: HTTP, WebSocket and TLS.
func FuzzEndpoint(f *testing.F) {
	const upgrade = "GET /tunnel HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
	f.Add([]byte(upgrade), false)
	f.Add([]byte(upgrade+"\x82\x85\x00\x00\x00\x00\x16\x03\x01\x00\x05"), false)
	f.Add([]byte{0x16, 0x03, 0x01, 0x02, 0x00, 1, 0, 1, 0xfc}, true)
	ca := newFuzzCA(f)
	f.Fuzz(func(t *testing.T, b []byte, upgraded bool) {
		s := NewServer(ServerConfig{TLS: ca, HandshakeTimeout: 5 * time.Second, Handler: func(*Tunnel) { panic("a tunnel without authentication") }})
		ln := &oneConnListener{conns: make(chan net.Conn, 1), done: make(chan struct{})}
		srv := &http.Server{Handler: s, ErrorLog: discardLog()}
		go func() { _ = srv.Serve(ln) }()
		ours, theirs := net.Pipe()
		ln.conns <- theirs
		got := make(chan struct{})
		go func() { defer close(got); _, _ = io.Copy(io.Discard, ours) }()
		_ = ours.SetWriteDeadline(time.Now().Add(5 * time.Second))
		if upgraded {
			_, _ = io.WriteString(ours, upgrade)
			b = append([]byte{0x82, 0xfe, byte(len(b) >> 8), byte(len(b)), 0, 0, 0, 0}, b...)
		}
		_, _ = ours.Write(b)
		_ = ours.Close()
		<-got
		_ = srv.Close()
		s.Close()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		for len(s.all()) > 0 {
			if ctx.Err() != nil {
				t.Fatal("tunnels left")
			}
		}
	})
}
