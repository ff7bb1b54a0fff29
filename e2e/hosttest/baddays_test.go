//go:build hosttest

package hosttest

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

// refused runs one of the user's commands, which must fail with one line that says
// something, and returns that.
func (h *host) refused(says string, args ...string) {
	h.t.Helper()
	line := ""
	_, err := h.tryPostern(args...)
	if err != nil {
		line = h.stderr(err)
	}
	if err == nil || strings.Contains(line, "\n") || !strings.Contains(line, says) {
		h.t.Errorf("postern %v: says %q, want one line with %q", args, line, says)
	}
}

// TestBadDays takes one thing after the other away from a host. Each gives one clear
// line, the rest goes on, and it comes back by itself when the thing does.
func TestBadDays(t *testing.T) {
	for _, suite := range suites() {
		t.Run(suite, func(t *testing.T) {
			h := bootWith(t, suite) // neither CRIU nor /dev/fuse
			h.install(newVersion, "postern-agentd", "postern-controlplane", "postern")
			h.sh("mkdir -m 700 /var/lib/postern-agentd; mount -t tmpfs -o size=96m,mode=0700 tmpfs /var/lib/postern-agentd")
			h.prepare()
			h.key()
			h.run("systemctl", "enable", "--now", "-q", "agentd")
			h.online()
			id := h.postern("kernel", "start", "db-host")
			h.exec(id, "x = 42")
			well := func(when string) {
				t.Helper()
				h.query()
				if got := h.exec(id, "print(x)"); got != "42" {
					t.Errorf("%s the kernel says %q", when, got)
				}
			}

			t.Run("no CRIU", func(t *testing.T) {
				h.t = t
				h.refused("CRIU", "kernel", "checkpoint", id)
				h.doctor("criu")
				well("without CRIU")
			})
			t.Run("no FUSE", func(t *testing.T) {
				h.t = t
				h.sh("mkdir -p /srv/postern/papers; echo hello >/tmp/hello")
				h.postern("file", "put", "/tmp/hello", "papers:/hello")
				line := h.fails(1, "agentd", "mount", "papers", "/srv/postern/papers")
				if !strings.Contains(line, "/dev/fuse") {
					t.Errorf("agentd mount says %q", line)
				}
				h.doctor("fuse")
				well("without FUSE")
			})
			t.Run("full disk", func(t *testing.T) {
				h.t = t
				h.sh("dd if=/dev/zero of=/var/lib/postern-agentd/filler bs=64k 2>/dev/null || true")
				h.until("statements to be refused", func() error {
					_, err := h.tryPostern("sql", "db-host/warehouse", "create table if not exists full_disk (n int)")
					if line := h.stderr(err); err == nil || !strings.Contains(line, "disk") && !strings.Contains(line, "space") || strings.Contains(line, "\n") {
						return fmt.Errorf("says %q", line)
					}
					return nil
				})
				if got := h.property("agentd", "ActiveState"); got != "active" {
					t.Errorf("with a full disk agentd is %s", got)
				}
				h.run("rm", "/var/lib/postern-agentd/filler")
				h.until("statements to run again", func() error {
					_, err := h.tryPostern("sql", "db-host/warehouse", "create table if not exists full_disk (n int)")
					return err
				})
				well("with space again")
				h.run("agentd", "audit", "verify")
			})
			t.Run("state directory that can't be written", func(t *testing.T) {
				h.t = t
				h.postern("kernel", "stop", id) // it has files there that are open for writing
				h.run("systemctl", "stop", "agentd", "agentd-mountd")
				h.run("mount", "-o", "remount,bind,ro", "/var/lib/postern-agentd")
				since := h.run("date", "+%s")
				_, err := h.Run(t.Context(), "systemctl", "start", "agentd")
				if err == nil {
					t.Error("agentd started without a state directory")
				}
				h.until("one clear line", func() error {
					out := h.run("journalctl", "--no-pager", "-o", "cat", "-u", "agentd", "--since", "@"+since)
					for line := range strings.Lines(out) {
						if strings.HasPrefix(line, "agentd: ") && strings.Contains(line, "read-only file system") {
							return nil
						}
					}
					return errors.New(out)
				})
				h.run("mount", "-o", "remount,bind,rw", "/var/lib/postern-agentd")
				h.until("agentd to come back by itself", func() error { return h.active("agentd") })
				h.online()
				h.query()
			})
			t.Run("key that others can read", func(t *testing.T) {
				h.t = t
				h.run("chmod", "644", "/var/lib/postern-agentd/identity/key.pem")
				since := h.run("date", "+%s")
				if _, err := h.Run(t.Context(), "systemctl", "restart", "agentd"); err == nil {
					t.Error("agentd started with a key that others can read")
				}
				h.until("one clear line", func() error {
					out := h.run("journalctl", "--no-pager", "-o", "cat", "-u", "agentd", "--since", "@"+since)
					if !strings.Contains(out, "agentd: ") || !strings.Contains(out, "chmod") {
						return errors.New(out)
					}
					return nil
				})
				h.run("chmod", "600", "/var/lib/postern-agentd/identity/key.pem")
				h.until("agentd to come back by itself", func() error { return h.active("agentd") })
				h.online()
			})
			t.Run("configuration with a mistake", func(t *testing.T) {
				h.t = t
				h.sh("echo 'sourcs: []' >>/etc/postern/agentd.yaml; systemctl reload agentd")
				h.until("one clear line", func() error {
					out := h.run("journalctl", "--no-pager", "-o", "cat", "-u", "agentd", "-n", "20")
					if !strings.Contains(out, "did you mean sources") {
						return errors.New(out)
					}
					return nil
				})
				h.query() // the old one stays in force
			})
			h.t = t
		})
	}
}

// active says whether a unit is.
func (h *host) active(unit string) error {
	if got := h.property(unit, "ActiveState"); got != "active" {
		return fmt.Errorf("%s is %s", unit, got)
	}
	return nil
}

// doctor names what is missing, and how to mend it.
func (h *host) doctor(what string) {
	h.t.Helper()
	out, err := h.Run(h.t.Context(), "agentd", "doctor")
	if err == nil && !strings.Contains(out, "warning") {
		h.t.Errorf("doctor finds nothing: %s", out)
	}
	lines := strings.Split(out, "\n")
	for i, line := range lines {
		if !strings.HasPrefix(line, "ok") && strings.Contains(strings.ToLower(line), what) && i+1 < len(lines) && strings.Contains(lines[i+1], "->") {
			return
		}
	}
	h.t.Errorf("doctor does not name %s with a remedy:\n%s", what, out)
}
