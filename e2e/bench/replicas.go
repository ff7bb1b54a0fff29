package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/postern-dev/postern/e2e/freeport"
	"github.com/postern-dev/postern/e2e/pgserver"
	"github.com/postern-dev/postern/e2e/stack"
)

// measureReplicas attaches 10,000 simulated idle agents, which speak the real tunnel, to two
// real control planes on one PostgreSQL, looks at their memory, and kills one: all its agents
// must get to the other.
func measureReplicas(ctx context.Context, o Options, r *Report) error {
	n := 10_000
	if o.Short {
		n = 600
	}
	pg, err := pgserver.Launch(ctx, pgserver.Options{})
	if err != nil {
		return err
	}
	defer pg.Stop() //nolint:errcheck // a throwaway
	if err := errors.Join(pg.CreateRole(ctx, "postern", "secret"), pg.CreateDatabase(ctx, "postern", "postern")); err != nil {
		return err
	}
	shared, err := os.MkdirTemp("", "postern-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(shared) //nolint:errcheck // likewise
	password := filepath.Join(shared, "pw")
	if err := os.WriteFile(password, []byte("secret\n"), 0o600); err != nil {
		return err
	}
	var replicas []*stack.Stack
	for range 2 {
		s, err := startReplica(ctx, o, pg, shared, password, replicas)
		if err != nil {
			return err
		}
		defer s.Close() //nolint:errcheck // likewise
		replicas = append(replicas, s)
	}
	one, two := replicas[0], replicas[1]
	f, err := newFleet(ctx, one, n)
	if err != nil {
		return err
	}
	f.urls, f.apart = []string{one.URL, two.URL}, 8*time.Millisecond
	began := time.Now()
	if err := f.register(ctx, n); err != nil {
		return err
	}
	r.Printf("%d simulated agents registered at two replicas in %.1f s", n, time.Since(began).Seconds())
	// What registering took is not what being idle takes.
	for _, s := range replicas {
		s.ControlPlane.Kill()
		if err := s.StartControlPlane(ctx); err != nil {
			return err
		}
	}
	began = time.Now()
	f.start()
	defer f.stop()
	if err := await(ctx, n, 4*time.Minute, one.URL, two.URL); err != nil {
		return err
	}
	r.Printf("%d attached in %.1f s", n, time.Since(began).Seconds())
	time.Sleep(fleetSettle / 2)
	most := uint64(0)
	before := cpuTime(one.ControlPlane.PID())
	time.Sleep(fleetSettle / 2)
	used := cpuTime(one.ControlPlane.PID()) - before
	for i, s := range replicas {
		memory, err := uniqueMemory(s.ControlPlane.PID())
		if err != nil {
			return err
		}
		here, err := online(ctx, s.URL)
		if err != nil {
			return err
		}
		r.Printf("replica %d: %d agents, %.0f MiB", i, here, float64(memory)/(1<<20))
		most = max(most, uint64(memory))
	}
	r.AtMost("replicas_idle_fleet_memory_each", float64(most)/(1<<30), 1.2, "GiB")
	r.Printf("replica 0 idle: %.2f %% of a core", used.Seconds()/(fleetSettle/2).Seconds()*100)

	two.ControlPlane.Kill()
	began = time.Now()
	if err := await(ctx, n, 4*time.Minute, one.URL); err != nil {
		return err
	}
	r.AtMost("replicas_storm_after_loss", time.Since(began).Seconds(), 60, "s")
	memory, err := uniqueMemory(one.ControlPlane.PID())
	if err != nil {
		return err
	}
	r.Printf("the one that is left: %d agents, %.0f MiB right after", n, float64(memory)/(1<<20))
	return nil
}

// startReplica starts a control plane on the shared database and store, with the master key of
// the first one.
func startReplica(ctx context.Context, o Options, pg *pgserver.Server, shared, password string, others []*stack.Stack) (*stack.Stack, error) {
	peers, err := freeport.Address()
	if err != nil {
		return nil, err
	}
	s, err := stack.New(stack.Options{Bin: o.Bin, Args: []string{
		"--database", fmt.Sprintf("postgres://postern@127.0.0.1:%d/postern?sslmode=disable", pg.Port), "--database-password-file", password,
		"--blob", filepath.Join(shared, "blob"), "--peer-listen", peers,
	}})
	if err != nil {
		return nil, err
	}
	if len(others) > 0 {
		key, err := os.ReadFile(filepath.Join(others[0].DataDir(), "master.key"))
		if err != nil {
			return nil, err
		}
		if err := errors.Join(os.MkdirAll(s.DataDir(), 0o700), os.WriteFile(filepath.Join(s.DataDir(), "master.key"), key, 0o600)); err != nil {
			return nil, err
		}
		s.TokenFile = others[0].TokenFile
	}
	return s, s.StartControlPlane(ctx)
}
