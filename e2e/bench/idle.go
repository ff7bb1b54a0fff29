package main

import (
	"context"
	"time"

	"github.com/postern-dev/postern/e2e/pgserver"
	"github.com/postern-dev/postern/e2e/stack"
)

// measureIdle measures what agentd takes while nobody asks it for anything: joined, with
// its tunnel up and a data source that was used once. Its children are not counted: a
// session ends by itself.
func measureIdle(ctx context.Context, o Options, r *Report) (err error) {
	settle, watch := 30*time.Second, 2*time.Minute
	if o.Short {
		settle, watch = 2*time.Second, 5*time.Second
	}
	pg, err := pgserver.Launch(ctx, pgserver.Options{})
	if err != nil {
		return err
	}
	defer pg.Stop() //nolint:errcheck // a throwaway
	s, err := stack.New(stack.Options{Bin: o.Bin})
	if err != nil {
		return err
	}
	defer s.Close() //nolint:errcheck // likewise
	if err := s.StartControlPlane(ctx); err != nil {
		return err
	}
	source, err := stack.Source(s.Dir, "db", pg.DSN("postgres", "postgres"), pg.Password, "")
	if err != nil {
		return err
	}
	agent, err := s.Join(ctx, "bench", "sources:\n"+source)
	if err != nil {
		return err
	}
	if _, err := s.Postern(ctx, "sql", "bench/db", "select 1"); err != nil {
		return err
	}
	pause := func(d time.Duration) error {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(d):
			return nil
		}
	}
	if err := pause(settle); err != nil {
		return err
	}
	pid := agent.Process.PID()
	before, began, highest := cpuTime(pid), time.Now(), peak(func() []int { return []int{pid} })
	err = pause(watch)
	resident := highest()[0]
	if err != nil {
		return err
	}
	used, took := cpuTime(pid)-before, time.Since(began)
	r.Printf("agentd idle for %v: %v of CPU, %.1f MiB resident at most", took.Round(time.Second), used, float64(resident)/(1<<20))
	r.AtMost("agentd_idle_resident", float64(resident)/(1<<20), 40, " MiB")
	r.AtMost("agentd_idle_cpu", 100*used.Seconds()/took.Seconds(), 0.2, " %")
	return nil
}
