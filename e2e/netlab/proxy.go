package netlab

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// proxy is a tinyproxy under way.
type proxy struct {
	cmd  *exec.Cmd
	log  string
	done chan struct{}
}

func startProxy(ns, dir string, o Options) (*proxy, error) {
	p := &proxy{log: filepath.Join(dir, "tinyproxy.log"), done: make(chan struct{})}
	config := "Port 3128\nListen " + insideIP + "\nAllow 10.78.0.0/24\nMaxClients 200\nTimeout 3600\nLogLevel Connect\n"
	if o.Auth != "" {
		user, password, _ := strings.Cut(o.Auth, ":")
		config += "BasicAuth " + user + " " + password + "\n"
	}
	for _, port := range o.Ports {
		config += fmt.Sprintf("ConnectPort %d\n", port)
	}
	file := filepath.Join(dir, "tinyproxy.conf")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return nil, err
	}
	log, err := os.Create(p.log)
	if err != nil {
		return nil, err
	}
	defer log.Close() //nolint:errcheck // the proxy has its own copy
	// -d keeps it in the foreground; `ip netns exec` becomes it, so that the
	// process id is the proxy's.
	p.cmd = exec.Command(find("ip"), "netns", "exec", ns, find("tinyproxy"), "-d", "-c", file)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		p.cmd.Wait() //nolint:errcheck // it is stopped by a signal
		close(p.done)
	}()
	deadline := time.Now().Add(10 * time.Second)
	for {
		addresses, err := ListeningTCP(ns)
		if err != nil {
			return p, err
		}
		for _, a := range addresses {
			if a == ProxyAddress {
				return p, nil
			}
		}
		select {
		case <-p.done:
			return p, fmt.Errorf("tinyproxy ended: %s", p.said())
		case <-time.After(10 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return p, fmt.Errorf("tinyproxy does not listen: %s", p.said())
		}
	}
}

func (p *proxy) said() string {
	text, _ := os.ReadFile(p.log)
	return strings.TrimSpace(string(text))
}

func (p *proxy) stop() error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && p.cmd.ProcessState == nil {
		p.cmd.Process.Kill() //nolint:errcheck // it has ended
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(5 * time.Second):
		p.cmd.Process.Kill() //nolint:errcheck // likewise
		<-p.done
		return nil // connections under way: tinyproxy waits for them
	}
}

// ProxyURL is the proxy as HTTPS_PROXY names it, with Options.Auth's user and
// password given as auth; empty: without.
func ProxyURL(auth string) string {
	if auth != "" {
		auth += "@"
	}
	return "http://" + auth + ProxyAddress
}

// ProxyLog is what the proxy has logged: each CONNECT is there.
func (l *Lab) ProxyLog() string {
	if l.proxy == nil {
		return ""
	}
	return l.proxy.said()
}
