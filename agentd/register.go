package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/postern-dev/postern/agentd/audit"
	"github.com/postern-dev/postern/agentd/config"
	"github.com/postern-dev/postern/agentd/identity"
	"github.com/postern-dev/postern/agentd/link"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/regkey"
)

// registerTimeout bounds a registration.
const registerTimeout = time.Minute

type registerCommand struct {
	places
	url, keyFile, name, caFile string
	force                      bool
	in                         *os.File
	out, errs                  io.Writer
}

func newRegister() *cobra.Command {
	r := &registerCommand{}
	cmd := &cobra.Command{
		Use:   "register --url URL [--key-file FILE|-]",
		Short: "join this host to a control plane with a registration key",
		Long: `Join this host to a control plane. The key that "postern key create" printed is read
from a file, from standard input (-), or asked for on a terminal; it is never taken
from the command line or the environment. Nothing secret is sent before the control
plane has proved that it is the one that made the key.`,
		Example: "  postern key create --ttl 1h | sudo agentd register --url https://cp.example.com --key-file -",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			harden(slog.New(slog.DiscardHandler)) // it holds the key
			r.in, r.out, r.errs = os.Stdin, cmd.OutOrStdout(), cmd.ErrOrStderr()
			return r.run(cmd.Context())
		},
	}
	r.flags(cmd, "config", "state")
	f := cmd.Flags()
	f.StringVar(&r.url, "url", "", "`URL` of the control plane, such as https://cp.example.com (default: url in the configuration)")
	f.StringVar(&r.keyFile, "key-file", "", "`FILE` with the registration key, - for standard input (default: ask on the terminal)")
	f.StringVar(&r.name, "name", "", "`NAME` that this agent would like (default: name in the configuration, else the host name)")
	f.StringVar(&r.caFile, "ca-file", "", "PEM `FILE` with CAs of an inspecting proxy or load balancer, beside the system's")
	f.BoolVar(&r.force, "force", false, "replace the identity that this host has")
	return cmd
}

func (r *registerCommand) run(ctx context.Context) error {
	if ctx == nil {
		ctx = context.Background()
	}
	ctx, cancel := context.WithTimeout(ctx, registerTimeout)
	defer cancel()
	c, _, err := r.loadConfig()
	if err != nil {
		return err
	}
	if r.caFile != "" {
		if c.OuterCAs, err = config.ReadBundle(r.caFile); err != nil {
			return usagef("--ca-file: %v", err)
		}
	}
	if r.url == "" {
		r.url = c.URL
	}
	if r.url == "" {
		return usagef("register: no control plane: give --url https://cp.example.com")
	}
	target, err := config.TunnelURL(r.url)
	if err != nil {
		return usagef("--url: %v", err)
	}
	name, err := r.agentName(c)
	if err != nil {
		return err
	}
	key, err := r.readKey()
	if err != nil {
		return err
	}
	unlock, err := lockState(r.state)
	if err != nil {
		return err
	}
	defer unlock()
	enrolment, err := identity.Enrol(r.state, r.force)
	if err != nil {
		return err
	}
	defer enrolment.Abandon() //nolint:errcheck // after Finish there is nothing left
	csr, err := enrolment.CSR()
	if err != nil {
		return err
	}
	uplinks := newUplinks("", c, slog.Default())
	defer uplinks.Close()
	response, err := link.Register(ctx, link.RegisterConfig{
		URL: target, TLS: identity.PinnedTLS(key.Fingerprint), Proxy: c.Proxy, Carrier: uplinks.Carrier,
		Request: &posternv1.RegisterRequest{KeyId: key.ID, KeySecret: key.Secret[:], Csr: csr, Name: name, Host: hostFacts()},
	})
	if err != nil {
		return fmt.Errorf("register at %s: %w", r.url, err)
	}
	agent := identity.Agent{AgentID: response.AgentId, Name: response.Name, Organization: response.Organization, URL: r.url}
	if err := enrolment.Finish(agent, response.Certificate, response.Authorities); err != nil {
		return fmt.Errorf("keep the identity in %s: %w", r.state, err)
	}
	if err := r.record(ctx, agent); err != nil {
		fmt.Fprintf(r.errs, "agentd: warning: the registration is not in the audit log: %v\n", err) //nolint:errcheck // a warning
	}
	_, err = fmt.Fprintf(r.out, "registered as agent %s (%s) at %s\n", agent.Name, agent.AgentID, r.url)
	return err
}

func (r *registerCommand) record(ctx context.Context, a identity.Agent) error {
	log, _, err := audit.Open(r.state, audit.Config{})
	if err != nil {
		return err
	}
	defer log.Close() //nolint:errcheck // Append has synced
	return log.Append(ctx, auditchain.Entry{
		Action: "agent.register", Actor: "host", Agent: a.Name, Organization: a.Organization, Target: a.AgentID, Outcome: "done", Remote: a.URL,
	})
}

var notInNames = regexp.MustCompile(`[^a-z0-9]+`)

// agentName is the name to ask for.
func (r *registerCommand) agentName(c *config.Config) (string, error) {
	for _, given := range []string{r.name, c.Name} {
		if given == "" {
			continue
		}
		if strings.Contains(given, "prk1_") {
			return "", usagef("--name wants a name, not the key: a command line can be read by everybody on this host, so revoke that key")
		}
		if !config.ValidName(given) {
			return "", usagef("--name: %q is not 1 to 63 of a-z, 0-9 and -, beginning and ending with a letter or digit", given)
		}
		return given, nil
	}
	host, err := os.Hostname()
	if err != nil {
		return "", fmt.Errorf("host name: %w: give --name", err)
	}
	host, _, _ = strings.Cut(strings.ToLower(host), ".")
	name := strings.Trim(notInNames.ReplaceAllString(host, "-"), "-")
	name = strings.Trim(name[:min(len(name), 63)], "-")
	if !config.ValidName(name) {
		return "", usagef("register: this host's name makes no agent's name: give --name")
	}
	return name, nil
}

// maxKeyFile bounds what is read in search of a key, in bytes.
const maxKeyFile = 4096

func (r *registerCommand) readKey() (regkey.Key, error) {
	var text []byte
	var err error
	switch r.keyFile {
	case "":
		if !term.IsTerminal(int(r.in.Fd())) {
			return regkey.Key{}, usagef("register: no key: give --key-file FILE, or --key-file - for standard input")
		}
		text, err = r.ask("registration key: ")
	case "-":
		text, err = io.ReadAll(io.LimitReader(r.in, maxKeyFile))
	default:
		if strings.HasPrefix(r.keyFile, "prk1_") {
			return regkey.Key{}, usagef("--key-file wants a file, not the key itself: a command line can be read by everybody on this host, so revoke that key")
		}
		var f *os.File
		if f, err = os.Open(r.keyFile); err == nil {
			defer f.Close() //nolint:errcheck // it is only read
			if st, serr := f.Stat(); serr == nil && st.Mode().IsRegular() && st.Mode().Perm()&0o004 != 0 {
				fmt.Fprintf(r.errs, "agentd: warning: %s can be read by everybody on this host: remove it, or chmod 600 it\n", r.keyFile) //nolint:errcheck // a warning
			}
			text, err = io.ReadAll(io.LimitReader(f, maxKeyFile))
		}
	}
	if err != nil {
		return regkey.Key{}, fmt.Errorf("read the registration key: %w", err)
	}
	defer clear(text)
	return regkey.Parse(string(text))
}

// ask reads a line from the terminal without echo. The echo is off before the
// prompt is there: a key that is pasted at once would be shown otherwise.
func (r *registerCommand) ask(prompt string) ([]byte, error) {
	fd := int(r.in.Fd())
	was, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, err
	}
	silent := *was
	silent.Lflag &^= unix.ECHO
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, &silent); err != nil {
		return nil, err
	}
	defer unix.IoctlSetTermios(fd, unix.TCSETS, was) //nolint:errcheck // it was set before
	fmt.Fprint(r.errs, prompt)                       //nolint:errcheck // a prompt
	text, err := term.ReadPassword(fd)
	fmt.Fprintln(r.errs) //nolint:errcheck // a prompt
	return text, err
}

// lockWait is how long the lock may be held by what is left of a killed agentd: a
// child between fork and exec has its descriptors for a moment.
const lockWait = 1500 * time.Millisecond

// lockState keeps a second agentd off the state directory until unlock.
func lockState(dir string) (unlock func(), err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	f, err := os.OpenFile(dir+"/agentd.lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	for end := time.Now().Add(lockWait); errors.Is(err, unix.EWOULDBLOCK) && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	if err != nil {
		f.Close() //nolint:errcheck // nothing was written
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, proto.Errorf(proto.CodeAlreadyExists, "another agentd uses the state directory %s: stop it first, or give another --state", dir)
		}
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return func() { f.Close() }, nil //nolint:errcheck // the lock goes with it
}

// hostFacts describes this machine.
func hostFacts() *posternv1.HostFacts {
	facts := &posternv1.HostFacts{}
	facts.Hostname, _ = os.Hostname() //nolint:errcheck // unknown is ""
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		facts.Kernel = unix.ByteSliceToString(u.Release[:])
		facts.Arch = unix.ByteSliceToString(u.Machine[:])
		facts.Os = unix.ByteSliceToString(u.Sysname[:])
	}
	if raw, err := os.ReadFile("/etc/os-release"); err == nil {
		for line := range strings.Lines(string(raw)) {
			if value, ok := strings.CutPrefix(strings.TrimSpace(line), "PRETTY_NAME="); ok {
				facts.Os = strings.Trim(value, `"'`)
			}
		}
	}
	return facts
}
