package nginxtest

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/postern-dev/postern/e2e/freeport"
	"github.com/postern-dev/postern/e2e/netlab"
)

// TB is the part of testing.TB that this package needs.
type TB interface {
	Helper()
	Cleanup(func())
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	TempDir() string
}

// Options say where nginx listens and what it stands before.
type Options struct {
	// Netns is the network namespace to run in; empty: this one.
	Netns string
	// Listen is IP:PORT; empty: a free port on loopback.
	Listen string
	// Upstream is the control plane's address, Upstreams those of two replicas. One of
	// the two is required.
	Upstream  string
	Upstreams []string
}

// Server is one nginx.
type Server struct {
	// URL is https:// and the address.
	URL string
	// CAFile has the certificate to trust, in PEM; Roots has it too.
	CAFile string
	Roots  *x509.CertPool

	cmd  *exec.Cmd
	dir  string
	done chan struct{}
}

// Snippet is the file that operators are told to use, below the repository's root.
const Snippet = "docs/nginx/postern.conf"

// ReplicasSnippet is the one for two replicas.
const ReplicasSnippet = "docs/nginx/replicas.conf"

// Start runs an nginx until the test's end.
func Start(t TB, o Options) *Server {
	t.Helper()
	s := &Server{dir: t.TempDir(), done: make(chan struct{})}
	if err := s.start(o); err != nil {
		t.Fatalf("nginx: %v", err)
	}
	t.Cleanup(func() {
		if err := s.stop(); err != nil {
			t.Errorf("%v", err)
		}
	})
	return s
}

func (s *Server) start(o Options) error {
	if o.Listen == "" {
		address, err := freeport.Address()
		if err != nil {
			return err
		}
		o.Listen = address
	}
	host, _, err := net.SplitHostPort(o.Listen)
	if err != nil {
		return err
	}
	s.URL, s.CAFile = "https://"+o.Listen, filepath.Join(s.dir, "ca.pem")
	if s.Roots, err = WriteCertificates(s.dir, host); err != nil {
		return err
	}
	site, err := s.site(o)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(s.dir, "postern.conf"), []byte(site), 0o600); err != nil {
		return err
	}
	file := filepath.Join(s.dir, "nginx.conf")
	if err := os.WriteFile(file, []byte(s.main()), 0o600); err != nil {
		return err
	}
	program, err := binary()
	if err != nil {
		return err
	}
	log := filepath.Join(s.dir, "error.log")
	args := []string{program, "-c", file, "-p", s.dir, "-e", log}
	if o.Netns != "" {
		args = append([]string{"ip", "netns", "exec", o.Netns}, args...)
	}
	s.cmd = exec.Command(args[0], args[1:]...)
	output, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer output.Close() //nolint:errcheck // nginx has its own copy
	s.cmd.Stdout, s.cmd.Stderr = output, output
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := s.cmd.Start(); err != nil {
		return err
	}
	go func() {
		s.cmd.Wait() //nolint:errcheck // it is stopped by a signal
		close(s.done)
	}()
	if err := s.await(o); err != nil {
		return errors.Join(err, s.stop())
	}
	return nil
}

// await waits until it accepts connections.
func (s *Server) await(o Options) error {
	deadline := time.Now().Add(15 * time.Second)
	for {
		conn, err := dial(o.Netns, o.Listen)
		if err == nil {
			return conn.Close()
		}
		select {
		case <-s.done:
			return fmt.Errorf("it ended: %s", s.Log())
		case <-time.After(10 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("it does not answer: %w: %s", err, s.Log())
		}
	}
}

// main is the part of the configuration that Debian's nginx.conf has.
func (s *Server) main() string {
	user := ""
	if os.Getuid() == 0 {
		user = "user root;\n" // its workers must reach the test's directory
	}
	return user + `daemon off;
worker_processes 1;
pid ` + s.dir + `/nginx.pid;
error_log ` + s.dir + `/error.log notice;
events { worker_connections 1024; }
http {
	access_log ` + s.dir + `/access.log;
	client_body_temp_path ` + s.dir + `/body;
	proxy_temp_path ` + s.dir + `/proxy;
	fastcgi_temp_path ` + s.dir + `/fastcgi;
	uwsgi_temp_path ` + s.dir + `/uwsgi;
	scgi_temp_path ` + s.dir + `/scgi;
	include ` + s.dir + `/postern.conf;
}
`
}

// site is the operators' file with what is theirs to fill in.
func (s *Server) site(o Options) (string, error) {
	root, err := repository()
	if err != nil {
		return "", err
	}
	file, servers := Snippet, [][2]string{{"server 127.0.0.1:8080;", "server " + o.Upstream + ";"}}
	if len(o.Upstreams) == 2 {
		file, servers = ReplicasSnippet, [][2]string{{"server 10.0.0.5:8080 ", "server " + o.Upstreams[0] + " "}, {"server 10.0.0.6:8080 ", "server " + o.Upstreams[1] + " "}}
	}
	text, err := os.ReadFile(filepath.Join(root, file))
	if err != nil {
		return "", err
	}
	site := string(text)
	for _, r := range append(servers, [][2]string{
		{"listen 443 ssl;", "listen " + o.Listen + " ssl;"},
		{"server_name cp.example.com;", "server_name _;"},
		{"/etc/ssl/postern/fullchain.pem;", s.dir + "/fullchain.pem;"},
		{"/etc/ssl/postern/key.pem;", s.dir + "/key.pem;"},
	}...) {
		if strings.Count(site, r[0]) != 1 {
			return "", fmt.Errorf("%s does not have %q once", file, r[0])
		}
		site = strings.Replace(site, r[0], r[1], 1)
	}
	return site, nil
}

// repository is the directory of go.mod, at or above the working directory.
func repository() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("not in the repository: there is no go.mod above the working directory")
		}
		dir = parent
	}
}

func dial(netns, address string) (net.Conn, error) {
	if netns == "" {
		return net.DialTimeout("tcp", address, time.Second)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	return netlab.Dial(ctx, netns, address)
}

// Log is what nginx has said.
func (s *Server) Log() string {
	text, _ := os.ReadFile(filepath.Join(s.dir, "error.log"))
	return strings.TrimSpace(string(text))
}

// AccessLog has a line for each request that has ended.
func (s *Server) AccessLog() string {
	text, _ := os.ReadFile(filepath.Join(s.dir, "access.log"))
	return string(text)
}

func (s *Server) stop() error {
	s.cmd.Process.Signal(syscall.SIGTERM) //nolint:errcheck // it may have ended
	select {
	case <-s.done:
		return nil
	case <-time.After(10 * time.Second):
		s.cmd.Process.Kill() //nolint:errcheck // likewise
		<-s.done
		return fmt.Errorf("nginx did not end within 10 s of SIGTERM: %s", s.Log())
	}
}

func binary() (string, error) {
	for _, path := range []string{"nginx", "/usr/sbin/nginx"} {
		if found, err := exec.LookPath(path); err == nil {
			return found, nil
		}
	}
	return "", errors.New("it is not installed: apt-get install nginx-light")
}

// TLS is a client's configuration that trusts this server.
func (s *Server) TLS() *tls.Config {
	return &tls.Config{RootCAs: s.Roots, MinVersion: tls.VersionTLS12}
}
