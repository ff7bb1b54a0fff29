package shim

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// ErrNoShim is returned when no shim answers in a kernel's directory.
var ErrNoShim = errors.New("the kernel's shim does not run")

// maxAnswer bounds an answer of a shim, in bytes.
const maxAnswer = 1 << 20

// Agent is agentd's side of a shim: it asks the one that serves dir. It may be used by
// several goroutines.
type Agent struct {
	dir  string
	http *http.Client
}

// NewAgent returns an Agent for a kernel's directory, whether or not a shim is there.
func NewAgent(dir string) *Agent {
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx, dir) }}
	return &Agent{dir: dir, http: &http.Client{Transport: transport}}
}

func dial(ctx context.Context, dir string) (net.Conn, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close() //nolint:errcheck // it was looked at
	return (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), socketFile))
}

// Do implements kernelstream.Doer: the stream of what Dial opens goes to the shim.
func (a *Agent) Do(r *http.Request) (*http.Response, error) {
	response, err := a.http.Do(r)
	return response, gone(err)
}

func gone(err error) error {
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return ErrNoShim
	}
	return err
}

func (a *Agent) ask(ctx context.Context, method, path string) ([]byte, error) {
	return a.askWith(ctx, method, path, nil)
}

func (a *Agent) askWith(ctx context.Context, method, path string, body []byte) ([]byte, error) {
	r, err := http.NewRequestWithContext(ctx, method, "http://shim"+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	response, err := a.Do(r)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close() //nolint:errcheck // it is read to its end
	if response.StatusCode != http.StatusOK {
		return nil, proto.ReadHTTPError(response)
	}
	return io.ReadAll(io.LimitReader(response.Body, maxAnswer))
}

func (a *Agent) kernel(ctx context.Context, method, path string) (*posternv1.Kernel, error) {
	text, err := a.ask(ctx, method, path)
	if err != nil {
		return nil, err
	}
	return parseKernel(text)
}

func parseKernel(text []byte) (*posternv1.Kernel, error) {
	k := &posternv1.Kernel{}
	// A newer shim than agentd may know more.
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(text, k); err != nil {
		return nil, fmt.Errorf("the kernel's shim answered what is not understood: %w", err)
	}
	return k, nil
}

// Kernel is the kernel as it is.
func (a *Agent) Kernel(ctx context.Context) (*posternv1.Kernel, error) {
	return a.kernel(ctx, http.MethodGet, "/v1/kernel")
}

// Interrupt, Restart, Stop, Reread and Resume are the shim's; see there. After Stop the
// shim ends.
func (a *Agent) Interrupt(ctx context.Context) (*posternv1.Kernel, error) {
	return a.kernel(ctx, http.MethodPost, "/v1/interrupt")
}

// Restart ends the kernel's processes and starts them anew.
func (a *Agent) Restart(ctx context.Context) (*posternv1.Kernel, error) {
	return a.kernel(ctx, http.MethodPost, "/v1/restart")
}

// Stop ends the kernel and its shim.
func (a *Agent) Stop(ctx context.Context) error {
	_, err := a.kernel(ctx, http.MethodPost, "/v1/stop")
	return err
}

// Reread makes the shim take a changed spec.json.
func (a *Agent) Reread(ctx context.Context) (*posternv1.Kernel, error) {
	return a.kernel(ctx, http.MethodPost, "/v1/reread")
}

// Resume ends Quiesce.
func (a *Agent) Resume(ctx context.Context) (*posternv1.Kernel, error) {
	return a.kernel(ctx, http.MethodPost, "/v1/resume")
}

// Quiesce closes the sockets to the kernel; see Shim.Quiesce.
func (a *Agent) Quiesce(ctx context.Context, wait time.Duration) (Quiesced, error) {
	var q Quiesced
	text, err := a.ask(ctx, http.MethodPost, "/v1/quiesce?wait="+url.QueryEscape(wait.String()))
	if err != nil {
		return q, err
	}
	return q, json.Unmarshal(text, &q)
}

// Detail is what the shim says of itself.
func (a *Agent) Detail(ctx context.Context) (Detail, error) {
	var d Detail
	text, err := a.ask(ctx, http.MethodGet, "/v1/detail")
	if err != nil {
		return d, err
	}
	return d, json.Unmarshal(text, &d)
}

// Watch tells of the kernel now and at each change, until ctx or the shim ends: io.EOF.
func (a *Agent) Watch(ctx context.Context, tell func(*posternv1.Kernel)) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://shim/v1/watch", nil)
	if err != nil {
		return err
	}
	response, err := a.Do(r)
	if err != nil {
		return err
	}
	defer response.Body.Close() //nolint:errcheck // it ends with ctx
	if response.StatusCode != http.StatusOK {
		return proto.ReadHTTPError(response)
	}
	lines := bufio.NewScanner(response.Body)
	lines.Buffer(nil, maxAnswer)
	for lines.Scan() {
		k, err := parseKernel(lines.Bytes())
		if err != nil {
			return err
		}
		tell(k)
	}
	if err := lines.Err(); err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return io.EOF // however it broke: the shim has gone
}

// Spawn starts a shim for a kernel's directory and waits until it serves. It outlives
// the caller; a caller that stays reaps it. executable is agentd.
func Spawn(ctx context.Context, executable, dir string) (*os.Process, error) {
	return SpawnWith(ctx, executable, dir, Secrets{})
}

// SpawnWith is Spawn for a kernel that has secrets: the shim knows them, over a pipe,
// before it takes the kernel's first message.
func SpawnWith(ctx context.Context, executable, dir string, secrets Secrets) (*os.Process, error) {
	ready, theirs, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer ready.Close()                  //nolint:errcheck // it was read
	var stdin io.Reader                  // nil: /dev/null
	given := func() error { return nil } // lets go of what the shim has
	if len(secrets.Current)+len(secrets.Old) > 0 {
		text, err := json.Marshal(secrets)
		if err != nil {
			return nil, errors.Join(err, theirs.Close())
		}
		defer clear(text)
		r, w, err := os.Pipe()
		if err != nil {
			return nil, errors.Join(err, theirs.Close())
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			_, _ = w.Write(text) // a shim that ends instead says why
			_ = w.Close()
		})
		defer wg.Wait()
		stdin, given = r, r.Close
	}
	log, err := os.OpenFile(filepath.Join(dir, logFile), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, errors.Join(err, theirs.Close(), given())
	}
	c := exec.Command(executable, Arg, dir)
	c.Dir = "/"
	c.Stdout, c.Stderr = log, log
	c.ExtraFiles = []*os.File{theirs}
	c.Stdin = stdin
	// Nothing of agentd's environment is a kernel's business: it may hold secrets.
	c.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"}
	c.Env = append(c.Env, testEnvironment()...)
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = c.Start()
	err = errors.Join(err, theirs.Close(), log.Close(), given())
	if err != nil {
		return nil, fmt.Errorf("start the kernel's shim: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = ready.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	said, err := io.ReadAll(io.LimitReader(ready, 64<<10))
	if string(said) == "ready" {
		return c.Process, nil
	}
	_ = c.Process.Kill() // its kernel is cleaned up by the caller
	_, _ = c.Process.Wait()
	switch {
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case err != nil:
		return nil, err
	case len(bytes.TrimSpace(said)) == 0:
		return nil, fmt.Errorf("the kernel's shim ended at once: see %s", filepath.Join(dir, logFile))
	}
	return nil, errors.New(strings.TrimSpace(string(said)))
}

// testEnvironment is what the race detector and coverage of tests need.
func testEnvironment() []string {
	var env []string
	for _, name := range []string{"GOCOVERDIR", "GORACE"} {
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	return env
}
