package doctor

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/tunnel"
)

// Result is what a check came to.
type Result string

// The results.
const (
	OK      Result = "ok"
	Warning Result = "warning"
	Failed  Result = "failed"
)

// Check is one line.
type Check struct {
	Name    string `json:"name"`
	Result  Result `json:"result"`
	Message string `json:"message"`
	// Remedy is what to do about it; empty when all is well.
	Remedy string `json:"remedy,omitempty"`
}

// Report collects checks in their order.
type Report struct{ Checks []Check }

// Add appends a check.
func (r *Report) Add(name string, result Result, message, remedy string) {
	r.Checks = append(r.Checks, Check{name, result, oneLine(message), oneLine(remedy)})
}

// Failed reports whether a check failed.
func (r *Report) Failed() bool {
	for _, c := range r.Checks {
		if c.Result == Failed {
			return true
		}
	}
	return false
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

// Space that the state directory should have, in bytes.
const (
	spaceFailed  = 16 << 20
	spaceWarning = 512 << 20
)

// State checks the state directory: there, ours, closed to others, with space.
func (r *Report) State(dir string) {
	const name = "state directory"
	st, err := os.Stat(dir)
	switch {
	case err != nil:
		r.Add(name, Failed, err.Error(), "make it with mkdir -m 0700 "+dir+", or give --state")
		return
	case !st.IsDir():
		r.Add(name, Failed, dir+" is no directory", "give --state")
		return
	case st.Mode().Perm()&0o077 != 0:
		r.Add(name, Warning, fmt.Sprintf("%s is open to others (mode %04o)", dir, st.Mode().Perm()), "run chmod 0700 "+dir)
	default:
		r.Add(name, OK, fmt.Sprintf("%s, mode %04o", dir, st.Mode().Perm()), "")
	}
	if err := unix.Access(dir, unix.W_OK); err != nil {
		r.Add(name, Failed, dir+" cannot be written: "+err.Error(), "run as the user of agentd (root), and look whether the disk is read-only")
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		r.Add("disk space", Warning, err.Error(), "")
		return
	}
	free := uint64(fs.Bavail) * uint64(fs.Bsize)
	text := fmt.Sprintf("%d MiB free in %s", free>>20, dir)
	const remedy = "make space: when the audit log cannot be written, statements are refused"
	switch {
	case free < spaceFailed:
		r.Add("disk space", Failed, text, remedy)
	case free < spaceWarning:
		r.Add("disk space", Warning, text, remedy)
	default:
		r.Add("disk space", OK, text, "")
	}
}

// certificateSoon is when an expiry is worth a warning: a renewal was due long
// before.
const certificateSoon = 6

// Certificate checks the identity's certificate against the clock.
func (r *Report) Certificate(from, to, now time.Time) {
	left := to.Sub(now).Round(time.Second)
	switch {
	case now.Before(from):
		r.Add("certificate", Failed, fmt.Sprintf("it is valid from %s, and this host's clock says %s", stamp(from), stamp(now)), "mend the clock (is NTP running?)")
	case left <= 0:
		r.Add("certificate", Warning, "it expired at "+stamp(to), "start agentd: it rejoins by itself within the grace period; after that register again with a new key")
	case left < to.Sub(from)/certificateSoon:
		r.Add("certificate", Warning, fmt.Sprintf("it expires in %s, and was not renewed in time", left), "see why the link is down: the certificate is renewed over it")
	default:
		r.Add("certificate", OK, fmt.Sprintf("valid until %s", stamp(to)), "")
	}
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// Skew checks the difference between this host's clock and the control plane's.
func (r *Report) Skew(skew time.Duration) {
	text := fmt.Sprintf("%s off the control plane's", skew.Round(time.Millisecond))
	switch {
	case skew.Abs() > 5*time.Minute:
		r.Add("clock", Failed, text, "mend the clock (is NTP running? timedatectl says)")
	case skew.Abs() > 30*time.Second:
		r.Add("clock", Warning, text, "mend the clock (is NTP running? timedatectl says)")
	default:
		r.Add("clock", OK, text, "")
	}
}

// steps are those of a dial, with the names that a person knows.
var steps = []struct {
	step tunnel.Step
	name string
	fine string
}{
	{tunnel.StepDNS, "dns", "the control plane's name has an address"},
	{tunnel.StepTCP, "tcp", "connected"},
	{tunnel.StepProxy, "proxy", "the proxy lets the tunnel through"},
	{tunnel.StepOuterTLS, "tls", "the outer certificate is trusted"},
	{tunnel.StepUpgrade, "websocket", "the endpoint speaks WebSocket"},
	{tunnel.StepInnerTLS, "inner tls", "it is the control plane that this host was registered with"},
	{tunnel.StepHello, "tunnel", "a tunnel comes up"},
}

// Dial opens a tunnel, step by step, asks one question to learn whether this
// host is welcome, and closes it. It says no hello, so that a tunnel which the
// running agentd has stays what it is.
func (r *Report) Dial(ctx context.Context, cfg tunnel.DialConfig, proxied bool) {
	ctx, cancel := context.WithTimeout(ctx, 45*time.Second)
	defer cancel()
	t, err := tunnel.Dial(ctx, cfg)
	failed := tunnel.FailedStep(err)
	if err != nil && (failed == "" || failed == tunnel.StepConfig) {
		r.Add("tunnel", Failed, err.Error(), "mend url in the configuration")
		return
	}
	if failed == tunnel.StepUplink {
		r.Add("uplink", Failed, err.Error(), "see the line sandbox above, and what the log says of the uplink")
		return
	}
	for _, s := range steps {
		if s.step == tunnel.StepProxy && !proxied && failed != s.step ||
			s.step == tunnel.StepOuterTLS && !strings.HasPrefix(cfg.URL, "wss") && failed != s.step {
			continue
		}
		if err != nil && s.step == failed {
			r.dialFailed(s.name, err)
			return
		}
		r.Add(s.name, OK, s.fine, "")
	}
	defer t.Close(nil) //nolint:errcheck // it served its turn
	probe := connect.NewClient[emptypb.Empty, emptypb.Empty](&http.Client{Transport: t.Transport(tunnel.Control)}, "http://controlplane/postern.v1.LinkService/Probe")
	_, err = probe.CallUnary(ctx, connect.NewRequest(&emptypb.Empty{}))
	code := proto.CodeOf(proto.FromConnect(err))
	switch {
	case code == proto.CodeNotFound, connect.CodeOf(err) == connect.CodeUnimplemented: // a member may ask, and this does not exist
		r.Add("admission", OK, "the control plane knows this host", "")
	case code == proto.CodeIdentityExpired:
		r.Add("admission", Warning, proto.FromConnect(err).Error(), "start agentd: it rejoins by itself")
	default:
		r.Add("admission", Failed, proto.FromConnect(err).Error(), "register again with a new key, or ask who runs the control plane")
	}
}

func (r *Report) dialFailed(name string, err error) {
	var d *tunnel.DialError
	errors.As(err, &d)
	remedy := d.Hint
	if remedy == "" {
		remedy = "look at " + d.Target + " from this host"
	}
	var said *proto.Error
	if errors.As(err, &said) {
		r.Add(name, Failed, said.Error(), remedy)
		return
	}
	r.Add(name, Failed, fmt.Sprintf("%s: %v", d.Target, d.Err), remedy)
}

// Inner is a TLS configuration for Dial without the host's certificate.
func Inner(c *tls.Config) *tls.Config {
	c = c.Clone()
	c.Certificates, c.GetClientCertificate = nil, nil
	return c
}

// Sandbox checks what SQL sessions need of the system: a user of their own each.
func (r *Report) Sandbox(uidBase, count uint32) {
	const name = "sandbox"
	if os.Geteuid() != 0 {
		r.Add(name, Warning, "not root: SQL sessions would share agentd's user", "run agentd as root (its unit does); as another user the rest of the sandbox still holds")
		return
	}
	if user := userInRange("/etc/passwd", uidBase, count); user != "" {
		r.Add(name, Failed, fmt.Sprintf("user %s has one of the ids %d to %d, which SQL sessions run as", user, uidBase, uidBase+count-1), "set sql.uid_base to a free range")
		return
	}
	if n, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0); err != nil || n < 0 {
		r.Add(name, Failed, "the kernel has no no_new_privs", "use a kernel of 3.5 or later")
		return
	}
	if err := mayChangeUser(); err != nil {
		r.Add(name, Failed, err.Error(), "give agentd CAP_SETUID and CAP_SETGID (its unit does)")
		return
	}
	r.Add(name, OK, fmt.Sprintf("SQL sessions run as users %d to %d, each its own", uidBase, uidBase+count-1), "")
}

func mayChangeUser() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	for name, c := range map[string]uint{"CAP_SETUID": unix.CAP_SETUID, "CAP_SETGID": unix.CAP_SETGID} {
		if data[0].Effective&(1<<c) == 0 {
			return fmt.Errorf("this process lacks %s", name)
		}
	}
	return nil
}

// userInRange finds an account whose id SQL sessions would use.
func userInRange(passwd string, base, count uint32) string {
	f, err := os.Open(passwd)
	if err != nil {
		return ""
	}
	defer f.Close() //nolint:errcheck // it is only read
	for lines := bufio.NewScanner(f); lines.Scan(); {
		fields := strings.Split(lines.Text(), ":")
		if len(fields) < 3 {
			continue
		}
		if id, err := strconv.ParseUint(fields[2], 10, 32); err == nil && uint32(id) >= base && uint32(id)-base < count {
			return fields[0]
		}
	}
	return ""
}
