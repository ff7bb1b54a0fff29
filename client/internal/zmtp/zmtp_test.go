package zmtp

import (
	"fmt"
	"net"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// libzmq is the other end: what Jupyter's clients are made with.
const libzmq = `
import sys, zmq
shell, iopub, hb, ipc = sys.argv[1:]
c = zmq.Context()
d = c.socket(zmq.DEALER); d.identity = b"me"; d.connect(shell)
d2 = c.socket(zmq.DEALER); d2.connect(ipc)
s = c.socket(zmq.SUB); s.subscribe(b"yes"); s.connect(iopub)
r = c.socket(zmq.REQ); r.connect(hb)
for k in (d, d2, s, r): k.rcvtimeo = 20000; k.linger = 0
r.send(b"ping"); assert r.recv() == b"ping"
for size in (0, 1, 255, 256, 70000, 5 << 20):
    d.send_multipart([b"one", b"x" * size, b""]); got = d.recv_multipart()
    assert got == [b"re", b"one", b"x" * size, b""], size
d2.send_multipart([b"ipc"]); assert d2.recv_multipart() == [b"re", b"ipc"]
d.send(b"publish"); d.recv_multipart()
for i in range(5000):
    got = s.recv_multipart(); assert got == [b"yes.%d" % i, b"y" * 2000], (i, got[0])
s.unsubscribe(b"yes"); s.subscribe(b"")
print("done")
`

func endpoint(t *testing.T, s *socket) string {
	t.Helper()
	if a, ok := s.listener.Addr().(*net.TCPAddr); ok {
		return fmt.Sprintf("tcp://%s", a)
	}
	return "ipc://" + s.listener.Addr().String()
}

func TestLibzmqTalksToIt(t *testing.T) {
	pub, err := NewPub("tcp://127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer pub.Close()
	var router, local *Router
	take := func(r **Router) func(string, [][]byte) {
		return func(identity string, frames [][]byte) {
			if string(frames[0]) == "publish" {
				<-pub.Joined()
				for i := range 5000 {
					pub.Send([][]byte{[]byte("no"), nil})
					pub.Send([][]byte{[]byte(fmt.Sprintf("yes.%d", i)), []byte(strings.Repeat("y", 2000))})
				}
			}
			(*r).Send(identity, append([][]byte{[]byte("re")}, frames...))
			(*r).Send("nobody", frames)
		}
	}
	if router, err = NewRouter("tcp://127.0.0.1:0", take(&router)); err != nil {
		t.Fatal(err)
	}
	defer router.Close()
	path := t.TempDir() + "/s"
	if local, err = NewRouter("ipc://"+path, take(&local)); err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	echo, err := NewEcho("tcp://127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer echo.Close()
	if _, err := NewRouter("ipc://"+path, nil); err == nil {
		t.Error("a second socket at one path")
	}
	out, err := exec.CommandContext(t.Context(), "/usr/bin/python3", "-c", libzmq, endpoint(t, &router.socket), endpoint(t, &pub.socket), endpoint(t, &echo.socket), endpoint(t, &local.socket)).CombinedOutput()
	if err != nil || strings.TrimSpace(string(out)) != "done" {
		t.Fatalf("%v\n%s", err, out)
	}
}

func TestNonsenseIsTurnedAway(t *testing.T) {
	took := make(chan struct{}, 1)
	r, err := NewRouter("tcp://127.0.0.1:0", func(string, [][]byte) { took <- struct{}{} })
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	greeting := "\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x00NULL" + strings.Repeat("\x00", 48)
	ready := "\x04\x06\x05READY"
	for name, bytes := range map[string]string{
		"HTTP":               "GET / HTTP/1.1\r\nHost: x\r\n\r\n" + strings.Repeat(" ", 64),
		"ZMTP 2":             strings.Replace(greeting, "\x7f\x03", "\x7f\x01", 1),
		"security":           strings.Replace(greeting, "NULL\x00", "CURVE", 1),
		"no READY":           greeting + "\x00\x01x",
		"a huge command":     greeting + "\x06\x7f\xff\xff\xff\xff\xff\xff\xff",
		"a cut property":     greeting + "\x04\x0b\x05READY\x08Iden",
		"a huge frame":       greeting + ready + "\x02\x7f\xff\xff\xff\xff\xff\xff\xff",
		"an empty command":   greeting + ready + "\x04\x00",
		"frames without end": greeting + ready + strings.Repeat("\x01\x00", MaxFrames+1),
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := net.Dial("tcp", r.listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			go conn.Write([]byte(bytes)) //nolint:errcheck // it may be cut off
			conn.SetReadDeadline(time.Now().Add(time.Minute))
			buffer := make([]byte, 4096)
			for {
				if _, err := conn.Read(buffer); err != nil {
					if timeout, ok := err.(net.Error); ok && timeout.Timeout() {
						t.Error("the connection stays")
					}
					break
				}
			}
		})
	}
	select {
	case <-took:
		t.Error("a message came of nonsense")
	default:
	}
}

func FuzzPeer(f *testing.F) {
	f.Add([]byte("\x01\x01a\x00\x01b"))
	f.Add([]byte("\x04\x07\x04PING\x00\x00"))
	f.Add([]byte("\x02\x00\x00\x00\x00\x00\x00\x00\x01x"))
	f.Fuzz(func(t *testing.T, data []byte) {
		here, there := net.Pipe()
		defer here.Close()
		done := make(chan struct{})
		go func() { defer close(done); there.Write(data); there.Close() }()
		p := newPeer(here)
		for {
			frames, err := p.message(nil)
			if err != nil {
				break
			}
			if len(frames) == 0 || len(frames) > MaxFrames {
				t.Errorf("%d frames", len(frames))
			}
		}
		here.Close()
		<-done
	})
}
