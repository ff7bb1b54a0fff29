package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/postern-dev/postern/agentd/uplink"
	"github.com/postern-dev/postern/tunnel"
	"github.com/postern-dev/postern/tunnel/tunneltest"
)

// benchUplink is what it costs the host that the tunnel's connections are made in a
// process of their own: CPU of a result on its way up, round trips, memory.
func benchUplink(ctx context.Context, o Options, r *Report) error {
	agentd, err := filepath.Abs(filepath.Join(o.Bin, "agentd"))
	if err != nil {
		return err
	}
	n, total := 3, int64(1<<30)
	if o.Short {
		n, total = 1, 1<<28
	}
	found := map[string][]uplinkFigures{}
	for range n {
		for _, kind := range []string{"none", "uplink"} {
			f, err := uplinkOnce(ctx, kind == "uplink", agentd, total)
			if err != nil {
				return fmt.Errorf("%s: %w", kind, err)
			}
			r.Printf("%-6s solo %5.0f MB/s, agentd %.2f, uplink %.2f CPU ms/MB; acceptor %.2f; echo p50 %.3f p99 %.3f ms; uplink idle %d KiB of its own, after the load %d KiB, dialed in %.1f ms", kind,
				f.rate, f.agentd, f.uplink, f.acceptor, f.p50, f.p99, f.idle>>10, f.after>>10, f.dial)
			found[kind] = append(found[kind], f)
		}
	}
	of := func(kind string, f func(uplinkFigures) float64) float64 {
		var all []float64
		for _, x := range found[kind] {
			all = append(all, f(x))
		}
		return median(all)
	}
	cpu := func(f uplinkFigures) float64 { return f.agentd + f.uplink }
	r.Printf("host's CPU: %.2f times that without an uplink", of("uplink", cpu)/of("none", cpu))
	r.AtMost("uplink_idle_memory", of("uplink", func(f uplinkFigures) float64 { return float64(f.idle) / (1 << 20) }), 10, "MiB")
	return nil
}

type uplinkFigures struct {
	rate, agentd, uplink, acceptor float64 // MB/s, CPU milliseconds per MB
	p50, p99, dial                 float64 // ms
	idle, after                    int     // bytes of memory of the uplink's own
}

func uplinkOnce(ctx context.Context, use bool, agentd string, total int64) (f uplinkFigures, err error) {
	ca := tunneltest.NewCA()
	p, addr, err := acceptorProcess(ctx, ca, func(c *acceptorRole) { c.ServeEcho = true })
	if err != nil {
		return f, err
	}
	defer p.stop()
	cfg := tunnel.DialConfig{URL: "ws://" + addr, TLS: ca.ClientTLS("agent")}
	if use {
		s := uplink.New(uplink.Config{Executable: agentd, UID: 1_900_065_701})
		defer s.Close()
		cfg.Carrier = s.Carrier
	}
	began := time.Now()
	d, err := tunnel.Dial(ctx, cfg)
	if err != nil {
		return f, err
	}
	defer d.Close(nil) //nolint:errcheck // it served its turn
	f.dial = ms(time.Since(began))
	pid := 0
	if use {
		if pid, err = uplinkOf(os.Getpid()); err != nil {
			return f, err
		}
		time.Sleep(3 * time.Second)
		f.idle = ownMemory(pid)
	}
	c, err := d.Open(ctx, tunnel.Control)
	if err != nil {
		return f, err
	}
	trips, err := echo(ctx, c, time.Millisecond, 3*time.Second)
	if err != nil {
		return f, err
	}
	f.p50, f.p99 = ms(quantile(trips, .5)), ms(quantile(trips, .99))
	bulk, err := d.Open(ctx, tunnel.Solo)
	if err != nil {
		return f, err
	}
	buf := make([]byte, 64<<10)
	write := func(total int64) error {
		for left := total; left > 0; left -= int64(len(buf)) {
			if _, err := bulk.Write(buf); err != nil {
				return err
			}
		}
		return nil
	}
	if err := write(64 << 20); err != nil { // warm
		return f, err
	}
	cpu := [3]time.Duration{cpuTime(os.Getpid()), cpuTime(pid), cpuTime(p.cmd.Process.Pid)}
	began = time.Now()
	if err := write(total); err != nil {
		return f, err
	}
	mb := float64(total) / 1e6
	f.rate = mb / time.Since(began).Seconds()
	f.agentd, f.acceptor = ms(cpuTime(os.Getpid())-cpu[0])/mb, ms(cpuTime(p.cmd.Process.Pid)-cpu[2])/mb
	if use {
		f.uplink = ms(cpuTime(pid)-cpu[1]) / mb
		_ = bulk.Close()
		time.Sleep(8 * time.Second) // the lane lingers, collections pass
		f.after = ownMemory(pid)
	}
	return f, nil
}

// uplinkOf finds the uplink of a process.
func uplinkOf(parent int) (int, error) {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", parent))
	for _, path := range tasks {
		text, _ := os.ReadFile(path)
		for _, field := range strings.Fields(string(text)) {
			line, _ := os.ReadFile("/proc/" + field + "/cmdline")
			var pid int
			if strings.Contains(string(line), "\x00"+uplink.Arg) {
				_, err := fmt.Sscan(field, &pid)
				return pid, err
			}
		}
	}
	return 0, fmt.Errorf("process %d has no uplink", parent)
}

// ownMemory is a process's private memory in bytes: what is anonymous and in use.
func ownMemory(pid int) int {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			var kib int
			_, _ = fmt.Sscan(rest, &kib)
			return kib << 10
		}
	}
	return 0
}
