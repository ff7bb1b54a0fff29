package stack

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/postern-dev/postern/e2e/freeport"
	"github.com/postern-dev/postern/e2e/netlab"
)

// Options say where and how a stack runs.
type Options struct {
	// Bin is the directory of agentd, controlplane and postern.
	Bin string
	// Dir is where everything is kept; empty: a new temporary directory.
	Dir string
	// Listen is the control plane's address; empty: a free port on loopback.
	Listen string
	// Netns is the control plane's network namespace; empty: this one.
	Netns string
	// URL is what agents and clients are told; empty: http:// and Listen.
	URL string
	// Args are further arguments of `controlplane serve`, Env further variables.
	Args, Env []string
	// CAFile is what agents and clients trust besides the system's CAs; may be
	// empty.
	CAFile string
}

// Stack is a control plane and what belongs to it.
type Stack struct {
	Options
	ControlPlane *Process
	Agents       []*Agent
	// TokenFile holds the token that Postern uses: the admin's.
	TokenFile string
	// RootCAs verifies an https URL; nil: the system's.
	RootCAs *x509.CertPool

	ownDir bool
}

// New prepares a stack; StartControlPlane starts it.
func New(o Options) (*Stack, error) {
	s := &Stack{Options: o}
	if s.Dir == "" {
		dir, err := os.MkdirTemp("", "postern-stack-")
		if err != nil {
			return nil, err
		}
		s.Dir, s.ownDir = dir, true
	}
	bin, err := filepath.Abs(s.Bin)
	if err != nil {
		return nil, err
	}
	s.Bin = bin
	if s.Listen == "" {
		if s.Listen, err = freeport.Address(); err != nil {
			return nil, err
		}
	}
	if s.URL == "" {
		s.URL = "http://" + s.Listen
	}
	s.TokenFile = filepath.Join(s.DataDir(), "admin.token")
	return s, nil
}

// DataDir is the control plane's data directory.
func (s *Stack) DataDir() string { return filepath.Join(s.Dir, "controlplane") }

// command builds a command in a network namespace.
func (s *Stack) command(ctx context.Context, netns, program string, args ...string) *exec.Cmd {
	path := filepath.Join(s.Bin, program)
	if netns != "" {
		args = append([]string{"netns", "exec", netns, path}, args...)
		path = "ip"
	}
	return exec.CommandContext(ctx, path, args...)
}

// StartControlPlane starts it, again after Kill or Stop too, and waits until it
// is ready.
func (s *Stack) StartControlPlane(ctx context.Context) error {
	args := append([]string{"serve", "--data", s.DataDir(), "--listen", s.Listen}, s.Args...)
	cmd := s.command(context.Background(), s.Netns, "controlplane", args...)
	cmd.Env = append(cleanEnv(), s.Env...)
	p, err := start("controlplane", filepath.Join(s.Dir, "controlplane.log"), cmd)
	if err != nil {
		return err
	}
	s.ControlPlane = p
	transport := &http.Transport{
		DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: s.RootCAs, InsecureSkipVerify: s.RootCAs == nil},
	}
	if s.Netns != "" {
		transport.DialContext = netlab.Dialer(s.Netns)
	}
	client := &http.Client{Timeout: 2 * time.Second, Transport: transport}
	scheme := "http://"
	for _, a := range s.Args {
		if strings.HasPrefix(a, "--tls-cert") {
			scheme = "https://"
		}
	}
	return p.await(ctx, "/readyz", func() error {
		resp, err := client.Get(scheme + s.Listen + "/readyz")
		if err != nil {
			return err
		}
		defer resp.Body.Close() //nolint:errcheck // only the status counts
		if resp.StatusCode != http.StatusOK {
			body, _ := io.ReadAll(io.LimitReader(resp.Body, 1024))
			return fmt.Errorf("%s: %s", resp.Status, body)
		}
		return nil
	})
}

// cleanEnv is this process's environment without what would reach into the
// programs under test.
func cleanEnv() []string {
	var env []string
	for _, kv := range os.Environ() {
		name, _, _ := strings.Cut(kv, "=")
		upper := strings.ToUpper(name)
		if strings.HasPrefix(upper, "POSTERN_") || strings.HasPrefix(upper, "PG") || strings.HasSuffix(upper, "_PROXY") || upper == "NOTIFY_SOCKET" {
			continue
		}
		env = append(env, kv)
	}
	return env
}

// Command is a postern command as the admin; its output is the caller's.
func (s *Stack) Command(ctx context.Context, args ...string) *exec.Cmd {
	if s.CAFile != "" {
		args = append(slices.Clone(args), "--ca-file", s.CAFile)
	}
	cmd := s.command(ctx, "", "postern", args...)
	cmd.Env = append(cleanEnv(), "POSTERN_URL="+s.URL, "XDG_CONFIG_HOME="+filepath.Join(s.Dir, "config"))
	if token, err := os.ReadFile(s.TokenFile); err == nil {
		cmd.Env = append(cmd.Env, "POSTERN_TOKEN="+strings.TrimSpace(string(token)))
	}
	return cmd
}

// Postern runs a postern command as the admin and returns its standard output.
// The error has standard error's text; exec.ExitError is in it.
func (s *Stack) Postern(ctx context.Context, args ...string) (string, error) {
	cmd := s.Command(ctx, args...)
	if s.Netns != "" {
		cmd.Args = append([]string{"ip", "netns", "exec", s.Netns}, cmd.Args...)
		cmd.Path, cmd.Err = lookIP()
	}
	return output(cmd)
}

func lookIP() (string, error) { return exec.LookPath("ip") }

func output(cmd *exec.Cmd) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args[1:], " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// Close ends everything that was started and removes the directory if New made
// it. It returns what did not end well.
func (s *Stack) Close() error {
	var problems []string
	for _, a := range s.Agents {
		if a.Process != nil && a.Process.Running() {
			if err := a.Process.Stop(40 * time.Second); err != nil {
				problems = append(problems, err.Error())
			}
		}
	}
	if s.ControlPlane != nil && s.ControlPlane.Running() {
		if err := s.ControlPlane.Stop(40 * time.Second); err != nil {
			problems = append(problems, err.Error())
		}
	}
	if s.ownDir {
		if err := os.RemoveAll(s.Dir); err != nil {
			problems = append(problems, err.Error())
		}
	}
	if len(problems) > 0 {
		return fmt.Errorf("%s", strings.Join(problems, "; "))
	}
	return nil
}
