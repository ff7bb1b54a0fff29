package zmtp

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// libzmq runs a program with pyzmq; "S(kind, name)" in it binds a socket in the
// test's directory. It returns a function that dials one, and the lines that the
// program prints. The program ends with its standard input.
func libzmq(t *testing.T, program string) (dial func(name string, kind Kind, identity string) *Conn, lines *bufio.Scanner) {
	t.Helper()
	dir := t.TempDir()
	c := exec.Command("/usr/bin/python3", "-c", `
import sys,os,threading,zmq
os.chdir(sys.argv[1])
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
ctx=zmq.Context()
def S(kind,name):
    s=ctx.socket(kind); s.linger=0; s.bind('ipc://'+name); return s
`+program, dir)
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	c.Stderr = &stderr
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = in.Close()
		_ = c.Wait()
		if t.Failed() {
			t.Logf("python said: %s", stderr.String())
		}
	})
	lines = bufio.NewScanner(out)
	if !lines.Scan() || lines.Text() != "ready" {
		t.Fatalf("python said %q, %s", lines.Text(), stderr.String())
	}
	return func(name string, kind Kind, identity string) *Conn {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		raw, err := net.Dial("unix", filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		conn, err := New(ctx, raw, kind, identity, 64<<20)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		return conn
	}, lines
}

func TestRealDealer(t *testing.T) {
	dial, lines := libzmq(t, `
r=S(zmq.ROUTER,'r'); print('ready',flush=True)
while True:
    m=r.recv_multipart()
    print(m[0].decode(), [len(p) for p in m[1:]], flush=True)
    r.send_multipart(m)
`)
	c := dial("r", Dealer, "me")
	large := bytes.Repeat([]byte("x"), 5<<20)
	for _, m := range [][][]byte{
		{[]byte("a")},
		{nil, []byte("b"), nil},
		{bytes.Repeat([]byte("y"), 255), bytes.Repeat([]byte("y"), 256), large, []byte("end"), large[:17<<10]},
	} {
		sent := make(chan error, 1)
		go func() { sent <- c.Send(m) }()
		got, err := c.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if err := <-sent; err != nil {
			t.Fatal(err)
		}
		if len(got) != len(m) {
			t.Fatalf("%d frames came back of %d", len(got), len(m))
		}
		for i := range m {
			if !bytes.Equal(got[i], m[i]) {
				t.Errorf("frame %d of %d bytes came back with %d", i, len(m[i]), len(got[i]))
			}
		}
		lines.Scan()
		var sizes []int
		for _, f := range m {
			sizes = append(sizes, len(f))
		}
		if want := "me " + string(bytes.ReplaceAll(fmt.Append(nil, sizes), []byte(" "), []byte(", "))); lines.Text() != want {
			t.Errorf("libzmq got %q, want %q", lines.Text(), want)
		}
	}
}

// A message over the limit is passed over, and costs no memory.
func TestRealTooLarge(t *testing.T) {
	dial, _ := libzmq(t, `
r=S(zmq.ROUTER,'r'); print('ready',flush=True)
m=r.recv_multipart()
r.send_multipart([m[0], b'1', b'x'*(65<<20), b'tail'])
r.send_multipart([m[0]]+[b'']*9000)
r.send_multipart([m[0], b'2'])
r.recv()
`)
	c := dial("r", Dealer, "")
	if err := c.Send([][]byte{[]byte("go")}); err != nil {
		t.Fatal(err)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, err := c.Recv()
	var large *TooLargeError
	if !errors.Is(err, ErrTooLarge) || !errors.As(err, &large) || large.Bytes != 65<<20+5 {
		t.Fatalf("a large message: %v", err)
	}
	runtime.ReadMemStats(&after)
	if grown := after.TotalAlloc - before.TotalAlloc; grown > 8<<20 {
		t.Errorf("it made %d bytes", grown)
	}
	if _, err := c.Recv(); !errors.Is(err, ErrTooLarge) {
		t.Fatalf("many frames: %v", err)
	}
	if m, err := c.Recv(); err != nil || len(m) != 1 || string(m[0]) != "2" {
		t.Fatalf("the next message: %q, %v", m, err)
	}
}

func TestRealSub(t *testing.T) {
	dial, _ := libzmq(t, `
p=S(zmq.XPUB,'p'); print('ready',flush=True)
assert p.recv()==b'\x01'
for i in range(1000): p.send_multipart([b'topic', str(i).encode()])
assert p.recv()==b'\x00', 'no unsubscribe at the end'
p.recv()
`)
	c := dial("p", Sub, "")
	for i := range 1000 {
		m, err := c.Recv()
		if err != nil || len(m) != 2 || string(m[1]) != fmt.Sprint(i) {
			t.Fatalf("message %d: %q, %v", i, m, err)
		}
	}
}

func TestRealReq(t *testing.T) {
	dial, _ := libzmq(t, `
r=S(zmq.REP,'h'); print('ready',flush=True)
while True: r.send(r.recv())
`)
	c := dial("h", Req, "")
	for range 3 {
		if err := c.Send([][]byte{[]byte("ping")}); err != nil {
			t.Fatal(err)
		}
		if m, err := c.Recv(); err != nil || len(m) != 1 || string(m[0]) != "ping" {
			t.Fatalf("%q, %v", m, err)
		}
	}
}

// script is a peer that says what it is told to, and nothing more.
func script(t *testing.T, said []byte) net.Conn {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range pair {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		_ = f.Close()
		if err != nil {
			t.Fatal(err)
		}
		ends[i], _ = c.(*net.UnixConn)
	}
	ours, theirs := ends[0], ends[1]
	var wg sync.WaitGroup
	wg.Go(func() {
		_, _ = theirs.Write(said)
		_ = theirs.CloseWrite()
	})
	wg.Go(func() { _, _ = io.Copy(io.Discard, theirs) })
	t.Cleanup(func() { _ = ours.Close(); _ = theirs.Close(); wg.Wait() })
	return ours
}

func hello(kind, mechanism string) []byte {
	var g [64]byte
	g[0], g[9], g[10] = 0xff, 0x7f, 3
	copy(g[12:], mechanism)
	ready := property(append([]byte{5}, "READY"...), "socket-type", kind)
	return append(append(g[:], flagCommand, byte(len(ready))), ready...)
}

func TestRefuses(t *testing.T) {
	for name, said := range map[string][]byte{
		"nothing":     nil,
		"http":        bytes.Repeat([]byte("HTTP/1.1 400 Bad Request\r\n"), 4),
		"old":         append([]byte{0xff, 0, 0, 0, 0, 0, 0, 0, 1, 0x7f, 1}, make([]byte, 60)...),
		"curve":       hello("ROUTER", "CURVE"),
		"wrong type":  hello("PUB", "NULL"),
		"no READY":    append(hello("ROUTER", "NULL")[:64], 0, 1, 'x'),
		"error":       append(hello("ROUTER", "NULL")[:64], append([]byte{flagCommand, 8}, "\x05ERROR\x01x"...)...),
		"huge READY":  append(hello("ROUTER", "NULL")[:64], flagCommand|flagLong, 0, 0, 0, 1, 0, 0, 0, 0),
		"cut":         hello("ROUTER", "NULL")[:70],
		"empty READY": append(hello("ROUTER", "NULL")[:64], append([]byte{flagCommand, 6}, "\x05READY"...)...),
	} {
		if c, err := New(context.Background(), script(t, said), Dealer, "", 1000); err == nil {
			t.Errorf("%s was taken: %v", name, c)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	ours, theirs := net.Pipe()
	defer func() { _ = theirs.Close() }()
	if _, err := New(ctx, ours, Dealer, "", 1000); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a silent peer: %v", err)
	}
	for name, c := range map[string]struct {
		said []byte
		want error
	}{
		"end":            {nil, io.EOF},
		"end in message": {[]byte{flagMore, 1, 'x'}, io.ErrUnexpectedEOF},
		"end in frame":   {[]byte{0, 5, 'x'}, io.ErrUnexpectedEOF},
		"flags":          {[]byte{0x80, 0}, ErrProtocol},
		"size":           {append([]byte{flagLong}, bytes.Repeat([]byte{0xff}, 8)...), ErrProtocol},
		"large command":  {[]byte{flagCommand | flagLong, 0, 0, 0, 0, 1, 0, 0, 0}, ErrProtocol},
		"cut and large":  {[]byte{flagLong, 0, 0, 1, 0, 0, 0, 0, 0, 'x'}, io.ErrUnexpectedEOF},
	} {
		conn, err := New(context.Background(), script(t, append(hello("ROUTER", "NULL"), c.said...)), Dealer, "", 1000)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Recv(); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

// buffered is a connection with a fixed input.
type buffered struct {
	net.Conn
	in *bytes.Reader
}

func (b buffered) Read(p []byte) (int, error)  { return b.in.Read(p) }
func (b buffered) Write(p []byte) (int, error) { return len(p), nil }
func (b buffered) Close() error                { return nil }

func FuzzRecv(f *testing.F) {
	f.Add([]byte{flagMore, 1, 'x', 0, 0, flagCommand, 2, 1, 'P', flagLong, 0, 0, 0, 0, 0, 0, 0, 1, 'y'})
	f.Add([]byte{flagLong, 0, 0, 0, 0, 0, 1, 0, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, start := range [][]byte{hello("ROUTER", "NULL"), nil} {
			c, err := New(context.Background(), buffered{in: bytes.NewReader(append(start, data...))}, Dealer, "", 1<<10)
			if err != nil {
				continue
			}
			for {
				m, err := c.Recv()
				if errors.Is(err, ErrTooLarge) {
					continue
				}
				if err != nil {
					break
				}
				size := 0
				for _, p := range m {
					size += len(p)
				}
				if size > 1<<10 {
					t.Fatalf("a message of %d bytes", size)
				}
			}
		}
	})
}
