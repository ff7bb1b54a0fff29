package netlab

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
)

// TB is the part of testing.TB that this package needs.
type TB interface {
	Helper()
	Cleanup(func())
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	Skipf(format string, args ...any)
	TempDir() string
}

// Egress is what the firewall lets the customer's side do.
type Egress int

const (
	// Direct lets the customer connect to anything in the cloud.
	Direct Egress = iota
	// Proxy lets the customer reach the proxy on the firewall and nothing else.
	Proxy
	// Closed lets no new connection pass at all.
	Closed
)

// Addresses in every lab: each has namespaces of its own.
const (
	CustomerIP = "10.78.0.2"
	CloudIP    = "10.77.0.2"
	// ProxyAddress is the proxy's, as the customer sees it.
	ProxyAddress = insideIP + ":3128"

	insideIP  = "10.78.0.1" // the firewall's, towards the customer
	outsideIP = "10.77.0.1" // the firewall's, towards the cloud
)

// Options say what the firewall does; the zero value lets the customer out.
type Options struct {
	Egress Egress
	// Auth is "USER:PASSWORD" that the proxy asks for (Basic); empty: nobody is
	// asked.
	Auth string
	// Ports are those that the proxy lets CONNECT reach; empty: any.
	Ports []int
	// Rate bounds each direction, as tc writes it ("10mbit"); empty: unbounded.
	Rate string
}

// Lab is one network.
type Lab struct {
	// Customer, Firewall and Cloud name the network namespaces.
	Customer, Firewall, Cloud string

	proxy *proxy
}

// prefix begins every namespace's name; the process's id and a number follow.
const prefix = "postern-lab-"

var labs atomic.Int32

// RequireRoot skips the test of an ordinary user: namespaces and nftables are
// root's.
func RequireRoot(t TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skipf("needs root: network namespaces and a firewall")
	}
}

// Up makes a lab that lives as long as the test. It skips without root.
func Up(t TB, o Options) *Lab {
	t.Helper()
	RequireRoot(t)
	name := fmt.Sprintf("%s%d-%d-", prefix, os.Getpid(), labs.Add(1))
	l := &Lab{Customer: name + "customer", Firewall: name + "firewall", Cloud: name + "cloud"}
	t.Cleanup(func() {
		if err := l.down(); err != nil {
			t.Errorf("take the network lab down: %v", err)
		}
	})
	if err := sweep(); err != nil {
		t.Fatalf("remove what a killed test left: %v", err)
	}
	if err := l.up(o, t.TempDir()); err != nil {
		t.Fatalf("network lab: %v", err)
	}
	return l
}

func (l *Lab) up(o Options, dir string) error {
	for _, ns := range l.all() {
		if err := run("", "ip", "netns", "add", ns); err != nil {
			return err
		}
		for _, setting := range []string{"all", "default"} { // where the kernel has IPv6 at all
			_ = l.write(ns, "/proc/sys/net/ipv6/conf/"+setting+"/disable_ipv6", "1")
		}
		if err := run("", "ip", "-n", ns, "link", "set", "lo", "up"); err != nil {
			return err
		}
	}
	if err := errors.Join(l.link(l.Customer, "customer", CustomerIP, insideIP), l.link(l.Cloud, "cloud", CloudIP, outsideIP)); err != nil {
		return err
	}
	if err := l.write(l.Firewall, "/proc/sys/net/ipv4/ip_forward", "1"); err != nil {
		return err
	}
	if err := l.nft(ruleset(o)); err != nil {
		return err
	}
	if o.Rate != "" {
		for _, dev := range []string{"customer", "cloud"} {
			if err := run("", "tc", "-n", l.Firewall, "qdisc", "add", "dev", dev, "root", "tbf", "rate", o.Rate, "burst", "32kb", "latency", "100ms"); err != nil {
				return err
			}
		}
	}
	if o.Egress != Proxy {
		return nil
	}
	var err error
	l.proxy, err = startProxy(l.Firewall, dir, o)
	return err
}

// link makes ns's eth0 and the firewall's end of it, called dev.
func (l *Lab) link(ns, dev, address, gateway string) error {
	for _, args := range [][]string{
		{"link", "add", "name", dev, "netns", l.Firewall, "type", "veth", "peer", "name", "eth0", "netns", ns},
		{"-n", l.Firewall, "addr", "add", gateway + "/24", "dev", dev},
		{"-n", l.Firewall, "link", "set", dev, "up"},
		{"-n", ns, "addr", "add", address + "/24", "dev", "eth0"},
		{"-n", ns, "link", "set", "eth0", "up"},
		{"-n", ns, "route", "add", "default", "via", gateway},
	} {
		if err := run("", "ip", args...); err != nil {
			return err
		}
	}
	return nil
}

func (l *Lab) all() []string { return []string{l.Customer, l.Firewall, l.Cloud} }

// write sets a sysctl in a namespace.
func (l *Lab) write(ns, path, value string) error {
	return inside(ns, func() error { return os.WriteFile(path, []byte(value), 0o644) })
}

// down ends the proxy and removes the namespaces; their links go with them.
func (l *Lab) down() error {
	var problems []error
	if l.proxy != nil {
		problems = append(problems, l.proxy.stop())
	}
	for _, ns := range l.all() {
		problems = append(problems, remove(ns))
	}
	return errors.Join(problems...)
}

func remove(ns string) error {
	if _, err := os.Stat(nsPath(ns)); err != nil {
		return nil
	}
	return run("", "ip", "netns", "del", ns)
}

var labName = regexp.MustCompile("^" + prefix + `(\d+)-\d+-(customer|firewall|cloud)$`)

// sweep removes the namespaces of processes that are no more. (Their proxies
// have ended with them.)
func sweep() error {
	entries, err := os.ReadDir(filepath.Dir(nsPath("x")))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		m := labName.FindStringSubmatch(e.Name())
		if m == nil {
			continue
		}
		pid, err := strconv.Atoi(m[1])
		if err != nil || !errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
			continue
		}
		if err := remove(e.Name()); err != nil && !errors.Is(err, os.ErrNotExist) {
			if _, serr := os.Stat(nsPath(e.Name())); serr == nil { // nobody else was faster
				return err
			}
		}
	}
	return nil
}

func nsPath(ns string) string { return "/run/netns/" + ns }

// run runs a command with stdin as its input; the error has what it said.
func run(stdin, program string, args ...string) error {
	cmd := exec.Command(find(program), args...)
	cmd.Stdin = strings.NewReader(stdin)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", program, strings.Join(args, " "), err, bytes.TrimSpace(said.Bytes()))
	}
	return nil
}

// find looks where Debian keeps the administrator's programs too.
func find(program string) string {
	if path, err := exec.LookPath(program); err == nil {
		return path
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if path := filepath.Join(dir, program); isFile(path) {
			return path
		}
	}
	return program
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}
