package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/e2e/pgserver"
)

// measureSQLAgent measures SQL sessions alone: what agentd adds to the
// database before any byte has left the host.
func measureSQLAgent(ctx context.Context, o Options, r *Report) (err error) {
	pg, rows, err := launchTable(ctx, o, bigTable, "big")
	if err != nil {
		return err
	}
	defer pg.Stop() //nolint:errcheck // a throwaway
	agentd, err := filepath.Abs(filepath.Join(o.Bin, "agentd"))
	if err != nil {
		return err
	}
	m := sqlsession.New(sqlsession.Config{Executable: agentd, UIDBase: 1_950_000_000})
	defer m.Close(ctx) //nolint:errcheck // waits; nothing is left to say
	m.SetSources([]sqlsession.Source{{
		Name: "db", Engine: "postgres", DSN: pg.DSN("postgres", "postgres"), MaxRows: 1 << 40, MaxBytes: 1 << 40,
		Password: func(context.Context) (string, error) { return pg.Password, nil },
	}})
	b := &agentBench{sqlBench: sqlBench{pg: pg, rows: rows}, m: m, agentd: agentd}
	for _, part := range []func(context.Context, *Report) error{b.bulk, b.sessions, b.firstRow, b.cancel} {
		if err := part(ctx, r); err != nil {
			return err
		}
	}
	return nil
}

type agentBench struct {
	sqlBench
	m       *sqlsession.Manager
	agentd  string
	queries int
}

func (b *agentBench) run(ctx context.Context, owner, sql string, w io.Writer) error {
	b.queries++
	_, err := b.m.Run(ctx, sqlsession.Request{QueryID: "qry_" + strconv.Itoa(b.queries), Source: "db", Owner: owner, SQL: sql}, w)
	return err
}

// session is the process of the owner's session: the one that used most CPU.
func (b *agentBench) session() (pid int) {
	var most time.Duration
	for _, child := range childrenOf(syscall.Getpid()) {
		if used := cpuTime(child); used >= most && strings.Contains(firstLine(fmt.Sprintf("/proc/%d/cmdline", child)), sqlsession.ChildArg) {
			pid, most = child, used
		}
	}
	return pid
}

func (b *agentBench) bulk(ctx context.Context, r *Report) error {
	// Once each, so that everything is in memory.
	if err := b.run(ctx, "a", "select * from big", io.Discard); err != nil {
		return err
	}
	if err := b.psql(ctx, copyBig); err != nil {
		return err
	}
	child := b.session()
	var ours, theirs, cpu, own []float64
	for round := range 2*sqlRounds + 1 {
		began := time.Now()
		if err := b.psql(ctx, copyBig); err != nil {
			return err
		}
		theirs = append(theirs, time.Since(began).Seconds())
		before, ownBefore := cpuTime(child), cpuTime(syscall.Getpid())
		began = time.Now()
		if err := b.run(ctx, "a", "select * from big", io.Discard); err != nil {
			return err
		}
		ours = append(ours, time.Since(began).Seconds())
		cpu = append(cpu, (cpuTime(child)-before).Seconds()*1e6/float64(b.rows))
		own = append(own, (cpuTime(syscall.Getpid())-ownBefore).Seconds()*1e6/float64(b.rows))
		r.Printf("round %d: psql COPY binary %.2f s, SQL session Arrow %.2f s; CPU a row: session %.3f us, agentd %.3f us", round+1, theirs[round], ours[round], cpu[round], own[round])
	}
	r.AtLeast("sql_agent_arrow_vs_copy_binary", median(theirs)/median(ours), 1, "x")
	r.AtMost("sql_agent_cpu_per_row", median(cpu)+median(own), 0.3, "us")
	r.AtMost("sql_agent_session_memory", float64(procKiB(child, "status", "VmHWM"))/(1<<20), 64, "MiB")
	return nil
}

// sessions times cold and warm starts and a statement in a session at hand.
func (b *agentBench) sessions(ctx context.Context, r *Report) error {
	timed := func(owner string) (float64, error) {
		began := time.Now()
		err := b.run(ctx, owner, "select id, label from big limit 1", io.Discard)
		return ms(time.Since(began)), err
	}
	var warm, kept, cold []float64
	for i := range 20 {
		first, err := timed(fmt.Sprint("warm", i)) // a new owner takes the warm session
		if err != nil {
			return err
		}
		warm = append(warm, first)
		for range 10 {
			again, err := timed(fmt.Sprint("warm", i))
			if err != nil {
				return err
			}
			kept = append(kept, again)
		}
		time.Sleep(200 * time.Millisecond) // until the next one is warm, also on a busy machine
	}
	none := sqlsession.New(sqlsession.Config{Executable: b.agentd, UIDBase: 1_960_000_000, Warm: -1})
	defer none.Close(ctx) //nolint:errcheck // waits; nothing is left to say
	none.SetSources([]sqlsession.Source{{
		Name: "db", Engine: "postgres", DSN: b.pg.DSN("postgres", "postgres"),
		Password: func(context.Context) (string, error) { return b.pg.Password, nil },
	}})
	for i := range 20 {
		began := time.Now()
		if _, err := none.Run(ctx, sqlsession.Request{QueryID: fmt.Sprint("qry_cold", i), Source: "db", SQL: "select id, label from big limit 1"}, io.Discard); err != nil {
			return err
		}
		cold = append(cold, ms(time.Since(began)))
	}
	r.Printf("one row: cold session p50 %.1f ms, warm %.2f ms, one at hand %.2f ms", median(cold), median(warm), median(kept))
	r.AtMost("sql_agent_cold_session", median(cold), 40, "ms")
	r.AtMost("sql_agent_warm_session", median(warm), 3, "ms")
	return nil
}

// firstWrite notes when the first byte came.
type firstWrite struct{ at time.Time }

func (f *firstWrite) Write(p []byte) (int, error) {
	if f.at.IsZero() && len(bytes.TrimSpace(p)) > 0 {
		f.at = time.Now()
	}
	return len(p), nil
}

func (b *agentBench) firstRow(ctx context.Context, r *Report) error {
	const statement = "select generate_series(1, 5000000)"
	conn, err := b.pg.Connect(ctx, pgserver.Superuser)
	if err != nil {
		return err
	}
	defer conn.Close(ctx) //nolint:errcheck // a throwaway
	var direct, through []float64
	for range 5 {
		began := time.Now()
		rows, err := conn.Query(ctx, statement)
		if err != nil {
			return err
		}
		if rows.Next() {
			direct = append(direct, ms(time.Since(began)))
		}
		for rows.Next() {
		}
		rows.Close()
		first := &firstWrite{}
		began = time.Now()
		if err := b.run(ctx, "a", statement, first); err != nil {
			return err
		}
		through = append(through, ms(first.at.Sub(began)))
	}
	r.Printf("first row of 5 million: direct %.2f ms, SQL session %.2f ms", median(direct), median(through))
	r.AtMost("sql_agent_first_row_over_direct", median(through)-median(direct), 10, "ms")
	return nil
}

// blocked is a writer that stops at its first byte.
type blocked struct{ release chan struct{} }

func (w blocked) Write(p []byte) (int, error) {
	<-w.release
	return len(p), nil
}

// cancel times a cancel of a statement whose reader has stopped, until the
// database is free.
func (b *agentBench) cancel(ctx context.Context, r *Report) error {
	conn, err := b.pg.Connect(ctx, pgserver.Superuser)
	if err != nil {
		return err
	}
	defer conn.Close(ctx) //nolint:errcheck // a throwaway
	poll := func(where string, want bool) error {
		for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
			var n int
			if err := conn.QueryRow(ctx, "select count(*) from pg_stat_activity where query like 'select repeat%' and "+where).Scan(&n); err != nil {
				return err
			}
			if (n > 0) == want {
				return nil
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("%d backends with %s", n, where)
			}
		}
	}
	var took []float64
	for range 5 {
		w := blocked{make(chan struct{})}
		done := make(chan error, 1)
		go func() { done <- b.run(ctx, "a", "select repeat('x', 1000), generate_series(1, 100000000)", w) }()
		release := sync.OnceFunc(func() { close(w.release) })
		defer release()
		if err := poll("wait_event = 'ClientWrite'", true); err != nil {
			return err
		}
		began := time.Now()
		b.m.Cancel("qry_" + strconv.Itoa(b.queries))
		if err := poll("state = 'active'", false); err != nil {
			return err
		}
		took = append(took, ms(time.Since(began)))
		release()
		<-done
	}
	r.Printf("cancel under a stopped reader: database free after %.1f ms", median(took))
	r.AtMost("sql_agent_cancel_to_free_backend", median(took), 200, "ms")
	return nil
}

func childrenOf(pid int) (pids []int) {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, path := range tasks {
		for _, field := range strings.Fields(firstLine(path)) {
			if child, err := strconv.Atoi(field); err == nil {
				pids = append(pids, child)
			}
		}
	}
	return pids
}
