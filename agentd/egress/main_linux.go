package egress

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/confine"
)

// Exit codes: agentd logs them.
const (
	exitDone     = 0
	exitUsage    = 2
	exitProtocol = 4
)

const (
	controlFD = 3
	// maxFiles is how many descriptors a process may have: two for each of maxConnections,
	// and what resolving and the runtime need.
	maxFiles = 1024
	// maxThreads is how many threads all egress processes on the host may have: about ten
	// for each, of each agentd that has the same uid_base.
	maxThreads = 4096
	// heapGrowth and memoryLimit keep the heap small: bodies pass in buffers that are used
	// again. A heap beyond memoryLimit (bytes) still works, at the price of more collections.
	heapGrowth  = 50
	memoryLimit = 48 << 20
	// bodyBuffer is what is read of a body at once, in bytes.
	bodyBuffer = 128 << 10
	// smallBody is up to what size an answer is sent on as a whole: larger ones as they come.
	smallBody = 2 << 10
	// dialTime and handshakeTime bound a connection.
	dialTime      = 5 * time.Second
	handshakeTime = 10 * time.Second
)

// failureHeader, in an answer, holds why there is none, escaped as in a query.
const failureHeader = "Postern-Egress-Failure"

// maxFailure bounds the text of a failure, in bytes.
const maxFailure = 512

// Main runs an egress process and returns its exit code. Call it before anything else: it
// expects descriptor 3 to be agentd's socket.
func Main() int {
	if err := giveUp(); err != nil {
		fmt.Fprintln(os.Stderr, "cannot give up privileges:", err)
		return exitUsage
	}
	debug.SetGCPercent(heapGrowth)
	debug.SetMemoryLimit(memoryLimit)
	runtime.GOMAXPROCS(min(2, runtime.GOMAXPROCS(0)))
	signal.Ignore(syscall.SIGPIPE, syscall.SIGHUP, syscall.SIGINT, syscall.SIGTERM) // agentd says when it is over
	control, err := inherited(controlFD)
	if err != nil {
		fmt.Fprintln(os.Stderr, "started without agentd's socket: this command is agentd's own")
		return exitUsage
	}
	forward, err := readConfig(control)
	if err != nil {
		if errors.Is(err, io.EOF) {
			return exitDone // agentd has changed its mind
		}
		fmt.Fprintln(os.Stderr, "configuration:", err)
		return exitProtocol
	}
	return serve(&listener{control: control}, forward)
}

// giveUp is the process's own part of its confinement; agentd's is in start.
func giveUp() error {
	// Also when agentd did not come to it: a stopped process hears of no end of file.
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return fmt.Errorf("PR_SET_PDEATHSIG: %w", err)
	}
	if err := confine.Harden(maxFiles, maxThreads); err != nil {
		return err
	}
	if err := syscall.Setrlimit(unix.RLIMIT_FSIZE, &syscall.Rlimit{}); err != nil {
		return fmt.Errorf("RLIMIT_FSIZE: %w", err)
	}
	return confine.ForbidAllButDialing()
}

func inherited(fd uintptr) (*net.UnixConn, error) {
	f := os.NewFile(fd, "agentd")
	if f == nil {
		return nil, os.ErrInvalid
	}
	conn, err := net.FileConn(f)
	_ = f.Close()
	if err != nil {
		return nil, err
	}
	control, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, os.ErrInvalid
	}
	return control, nil
}

func readConfig(control net.Conn) (*forwarder, error) {
	var size [4]byte
	if _, err := io.ReadFull(control, size[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(size[:])
	if n > maxConfig {
		return nil, errors.New("too long")
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(control, b); err != nil {
		return nil, err
	}
	defer clear(b)
	var c config
	if err := json.Unmarshal(b, &c); err != nil {
		return nil, errors.New("malformed") // the error could quote it
	}
	for name, value := range c.Environment {
		if !slices.Contains(inheritedVariables, name) {
			return nil, errors.New("a variable that is not known")
		}
		if err := os.Setenv(name, value); err != nil {
			return nil, err
		}
	}
	return newForwarder(c)
}

// forwarder answers agentd's requests by asking the destination.
type forwarder struct {
	scheme, host string
	transport    *http.Transport
	buffers      sync.Pool
}

func newForwarder(c config) (*forwarder, error) {
	f := &forwarder{scheme: c.Scheme, host: c.Host, buffers: sync.Pool{New: func() any { return new([bodyBuffer]byte) }}}
	f.transport = &http.Transport{
		DisableCompression: true, MaxIdleConnsPerHost: maxIdle, IdleConnTimeout: time.Minute,
		DialContext:         (&net.Dialer{Timeout: dialTime, KeepAlive: 15 * time.Second}).DialContext,
		TLSHandshakeTimeout: handshakeTime, MaxResponseHeaderBytes: maxHeader,
		TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12}, // the system's authorities
	}
	if len(c.CAs) > 0 {
		pool, err := x509.SystemCertPool()
		if err != nil {
			return nil, fmt.Errorf("the system's CA certificates: %w", err)
		}
		for _, der := range c.CAs {
			cert, err := x509.ParseCertificate(der)
			if err != nil {
				return nil, fmt.Errorf("a CA certificate: %w", err)
			}
			pool.AddCert(cert)
		}
		f.transport.TLSClientConfig.RootCAs = pool
	}
	if c.Proxy != "" {
		proxy, err := url.Parse(c.Proxy)
		if err != nil {
			return nil, errors.New("the proxy's URL is malformed") // the error could quote it
		}
		f.transport.Proxy = http.ProxyURL(proxy)
	}
	return f, nil
}

// ServeHTTP implements http.Handler.
func (f *forwarder) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	control := http.NewResponseController(w)
	_ = control.EnableFullDuplex() // a server may answer before it has read a request's body
	target := *r.URL
	target.Scheme, target.Host = f.scheme, f.host
	out := (&http.Request{Method: r.Method, URL: &target, Host: r.Host, Header: r.Header.Clone(), Body: r.Body, ContentLength: r.ContentLength}).WithContext(r.Context())
	if r.ContentLength == 0 {
		out.Body = http.NoBody
	}
	out.Header.Del("Connection")
	if out.Header.Get("User-Agent") == "" {
		out.Header.Set("User-Agent", "") // not the library's own
	}
	answer, err := f.transport.RoundTrip(out)
	if err != nil {
		w.Header().Set(failureHeader, url.QueryEscape(oneLine(err.Error())))
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	defer answer.Body.Close() //nolint:errcheck // it was read to its end, or that failed
	header := w.Header()
	for name, values := range answer.Header {
		header[name] = values
	}
	for _, name := range []string{failureHeader, "Connection", "Keep-Alive", "Transfer-Encoding", "Upgrade", "Trailer"} {
		header.Del(name)
	}
	for _, name := range []string{"Content-Type", "Date"} {
		if _, ok := header[name]; !ok {
			header[name] = nil // not the library's own
		}
	}
	w.WriteHeader(answer.StatusCode)
	var to io.Writer = struct{ io.Writer }{w}
	if answer.ContentLength < 0 || answer.ContentLength > smallBody && r.Method != http.MethodHead {
		to = flusher{w, control}
		_, _ = to.Write(nil) // the header
	}
	buffer := f.buffers.Get().(*[bodyBuffer]byte)
	defer f.buffers.Put(buffer)
	if _, err := io.CopyBuffer(to, answer.Body, buffer[:]); err != nil {
		panic(http.ErrAbortHandler) // agentd sees that it breaks off
	}
}

// flusher writes through.
type flusher struct {
	io.Writer
	*http.ResponseController
}

// Write implements io.Writer.
func (f flusher) Write(b []byte) (int, error) {
	n, err := f.Writer.Write(b)
	return n, errors.Join(err, f.Flush())
}

// oneLine makes a text printable and short.
func oneLine(text string) string {
	text = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || r == unicode.ReplacementChar {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(text, "?"))
	text = strings.Join(strings.Fields(text), " ")
	if len(text) > maxFailure {
		text = strings.ToValidUTF8(text[:maxFailure], "") + "..."
	}
	return text
}

// listener gives the connections that agentd sends.
type listener struct {
	control *net.UnixConn
	code    int
}

var _ net.Listener = (*listener)(nil)

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	conn, err := receive(l.control)
	if err != nil && !errors.Is(err, io.EOF) {
		fmt.Fprintln(os.Stderr, "control socket:", err)
		l.code = exitProtocol
	}
	return conn, err
}

// Close implements net.Listener.
func (l *listener) Close() error { return l.control.Close() }

// Addr implements net.Listener.
func (l *listener) Addr() net.Addr { return l.control.LocalAddr() }

// serve serves connections until agentd closes the control socket. What is under way ends then.
func serve(l *listener, f *forwarder) int {
	server := &http.Server{
		Handler: f, MaxHeaderBytes: maxHeader, ErrorLog: log.New(io.Discard, "", 0),
		BaseContext: func(net.Listener) context.Context { return context.Background() },
	}
	_ = server.Serve(l)
	_ = server.Close()
	return l.code
}

// receive takes the next connection.
func receive(control *net.UnixConn) (net.Conn, error) {
	var (
		b   [1]byte
		oob [64]byte
	)
	// Room for one descriptor: more are cut off by the kernel.
	n, oobn, _, _, err := control.ReadMsgUnix(b[:], oob[:syscall.CmsgSpace(4)])
	if err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, io.EOF
	}
	messages, err := syscall.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return nil, err
	}
	if b[0] != 'c' || len(messages) != 1 {
		return nil, errors.New("not as agreed")
	}
	fds, err := syscall.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return nil, errors.New("not as agreed")
	}
	f := os.NewFile(uintptr(fds[0]), "request")
	conn, err := net.FileConn(f)
	_ = f.Close()
	return conn, err
}
