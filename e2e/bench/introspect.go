package main

import (
	"context"
	"fmt"
	"time"

	"github.com/postern-dev/postern/e2e/pgserver"
	"github.com/postern-dev/postern/e2e/stack"
)

// measureIntrospection measures the catalog of 10,000 tables, from the database into
// the control plane's store and to the command line's listing.
func measureIntrospection(ctx context.Context, o Options, r *Report) (err error) {
	tables := 10_000
	if o.Short {
		tables = 500
	}
	pg, err := pgserver.Launch(ctx, pgserver.Options{Settings: map[string]string{"shared_buffers": "512MB", "max_locks_per_transaction": "1000"}})
	if err != nil {
		return err
	}
	defer pg.Stop() //nolint:errcheck // a throwaway
	for from := 1; from <= tables; from += 500 {
		if err := pg.SQL(ctx, fmt.Sprintf(`do $$ begin for i in %d..%d loop
			execute format('create schema if not exists s%%s', i %% 20);
			execute format('create table s%%s.t%%s (id bigint primary key, a text not null, b numeric(10,2) default 0, c timestamptz, d int[], e varchar(20), f jsonb, g bool, h uuid, j date)', i %% 20, i);
			execute format('create index on s%%s.t%%s (c, a)', i %% 20, i);
			execute format('comment on table s%%s.t%%s is ''table number %%s''', i %% 20, i, i);
			end loop; end $$`, from, min(from+499, tables))); err != nil {
			return err
		}
	}
	if err := pg.SQL(ctx, "analyze"); err != nil {
		return err
	}
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
	pids := []func() []int{
		func() []int { return []int{agent.Process.PID()} },
		func() []int { return agent.Process.ChildrenNamed("sql-session") },
		func() []int { return []int{s.ControlPlane.PID()} },
	}
	idle := peak(pids...)()
	stop := peak(pids...)
	var took []float64
	for _, what := range []string{"first", "unchanged"} {
		began := time.Now()
		listing, err := s.Postern(ctx, "source", "introspect", "bench/db", "--refresh", "--table", "none")
		if err != nil {
			return err
		}
		took = append(took, time.Since(began).Seconds())
		r.Printf("%s introspection of %d tables: %.2f s%s", what, tables, took[len(took)-1], listing)
	}
	highest := stop()
	began := time.Now()
	listing, err := s.Postern(ctx, "source", "introspect", "bench/db")
	if err != nil {
		return err
	}
	r.Printf("listing from the cache: %.2f s, %d bytes", time.Since(began).Seconds(), len(listing))
	r.Printf("memory over idle: agentd %.0f MiB, session %.0f MiB, control plane %.0f MiB",
		float64(highest[0]-idle[0])/(1<<20), float64(highest[1]-idle[1])/(1<<20), float64(highest[2]-idle[2])/(1<<20))
	r.AtMost("introspect_10k_tables", took[0], 5, "s")
	return nil
}
