package egress

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/confine"
)

const testUID = 1_950_000_003

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: the process gets a user of its own")
	}
}

// client is a Client, and an http.Client that uses it.
func client(t *testing.T, change func(*Config)) (*Client, *http.Client) {
	t.Helper()
	var log bytes.Buffer
	config := Config{Name: "test", UID: testUID, Logger: slog.New(slog.NewTextHandler(&log, nil))}
	if change != nil {
		change(&config)
	}
	c := New(config)
	t.Cleanup(func() {
		c.Close()
		if t.Failed() {
			t.Logf("log:\n%s", log.String())
		}
	})
	return c, &http.Client{Transport: c, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

func trusting(s *httptest.Server) func(*Config) {
	return func(c *Config) { c.CAs = [][]byte{s.Certificate().Raw} }
}

// pid is the process's.
func (c *Client) pid() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.current == nil {
		return 0
	}
	return c.current.cmd.Process.Pid
}

func get(t *testing.T, h *http.Client, url string) (status int, body string) {
	t.Helper()
	answer, err := h.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer.StatusCode, string(text)
}

func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not in time", what)
		}
	}
}

// TestConfinement: what has the connection is a process without rights, and we have none.
func TestConfinement(t *testing.T) {
	needRoot(t)
	t.Setenv("MARKED", "marked-in-environment")
	held := make(chan struct{})
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "begun ")
		w.(http.Flusher).Flush()
		<-held
	}))
	defer s.Close()
	release := sync.OnceFunc(func() { close(held) })
	defer release()
	c, h := client(t, trusting(s))
	answer, err := h.Get(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	pid := c.pid()
	got := map[string]string{}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		got[name] = strings.TrimSpace(value)
	}
	id := strconv.Itoa(testUID)
	for name, want := range map[string]string{
		"Uid": strings.Join([]string{id, id, id, id}, "\t"), "Gid": strings.Join([]string{id, id, id, id}, "\t"), "Groups": "",
		"CapInh": "0000000000000000", "CapPrm": "0000000000000000", "CapEff": "0000000000000000", "CapBnd": "0000000000000000", "CapAmb": "0000000000000000",
		"NoNewPrivs": "1", "Seccomp": "2",
	} {
		if got[name] != want {
			t.Errorf("%s is %q, want %q", name, got[name], want)
		}
	}
	if environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid)); err != nil || len(environ) > 0 {
		t.Errorf("its environment is %q, %v", environ, err)
	}
	var st syscall.Stat_t
	if err := syscall.Stat(fmt.Sprintf("/proc/%d/fd", pid), &st); err != nil || st.Uid != 0 {
		t.Errorf("its descriptors belong to %d (%v): it is dumpable", st.Uid, err)
	}
	// The connection is its own.
	_, port, err := net.SplitHostPort(s.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	inode := ""
	table, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(table)) {
		fields := strings.Fields(line)
		if strings.HasSuffix(fields[2], fmt.Sprintf(":%04X", n)) && fields[3] == "01" {
			inode = fields[9]
		}
	}
	has := func(pid int) bool {
		all, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		return slices.ContainsFunc(all, func(path string) bool {
			to, err := os.Readlink(path)
			return err == nil && to == "socket:["+inode+"]"
		})
	}
	if inode == "" || !has(pid) || has(os.Getpid()) {
		t.Errorf("the connection (inode %q): the process has it: %v, we have it: %v", inode, has(pid), has(os.Getpid()))
	}
	release()
	if body, err := io.ReadAll(answer.Body); err != nil || string(body) != "begun " {
		t.Errorf("got %q, %v", body, err)
	}
	c.Close()
	if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("it outlives its Client: %v", err)
	}
	if _, err := h.Get(s.URL); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// TestRequestsPassUnchanged: what a server gets and what comes back are the same as without the process.
func TestRequestsPassUnchanged(t *testing.T) {
	var mu sync.Mutex
	var seen []string
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		mu.Lock()
		seen = append(seen, fmt.Sprintf("%s %s %s %v %d %v %x %v", r.Method, r.RequestURI, r.Host, r.Header, r.ContentLength, r.TransferEncoding, sha256.Sum256(body), err))
		mu.Unlock()
		w.Header().Set("Etag", `"abc"`)
		w.Header()["Date"] = []string{"Sun, 22 Nov 2026 22:00:00 GMT"}
		w.Header().Set(failureHeader, "a lie")
		w.Header()["Content-Type"] = nil
		code, _ := strconv.Atoi(r.Header.Get("Want"))
		switch {
		case code == http.StatusTemporaryRedirect:
			w.Header().Set("Location", "/elsewhere")
		case r.Method == http.MethodHead:
			w.Header().Set("Content-Length", "12345")
		}
		w.WriteHeader(code)
		if r.Method != http.MethodHead && code != http.StatusNoContent {
			_, _ = w.Write(body)
			w.(http.Flusher).Flush()
			_, _ = w.Write(body)
		}
	}))
	defer s.Close()
	_, through := client(t, trusting(s))
	direct := s.Client()
	direct.CheckRedirect = through.CheckRedirect
	direct.Transport.(*http.Transport).DisableCompression = true
	large := make([]byte, 3<<20)
	for i := range large {
		large[i] = byte(rand.Uint32())
	}
	for _, c := range []struct {
		method, path string
		body         []byte
		unknown      bool // its length
		code         int
	}{
		{method: "GET", path: "/", code: 200},
		{method: "GET", path: "/a%2Fb/c%20d//e/../f+%2B?list-type=2&prefix=%C3%A4%2F&x", code: 404},
		{method: "GET", path: "//double?", code: 206},
		{method: "HEAD", path: "/object", code: 200},
		{method: "PUT", path: "/empty", body: []byte{}, code: 200},
		{method: "PUT", path: "/some", body: []byte("some"), code: 307},
		{method: "PUT", path: "/large", body: large, code: 200},
		{method: "POST", path: "/large?uploads", body: large, unknown: true, code: 500},
		{method: "DELETE", path: "/object", code: 204},
		{method: "LIST", path: "/v1/secret", code: 403},
	} {
		var got [2]string
		for i, h := range []*http.Client{direct, through} {
			var body io.Reader
			if c.body != nil {
				body = bytes.NewReader(c.body)
			}
			if c.unknown {
				body = io.MultiReader(body)
			}
			r, err := http.NewRequestWithContext(t.Context(), c.method, s.URL+c.path, body)
			if err != nil {
				t.Fatal(err)
			}
			r.Header.Set("Want", strconv.Itoa(c.code))
			r.Header.Set("X-Vault-Token", "s.secret")
			r.Header["Twice"] = []string{"1", "2"}
			answer, err := h.Do(r)
			if err != nil {
				t.Fatalf("%s %s: %v", c.method, c.path, err)
			}
			text, err := io.ReadAll(answer.Body)
			_ = answer.Body.Close()
			answer.Header.Del(failureHeader)
			got[i] = fmt.Sprintf("%d %v %d %x %v %s", answer.StatusCode, answer.Header, answer.ContentLength, sha256.Sum256(text), err, answer.Request.URL)
		}
		if got[0] != got[1] {
			t.Errorf("%s %s: without the process\n%s\nwith it\n%s", c.method, c.path, got[0], got[1])
		}
		if len(seen) != 2 || strings.ReplaceAll(seen[0], "User-Agent:[Go-http-client/1.1]", "") != strings.ReplaceAll(seen[1], "User-Agent:[Go-http-client/1.1]", "") {
			t.Errorf("%s %s: the server saw\n%s", c.method, c.path, strings.Join(seen, "\n"))
		}
		seen = nil
	}
}

// TestFailures: each failure is told in words, and ends no process.
func TestFailures(t *testing.T) {
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/breaks":
			w.Header().Set("Content-Length", "10000")
			_, _ = io.WriteString(w, "some")
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		case "/chunks":
			_, _ = io.WriteString(w, "some")
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		case "/nothing":
			panic(http.ErrAbortHandler)
		case "/header":
			w.Header().Set("X", strings.Repeat("x", 2*maxHeader))
		case "/waits":
			<-r.Context().Done()
		}
	}))
	defer s.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := l.Addr().String()
	_ = l.Close()
	for _, c := range []struct{ url, want string }{
		{"http://" + nobody, "connection refused"},
		{s.URL, "certificate"}, // not told of its CA
		{"http://no-such-name.invalid", "no-such-name.invalid"},
		{strings.Replace(s.URL, "https", "http", 1) + "/x", ""}, // 400 of the server's: an answer
		{"ftp://host", "not http or https"},
	} {
		_, h := client(t, nil)
		answer, err := h.Get(c.url)
		if err == nil {
			_ = answer.Body.Close()
		}
		if (c.want == "") != (err == nil) || err != nil && (!strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n")) {
			t.Errorf("%s: got %v, want %q", c.url, err, c.want)
		}
	}
	cl, h := client(t, trusting(s))
	if _, err := h.Get(s.URL + "/nothing"); err == nil || !strings.Contains(err.Error(), "EOF") {
		t.Errorf("nothing: %v", err)
	}
	pid := cl.pid()
	for _, path := range []string{"/breaks", "/chunks"} {
		answer, err := h.Get(s.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		if body, err := io.ReadAll(answer.Body); !errors.Is(err, io.ErrUnexpectedEOF) || string(body) != "some" {
			t.Errorf("%s: %q, %v", path, body, err)
		}
		_ = answer.Body.Close()
	}
	if _, err := h.Get(s.URL + "/header"); err == nil || !strings.Contains(err.Error(), "header") {
		t.Errorf("a header without end: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	r, _ := http.NewRequestWithContext(ctx, http.MethodGet, s.URL+"/waits", nil)
	if _, err := h.Do(r); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("its time is over: %v", err)
	}
	if _, err := h.Get("https://example.com/"); err == nil || !strings.Contains(err.Error(), "alone") {
		t.Errorf("another destination: %v", err)
	}
	if status, _ := get(t, h, s.URL); status != 200 || cl.pid() != pid {
		t.Errorf("afterwards: %d, process %d, was %d", status, cl.pid(), pid)
	}
}

// TestHeaderTime: a server that does not answer is given up.
func TestHeaderTime(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	defer s.Close()
	_, h := client(t, func(c *Config) { c.HeaderTime = 50 * time.Millisecond })
	_, err := h.Get(s.URL)
	var timeout net.Error
	if !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("got %v", err)
	}
}

// TestManyAtOnce: requests at the same time don't mix, and leave nothing behind.
func TestManyAtOnce(t *testing.T) {
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		_, _ = w.Write(body)
	}))
	defer s.Close()
	c, h := client(t, trusting(s))
	var wg sync.WaitGroup
	for i := range 100 {
		wg.Go(func() {
			want := strings.Repeat(fmt.Sprintf("%d ", i), 1000*(i%7))
			answer, err := h.Post(s.URL, "text/plain", strings.NewReader(want))
			if err != nil {
				t.Error(err)
				return
			}
			got, err := io.ReadAll(answer.Body)
			_ = answer.Body.Close()
			if err != nil || string(got) != want {
				t.Errorf("%d: %d bytes, %v, want %d", i, len(got), err, len(want))
			}
		})
	}
	wg.Wait()
	c.mu.Lock()
	busy := c.busy
	c.mu.Unlock()
	if busy != 0 {
		t.Errorf("%d requests are under way", busy)
	}
}

// TestRestart: a process that is killed fails what was under way, and the next one is started.
func TestRestart(t *testing.T) {
	begun := make(chan struct{}, 1)
	s := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/waits" {
			begun <- struct{}{}
			<-r.Context().Done()
		}
	}))
	defer s.Close()
	c, h := client(t, nil)
	failed := make(chan error, 1)
	go func() {
		answer, err := h.Get(s.URL + "/waits")
		if err == nil {
			_ = answer.Body.Close()
		}
		failed <- err
	}()
	<-begun
	before := c.pid()
	if err := syscall.Kill(before, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := <-failed; err == nil {
		t.Error("it was answered")
	}
	eventually(t, "another process", func() bool {
		answer, err := h.Get(s.URL)
		if err == nil {
			_ = answer.Body.Close()
		}
		return err == nil
	})
	if after := c.pid(); after == before || after == 0 {
		t.Errorf("process %d after %d", after, before)
	}
}

// TestIdle: a process that nobody uses ends, and comes back; one that is used stays.
func TestIdle(t *testing.T) {
	before := idleTime
	idleTime = 200 * time.Millisecond
	defer func() { idleTime = before }()
	held := make(chan struct{})
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/waits" {
			w.(http.Flusher).Flush()
			<-held
		}
	}))
	defer s.Close()
	release := sync.OnceFunc(func() { close(held) })
	defer release()
	c, h := client(t, nil)
	defer c.Close() // before idleTime is what it was
	answer, err := h.Get(s.URL + "/waits")
	if err != nil {
		t.Fatal(err)
	}
	pid := c.pid()
	time.Sleep(3 * idleTime)
	if c.pid() != pid {
		t.Error("it ended under a request")
	}
	release()
	_ = answer.Body.Close()
	eventually(t, "its end", func() bool { return c.pid() == 0 && errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) })
	if status, _ := get(t, h, s.URL); status != 200 {
		t.Errorf("afterwards: %d", status)
	}
}

// TestProxy: the proxy is asked by the process, with its password, which is nowhere else; what
// the Client may reach is the proxy's port alone.
func TestProxy(t *testing.T) {
	var asked atomic.Value
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Store(r.RequestURI + " " + r.Header.Get("Proxy-Authorization"))
		_, _ = io.WriteString(w, "by the proxy")
	}))
	defer proxy.Close()
	to, err := url.Parse(proxy.URL)
	if err != nil {
		t.Fatal(err)
	}
	to.User = url.UserPassword("alice", "s3cret-of-the-proxy")
	c, h := client(t, func(c *Config) { c.Proxy = func(*url.URL) (*url.URL, error) { return to, nil } })
	if _, body := get(t, h, "http://bucket.example:9000/key"); body != "by the proxy" {
		t.Errorf("got %q", body)
	}
	if got := asked.Load(); got != "http://bucket.example:9000/key Basic YWxpY2U6czNjcmV0LW9mLXRoZS1wcm94eQ==" {
		t.Errorf("the proxy was asked %q", got)
	}
	for _, name := range []string{"cmdline", "environ"} {
		if text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", c.pid(), name)); err != nil || bytes.Contains(text, []byte("s3cret")) {
			t.Errorf("%s: %q, %v", name, text, err)
		}
	}
}

// TestHostileProcess: what a process that was taken over answers is an error, of bounded size, in bounded time.
func TestHostileProcess(t *testing.T) {
	for kind, want := range map[string]string{
		"header": "", "line": "", "interim": "", "nothing": "EOF", "silent": "timeout",
		"failure": strings.TrimSpace(strings.Repeat("a ", maxFailure/2)), "escape": "it does not say why",
	} {
		t.Run(kind, func(t *testing.T) {
			_, h := client(t, func(c *Config) {
				c.Args = []string{hostileArg, kind}
				if kind == "silent" {
					c.HeaderTime = 200 * time.Millisecond
				}
			})
			answer, err := h.Get("http://127.0.0.1:1")
			if err == nil {
				_ = answer.Body.Close()
				t.Fatalf("it is an answer: %v", answer)
			}
			if text := err.Error(); !strings.Contains(text, want) || len(text) > 2*maxFailure || strings.ContainsAny(text, "\n\x1b") {
				t.Errorf("got %q, want %q", text, want)
			}
		})
	}
}

// TestEndsWithAgentd: a process does not outlive an agentd that is killed.
func TestEndsWithAgentd(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer s.Close()
	cmd := exec.Command("/proc/self/exe", parentArg, s.URL)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	pid, perr := strconv.Atoi(strings.TrimSpace(line))
	if err != nil || perr != nil {
		t.Fatalf("it said %q: %v, %v", line, err, perr)
	}
	eventually(t, "its end", func() bool { return errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) })
}

// TestProtocol: a process that is told nonsense ends.
func TestProtocol(t *testing.T) {
	for name, said := range map[string]string{
		"too long": "\xff\xff\xff\xff", "no JSON": "\x00\x00\x00\x01x", "a variable": "\x00\x00\x00\x2b" + `{"environment":{"LD_PRELOAD":"/tmp/evil"}}x`,
		"no connection": "\x00\x00\x00\x02{}x",
	} {
		c := New(Config{Name: name, UID: testUID})
		p, err := c.spawn(confine.Confinement{Executable: "/proc/self/exe", Ports: []uint16{}})
		if err != nil {
			t.Fatal(err)
		}
		if err := p.say([]byte(said), nil); err != nil {
			t.Fatal(err)
		}
		select {
		case <-p.exited:
			if code := p.cmd.ProcessState.ExitCode(); code != exitProtocol {
				t.Errorf("%s: exit code %d, want %d", name, code, exitProtocol)
			}
		case <-time.After(time.Minute):
			t.Errorf("%s: it goes on", name)
			p.kill()
		}
		c.Close()
	}
}

func TestOneLine(t *testing.T) {
	for text, want := range map[string]string{"a\n b\x1b[31m": "a b [31m", "\xff": "?", strings.Repeat("ä", maxFailure): strings.Repeat("ä", maxFailure/2) + "..."} {
		if got := oneLine(text); got != want {
			t.Errorf("%q: got %q", text, got)
		}
	}
}

// TestOldTLS: versions below 1.2 are refused.
func TestOldTLS(t *testing.T) {
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	s.TLS = &tls.Config{MaxVersion: tls.VersionTLS11, MinVersion: tls.VersionTLS10}
	s.StartTLS()
	defer s.Close()
	_, h := client(t, trusting(s))
	if _, err := h.Get(s.URL); err == nil || !strings.Contains(err.Error(), "protocol version") {
		t.Errorf("got %v", err)
	}
}
