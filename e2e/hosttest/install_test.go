//go:build hosttest

package hosttest

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

// readyGoal is how long agentd may take from systemctl to its first answer; a busy
// machine gets more before the test fails.
const (
	readyGoal  = 10 * time.Second
	readyLimit = 60 * time.Second
)

// TestInstall goes the administrator's way on a fresh host: install, put the key in
// place, enable; then the demo query and a kernel.
func TestInstall(t *testing.T) {
	for _, suite := range suites() {
		t.Run(suite, func(t *testing.T) {
			h := boot(t, suite)
			h.install(oldVersion, "postern-agentd", "postern-controlplane", "postern")
			for _, unit := range []string{"agentd", "agentd-mountd", "controlplane"} {
				state, _ := h.Run(t.Context(), "systemctl", "is-enabled", unit)
				active, _ := h.Run(t.Context(), "systemctl", "is-active", unit)
				if strings.TrimSpace(state) != "disabled" || strings.TrimSpace(active) != "inactive" {
					t.Errorf("after the installation %s is %q and %q", unit, state, active)
				}
			}
			if line := h.fails(1, "agentd", "run"); !strings.Contains(line, "not registered") || !strings.Contains(line, "agentd register") {
				t.Errorf("agentd run without a registration says %q", line)
			}
			h.prepare()
			h.key()
			began := time.Now()
			h.run("systemctl", "enable", "--now", "-q", "agentd")
			h.until("a query", func() error {
				_, err := h.tryPostern("sql", "db-host/shop", "select 1")
				return err
			})
			took := time.Since(began)
			verdict := "ok"
			if took > readyGoal {
				verdict = "short"
			}
			fmt.Printf("figure host_ready_seconds_%s %.2f %.0f %s\n", suite, took.Seconds(), readyGoal.Seconds(), verdict)
			if took > readyLimit {
				t.Errorf("ready after %s", took)
			}
			if left, err := h.Run(t.Context(), "sh", "-c", "[ ! -s /etc/postern/registration.key ]"); err != nil {
				t.Errorf("the key is still there: %v %s", err, left)
			}
			h.query()
			id := h.postern("kernel", "start", "db-host")
			if got := h.exec(id, "print(6*7)"); got != "42" {
				t.Errorf("the kernel says %q", got)
			}
			h.inWorkload()
			h.postern("kernel", "stop", id)
			if out, err := h.Run(t.Context(), "agentd", "doctor"); err != nil {
				t.Errorf("doctor: %v\n%s", err, out)
			}
			h.security()
		})
	}
}

// inWorkload checks that kernels are in the slice of all workloads, and that it has limits.
func (h *host) inWorkload() {
	h.t.Helper()
	if out := h.run("/bin/sh", "-c", "cat /sys/fs/cgroup/postern.slice/postern-workload.slice/agentd-workload.service/postern-kernels/*/cgroup.procs"); strings.TrimSpace(out) == "" {
		h.t.Error("no process of a kernel is in the slice of workloads")
	}
	for _, limit := range []string{"MemoryHigh", "MemoryMax", "TasksMax", "CPUWeight"} {
		value := strings.TrimSpace(h.run("systemctl", "show", "--value", "-p", limit, "postern-workload.slice"))
		if value == "" || value == "infinity" || value == "[not set]" {
			h.t.Errorf("%s of the workloads is %q", limit, value)
		}
	}
}

// scores are the most that systemd-analyze security may say of a unit, in tenths.
// docs/privileges.md explains what is left.
var scores = map[string]int{"controlplane.service": 15, "agentd.service": 82, "agentd-mountd.service": 68, "agentd-workload.service": 58}

// security holds the units against systemd's own score, and their files against its
// parser.
func (h *host) security() {
	h.t.Helper()
	for unit, most := range scores {
		out, err := h.Run(h.t.Context(), "systemd-analyze", "security", "--no-pager", fmt.Sprintf("--threshold=%d", most), unit)
		lines := strings.Split(strings.TrimSpace(out), "\n")
		fmt.Printf("%s %s: %s\n", h.suite, unit, lines[len(lines)-1])
		if err != nil {
			h.t.Errorf("%s: %v\n%s", unit, err, out)
		}
		out, err = h.Run(h.t.Context(), "systemd-analyze", "verify", "--man=no", unit)
		if err != nil || strings.Contains(out, "Unknown") {
			h.t.Errorf("%s: %v %s", unit, err, out)
		}
	}
}

// TestPackages upgrades, downgrades, removes and purges, with a kernel that runs on
// through the first two.
func TestPackages(t *testing.T) {
	for _, suite := range suites() {
		t.Run(suite, func(t *testing.T) {
			h := joined(t, suite, oldVersion)
			id := h.postern("kernel", "start", "db-host")
			h.exec(id, "x = 41")
			for _, version := range []string{newVersion, oldVersion, newVersion} {
				before := h.mainPID("agentd")
				h.install(version, "postern-agentd", "postern-controlplane", "postern")
				if after := h.mainPID("agentd"); after == before {
					t.Errorf("%s: agentd was not restarted", version)
				}
				if got := h.run("agentd", "version"); !strings.Contains(got, version) {
					t.Errorf("agentd version says %q, want %s", got, version)
				}
				h.online()
				h.until("the new agentd at the control plane", func() error {
					if out, err := h.tryPostern("agent", "show", "db-host", "-o", "json"); err != nil || !strings.Contains(out, version) {
						return fmt.Errorf("%w: %s", errors.Join(err, errors.New("not yet")), out)
					}
					return nil
				})
				h.query()
				if got := h.exec(id, "x += 1; print(x)"); got == "" {
					t.Error("the kernel lost its variables")
				}
				if got := h.run("cat", "/etc/postern/agentd.yaml"); got != strings.TrimSpace(config) {
					t.Errorf("%s: the configuration is now %q", version, got)
				}
			}
			if got := h.exec(id, "print(x)"); got != "44" {
				t.Errorf("after three upgrades the kernel says %q", got)
			}

			h.run("dpkg", "--remove", "postern-agentd", "postern-controlplane")
			for _, path := range []string{"/etc/postern/agentd.yaml", "/etc/default/postern-controlplane", "/var/lib/postern-agentd/identity/agent.json", "/var/lib/postern-controlplane/admin.token"} {
				h.run("test", "-e", path)
			}
			h.nothingRuns()
			h.install(newVersion, "postern-agentd", "postern-controlplane")
			h.run("systemctl", "start", "controlplane", "agentd")
			if got := h.run("systemctl", "is-enabled", "agentd"); got != "enabled" {
				t.Errorf("after a removal and an installation agentd is %s", got)
			}
			h.online()
			h.query()

			h.run("dpkg", "--purge", "postern-agentd", "postern-controlplane", "postern")
			h.nothingRuns()
			if got := h.sh("ls -d /etc/postern/agentd.yaml /etc/default/postern-controlplane /var/lib/postern* /var/lib/private/postern* /run/postern* /etc/systemd/system/*/agentd* /etc/systemd/system/agentd* /usr/bin/agentd 2>/dev/null || true"); got != "" {
				t.Errorf("a purge left %s", got)
			}
		})
	}
}

// nothingRuns: no process of ours is left.
func (h *host) nothingRuns() {
	h.t.Helper()
	h.until("all processes to end", func() error {
		out, err := h.Run(h.t.Context(), "/bin/sh", "-c", `for p in /proc/[0-9]*; do e=$(readlink "$p/exe" 2>/dev/null) || continue; case $e in /usr/bin/agentd*|/usr/bin/controlplane*|/usr/bin/postern*) echo "$p $e $(tr '\0' ' ' <"$p/cmdline" | cut -c1-80)";; esac; done`)
		if err != nil {
			return err
		}
		if out != "" {
			return fmt.Errorf("there are still %s", out)
		}
		return nil
	})
}

// TestSQLOnly: with the drop-in for hosts that only answer SQL those work, and kernels are
// refused with a line.
func TestSQLOnly(t *testing.T) {
	for _, suite := range suites() {
		t.Run(suite, func(t *testing.T) {
			h := boot(t, suite)
			h.install(newVersion, "postern-agentd", "postern-controlplane", "postern")
			h.prepare()
			_, sources, _ := strings.Cut(config, "sources:")
			h.must(h.WriteFile("/etc/postern/agentd.yaml", []byte("url: http://127.0.0.1:8080\nname: db-host\nsources:"+sources), 0o600))
			h.must(h.Copy(t.Context(), "../../systemd/agentd-sql-only.conf", "/etc/systemd/system/agentd.service.d/sql-only.conf", 0o644))
			h.run("systemctl", "daemon-reload")
			h.key()
			h.run("systemctl", "enable", "--now", "-q", "agentd")
			h.online()
			h.query()
			open := h.hold("db-host/warehouse")
			open.ask("create temp table scratch as select 42 as i")
			for _, how := range []string{"systemctl", "kill"} {
				h.restart(how)
				h.query()
				if got := open.ask("select i from scratch"); !strings.Contains(got, "42") {
					t.Errorf("after %s the open session says %q", how, got)
				}
			}
			if _, err := h.tryPostern("kernel", "start", "db-host"); err == nil || strings.Contains(h.stderr(err), "\n") {
				t.Errorf("a kernel: %v", err)
			}
			out, err := h.Run(t.Context(), "systemd-analyze", "security", "--no-pager", "--threshold=30", "agentd.service")
			lines := strings.Split(strings.TrimSpace(out), "\n")
			fmt.Printf("%s agentd.service with agentd-sql-only.conf: %s\n", suite, lines[len(lines)-1])
			if err != nil {
				t.Error(err)
			}
			// Without attachments: nothing keeps mounts.
			h.until("agentd-mountd to end by itself", func() error {
				if got := h.property("agentd-mountd", "ActiveState"); got != "inactive" {
					return errors.New(got)
				}
				return nil
			})
		})
	}
}
