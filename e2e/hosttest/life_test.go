//go:build hosttest

package hosttest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/postern-dev/postern/agentd/checkpoint/criutest"
)

// criu puts a CRIU that works on this machine's kernel into the host, where agentd
// looks by itself.
func (h *host) criu() {
	h.t.Helper()
	criutest.Path(h.t)
	if _, err := os.Stat("/opt/criu/bin/criu"); err != nil {
		h.t.Fatalf("CRIU has to be in /opt/criu, to be taken into another system: run CRIU_PRIVATE=1 packaging/dev/criu.sh (%v)", err)
	}
	cmd := exec.Command("cp", "-a", "/opt/criu", h.Root()+"/opt/criu")
	if out, err := cmd.CombinedOutput(); err != nil {
		h.t.Fatalf("%v: %s", err, out)
	}
	// For machines that lack CAP_SYS_RESOURCE; the packages are built with the tag that
	// looks for it.
	if lib := criutest.Preload(h.t); lib != "" {
		h.must(h.Copy(h.t.Context(), lib, "/usr/bin/criu-preload.so", 0o755))
	}
}

// restart makes agentd a new process in one of the ways that there are, and waits
// for its link.
func (h *host) restart(how string) {
	h.t.Helper()
	before := h.mainPID("agentd")
	switch how {
	case "systemctl":
		h.run("systemctl", "restart", "agentd")
	case "kill":
		h.run("kill", "-KILL", strconv.Itoa(before))
	case "stop":
		h.run("kill", "-STOP", strconv.Itoa(before))
	}
	h.until("another agentd", func() error {
		if now := h.mainPID("agentd"); now == before || now == 0 {
			return fmt.Errorf("its process is %d, it was %d", now, before)
		}
		return nil
	})
	h.online()
}

// load inserts numbers into the warehouse, one statement after the other, until stop;
// stop returns those that were acknowledged.
func (h *host) load(name string) (stop func() []string) {
	h.t.Helper()
	h.postern("sql", "db-host/warehouse", "create table "+name+" (n bigint)")
	ctx, cancel := context.WithCancel(context.Background())
	script := fmt.Sprintf(`n=0; while [ ! -e /tmp/stop-%[1]s ]; do n=$((n+1)); if postern %[2]s sql db-host/warehouse "insert into %[1]s values ($n)" >/tmp/out-%[1]s 2>&1; then echo $n; else sed 's/^/# /' /tmp/out-%[1]s; sleep 0.1; fi; done >/tmp/done-%[1]s`,
		name, strings.Join(h.asAdmin(nil), " "))
	cmd := h.Command(ctx, "/bin/sh", "-uc", script)
	h.must(cmd.Start())
	h.t.Cleanup(func() {
		cancel()
		_ = cmd.Wait() // again, mostly
	})
	return func() []string {
		h.t.Helper()
		h.run("touch", "/tmp/stop-"+name)
		h.must(cmd.Wait())
		var acknowledged []string
		for line := range strings.Lines(h.run("cat", "/tmp/done-"+name)) {
			line = strings.TrimSpace(line)
			if !strings.HasPrefix(line, "#") {
				acknowledged = append(acknowledged, line)
			} else if !strings.HasPrefix(line, "# postern: ") {
				h.t.Errorf("a statement that failed says %q", line)
			}
		}
		return acknowledged
	}
}

// TestRestarts restarts agentd again and again, by systemctl and by kill -9, while
// statements run, a kernel computes, a mounted file is open and a transaction is.
func TestRestarts(t *testing.T) {
	rounds := 5
	if long {
		rounds = 100
	}
	for _, suite := range suites() {
		t.Run(suite, func(t *testing.T) {
			h := joined(t, suite, newVersion)
			h.mounted("papers")
			id := h.postern("kernel", "start", "db-host")
			h.exec(id, "import time, threading\nticks = []\ndef tick():\n    while True:\n        ticks.append(time.monotonic()); time.sleep(0.05)\nthreading.Thread(target=tick, daemon=True).start()")
			h.sh("mkdir -p /tmp/held; (exec 7>/srv/postern/papers/open.txt; i=0; while [ ! -e /tmp/held/stop ]; do i=$((i+1)); echo $i >&7 || exit 1; sleep 0.05; done; echo $i >/tmp/held/last) </dev/null >/tmp/held/out 2>&1 &")
			open := h.hold("db-host/warehouse")
			open.ask("create temp table scratch as select 42 as i")
			open.ask("begin; insert into scratch values (43)")
			stop := h.load("restarts")
			for i := range rounds {
				h.restart([]string{"systemctl", "kill"}[i%2])
				h.query()
				open.ask("select 1") // or the transaction ends for being idle
			}
			if got := open.ask("select count(*) as n, sum(i) as s from scratch"); !strings.Contains(got, "2,85") {
				t.Errorf("the open transaction says %q", got)
			}
			open.ask("commit")
			acknowledged := stop()
			// Each acknowledged insert is there, once; one that was not may be.
			counts := map[string]int{}
			for _, n := range strings.Fields(h.postern("sql", "db-host/warehouse", "-f", "csv", "select n from restarts")) {
				counts[n]++
			}
			for _, n := range acknowledged {
				if counts[n] != 1 {
					t.Errorf("insert %s was acknowledged and is there %d times", n, counts[n])
				}
			}
			if len(acknowledged) == 0 {
				t.Error("no statement was acknowledged at all")
			}
			t.Logf("%d restarts, %d statements acknowledged", rounds, len(acknowledged))
			if got := h.exec(id, "gaps = [b-a for a, b in zip(ticks, ticks[1:])]\nprint(len(ticks) > 20)"); got != "True" {
				t.Errorf("the kernel ticked on: %s", got)
			}
			h.run("touch", "/tmp/held/stop")
			h.until("the writer to the mount", func() error {
				_, err := h.Run(t.Context(), "test", "-s", "/tmp/held/last")
				return err
			})
			last := h.run("cat", "/tmp/held/last")
			lines := strings.Fields(h.run("cat", "/srv/postern/papers/open.txt"))
			if want, err := strconv.Atoi(last); err != nil || len(lines) != want || lines[len(lines)-1] != last {
				t.Errorf("the mounted file has %d lines, want %s", len(lines), last)
			}
			if out := h.run("cat", "/tmp/held/out"); out != "" {
				t.Errorf("the writer says %q", out)
			}
			h.run("agentd", "audit", "verify")
		})
	}
}

// mounted mounts a new workspace on /srv/postern/NAME.
func (h *host) mounted(name string) {
	h.t.Helper()
	h.sh("mkdir -p /srv/postern/" + name + "; echo hello >/tmp/hello")
	h.postern("file", "put", "/tmp/hello", name+":/hello")
	h.until("the mount", func() error {
		_, err := h.Run(h.t.Context(), "agentd", "mount", name, "/srv/postern/"+name)
		return err
	})
	if got := h.run("cat", "/srv/postern/"+name+"/hello"); got != "hello" {
		h.t.Errorf("the mount holds %q", got)
	}
}

// TestWatchdog: a daemon that hangs is replaced by systemd.
func TestWatchdog(t *testing.T) {
	for _, suite := range suites() {
		t.Run(suite, func(t *testing.T) {
			h := joined(t, suite, newVersion)
			// 30 s are for hosts; the mechanism is the same.
			h.sh("mkdir -p /run/systemd/system/agentd.service.d; printf '[Service]\\nWatchdogSec=3s\\n' >/run/systemd/system/agentd.service.d/test.conf; systemctl daemon-reload; systemctl restart agentd")
			h.online()
			id := h.postern("kernel", "start", "db-host")
			h.exec(id, "x = 42")
			h.restart("stop")
			if out := h.run("journalctl", "--no-pager", "-u", "agentd"); !strings.Contains(out, "Watchdog timeout") {
				t.Error("the journal does not speak of the watchdog")
			}
			if got := h.exec(id, "print(x)"); got != "42" {
				t.Errorf("the kernel says %q", got)
			}
			h.query()
		})
	}
}

// TestReboot: what was suspended before a planned reboot comes back after it.
func TestReboot(t *testing.T) {
	for _, suite := range suites() {
		t.Run(suite, func(t *testing.T) {
			h := boot(t, suite)
			h.criu()
			h.install(newVersion, "postern-agentd", "postern-controlplane", "postern")
			h.prepare()
			h.run("systemctl", "enable", "-q", "postgresql")
			h.key()
			h.run("systemctl", "enable", "--now", "-q", "agentd")
			h.online()
			id := h.postern("kernel", "start", "db-host")
			h.exec(id, "x = list(range(1000))")
			checkpoint := h.postern("kernel", "checkpoint", id)
			if checkpoint == "" {
				t.Error("a checkpoint has no id")
			}
			h.exec(id, "x.append('later')")
			h.postern("kernel", "suspend", id)
			h.must(h.PowerOff())
			h.must(h.Start(t.Context()))
			h.online()
			h.postern("kernel", "resume", id)
			if got := h.exec(id, "print(len(x), x[-1])"); got != "1001 later" {
				t.Errorf("after the reboot the kernel says %q", got)
			}
			h.query()
			if out, err := h.Run(t.Context(), "systemctl", "--failed", "--no-legend"); err != nil || strings.TrimSpace(out) != "" {
				t.Errorf("failed units: %s %v", out, err)
			}
		})
	}
}
