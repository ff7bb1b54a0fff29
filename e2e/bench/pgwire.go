package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/postern-dev/postern/e2e/freeport"
	"github.com/postern-dev/postern/e2e/pgserver"
	"github.com/postern-dev/postern/e2e/stack"
)

const (
	// pgbenchSeconds is one run of pgbench, pgbenchClients as many as the goal says.
	pgbenchSeconds = 5
	pgbenchClients = 8
)

// pgwireBench is a database, and a control plane with a PostgreSQL port in front of it.
type pgwireBench struct {
	pg           *pgserver.Server
	stack        *stack.Stack
	agent        *stack.Agent
	host, port   string
	token        string
	direct, ours []string // environments of libpq
}

// measurePGWire compares psql and pgbench through Postern's PostgreSQL port with the
// same straight to the database. Both are plain TCP on loopback.
func measurePGWire(ctx context.Context, o Options, r *Report) error {
	pg, _, err := launchTable(ctx, o, bigTable, "big")
	if err != nil {
		return err
	}
	defer pg.Stop() //nolint:errcheck // a throwaway
	listen, err := freeport.Address()
	if err != nil {
		return err
	}
	s, err := stack.New(stack.Options{Bin: o.Bin, Args: []string{"--pg-listen", listen}})
	if err != nil {
		return err
	}
	defer s.Close() //nolint:errcheck // likewise
	if err := s.StartControlPlane(ctx); err != nil {
		return err
	}
	const policy = "      max_rows: 100000000\n      max_bytes: 100GiB\n      concurrency: 32\n"
	source, err := stack.Source(s.Dir, "db", pg.DSN("postgres", "postgres"), pg.Password, policy)
	if err != nil {
		return err
	}
	agent, err := s.Join(ctx, "bench", "sources:\n"+source)
	if err != nil {
		return err
	}
	token, err := os.ReadFile(s.TokenFile)
	if err != nil {
		return err
	}
	b := &pgwireBench{pg: pg, stack: s, agent: agent, token: strings.TrimSpace(string(token))}
	b.host, b.port, _ = net.SplitHostPort(listen)
	b.direct = append(os.Environ(), "PGHOST=127.0.0.1", fmt.Sprintf("PGPORT=%d", pg.Port), "PGUSER=postgres", "PGDATABASE=postgres", "PGPASSWORD="+pg.Password, "PGSSLMODE=disable")
	b.ours = append(os.Environ(), "PGHOST="+b.host, "PGPORT="+b.port, "PGUSER=admin", "PGDATABASE=bench/db", "PGPASSWORD="+b.token, "PGSSLMODE=disable")
	if err := b.select5M(ctx, r); err != nil {
		return err
	}
	if err := b.firstRow(ctx, r); err != nil {
		return err
	}
	return b.pgbench(ctx, o, r)
}

func (b *pgwireBench) run(ctx context.Context, env []string, program string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, b.pg.Bin(program), args...)
	cmd.Env = env
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s: %w: %.500s", program, err, out)
	}
	return string(out), nil
}

// select5M times psql fetching the whole table, in turns.
func (b *pgwireBench) select5M(ctx context.Context, r *Report) error {
	var ratios []float64
	for round := range sqlRounds + 1 {
		var took [2]float64
		cpu := [2]time.Duration{cpuTime(b.agent.Process.PID()), cpuTime(b.stack.ControlPlane.PID())}
		for i, env := range [][]string{b.direct, b.ours} {
			began := time.Now()
			if _, err := b.run(ctx, env, "psql", "-XqAt", "-v", "FETCH_COUNT=10000", "-o", os.DevNull, "-c", "select * from big"); err != nil {
				return err
			}
			took[i] = time.Since(began).Seconds()
		}
		r.Printf("round %d: psql direct %.2f s, through Postern %.2f s (agentd %.2f s CPU, control plane %.2f s CPU)", round, took[0], took[1],
			(cpuTime(b.agent.Process.PID()) - cpu[0]).Seconds(), (cpuTime(b.stack.ControlPlane.PID()) - cpu[1]).Seconds())
		if round > 0 { // the first warms everything
			ratios = append(ratios, took[0]/took[1])
		}
	}
	r.AtLeast("pgwire_psql_5m", median(ratios), 0.7, "x")
	return nil
}

// firstRow times the first row of a long result, on an open connection and as the first
// statement of a new one.
func (b *pgwireBench) firstRow(ctx context.Context, r *Report) error {
	var warm, cold [2][]float64
	for i, dsn := range []string{
		b.pg.DSN("postgres", "postgres") + " password=" + b.pg.Password,
		fmt.Sprintf("host=%s port=%s user=admin password=%s dbname=bench/db sslmode=disable", b.host, b.port, b.token),
	} {
		for range 5 {
			conn, err := pgx.Connect(ctx, dsn)
			if err != nil {
				return err
			}
			for n := range 6 {
				took, err := firstRowOf(ctx, conn)
				if err != nil {
					conn.Close(ctx) //nolint:errcheck // a throwaway
					return err
				}
				if n == 0 {
					cold[i] = append(cold[i], took)
				} else {
					warm[i] = append(warm[i], took)
				}
			}
			conn.Close(ctx) //nolint:errcheck // likewise
		}
	}
	r.Printf("first row: direct p50 %.2f ms, through Postern p50 %.2f ms; as the first statement of a session: %.2f ms, %.2f ms",
		median(warm[0]), median(warm[1]), median(cold[0]), median(cold[1]))
	r.AtMost("pgwire_first_row_over_direct", median(warm[1])-median(warm[0]), 10, "ms")
	return nil
}

// firstRowOf reads 200,000 rows and tells when the first was there.
func firstRowOf(ctx context.Context, conn *pgx.Conn) (float64, error) {
	began := time.Now()
	rows, err := conn.Query(ctx, "select id, label from big limit 200000", pgx.QueryExecModeSimpleProtocol)
	if err != nil {
		return 0, err
	}
	defer rows.Close()
	if !rows.Next() {
		return 0, fmt.Errorf("no first row: %w", rows.Err())
	}
	took := ms(time.Since(began))
	for rows.Next() {
	}
	return took, rows.Err()
}

// cpu is what control plane, agentd and its SQL sessions have used.
func (b *pgwireBench) cpu() [3]time.Duration {
	all := [3]time.Duration{cpuTime(b.stack.ControlPlane.PID()), cpuTime(b.agent.Process.PID()), endedChildren(b.agent.Process.PID())}
	for _, child := range b.agent.Process.Children() {
		all[2] += cpuTime(child)
	}
	return all
}

var tps = regexp.MustCompile(`(?m)^tps = ([0-9.]+)`)

// pgbench compares transactions a second of pgbench -S, in turns, in each protocol.
func (b *pgwireBench) pgbench(ctx context.Context, o Options, r *Report) error {
	if _, err := b.run(ctx, b.direct, "pgbench", "-i", "-q", "-s", "5"); err != nil {
		return err
	}
	seconds := pgbenchSeconds
	if o.Short {
		seconds = 2
	}
	for _, mode := range []string{"simple", "extended", "prepared"} {
		var ratios []float64
		for round := range sqlRounds {
			var got [2]float64
			var spent [3]float64
			for i, env := range [][]string{b.direct, b.ours} {
				before := b.cpu()
				out, err := b.run(ctx, env, "pgbench", "-S", "-n", "-c", strconv.Itoa(pgbenchClients), "-T", strconv.Itoa(seconds), "-M", mode)
				if err != nil {
					return err
				}
				match := tps.FindStringSubmatch(out)
				if match == nil {
					return fmt.Errorf("pgbench said %q", out)
				}
				if got[i], err = strconv.ParseFloat(match[1], 64); err != nil {
					return err
				}
				for j, after := range b.cpu() {
					spent[j] = (after - before[j]).Seconds() * 1e6 / (got[i] * float64(seconds))
				}
			}
			r.Printf("pgbench -S -M %s, round %d: direct %.0f a second, through Postern %.0f; CPU of each in us: control plane %.0f, agentd %.0f, SQL sessions %.0f",
				mode, round+1, got[0], got[1], spent[0], spent[1], spent[2])
			ratios = append(ratios, got[1]/got[0])
		}
		name := "pgwire_pgbench"
		if mode != "simple" {
			name += "_" + mode
		}
		r.AtLeast(name, median(ratios), 0.5, "x")
	}
	return nil
}
