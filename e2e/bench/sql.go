package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/postern-dev/postern/client"
	"github.com/postern-dev/postern/e2e/pgserver"
	"github.com/postern-dev/postern/e2e/stack"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// bigRows is the table of the SQL figures: int8, 20-character text, float8,
	// timestamptz.
	bigRows      = 5_000_000
	shortBigRows = 300_000
	// rounds of each way, interleaved; medians count.
	sqlRounds = 3
	// oneRow is how many one-row queries are timed.
	oneRow = 200
)

const bigTable = `create table big as
	select i::int8 as id, lpad(md5(i::text), 20, '0')::text as label, (i * 0.37)::float8 as amount,
	       timestamptz '2020-01-01' + i * interval '1 second' as at
	from generate_series(1, %d) i`

// launchTable starts a database with one table: statement makes it with as many rows as it is told, which are
// fewer in a short run. The caller stops the database.
func launchTable(ctx context.Context, o Options, statement, table string) (pg *pgserver.Server, rows int, err error) {
	rows = bigRows
	if o.Short {
		rows = shortBigRows
	}
	pg, err = pgserver.Launch(ctx, pgserver.Options{Settings: map[string]string{"shared_buffers": "1GB", "max_wal_size": "4GB"}})
	if err != nil {
		return nil, 0, err
	}
	if err := pg.SQL(ctx, fmt.Sprintf(statement, rows), "vacuum analyze "+table); err != nil {
		return nil, 0, errors.Join(err, pg.Stop())
	}
	return pg, rows, nil
}

// copyBig is the peer: what psql needs to fetch the same rows in binary.
const copyBig = "copy (select * from big) to stdout (format binary)"

// measureSQL measures results through agent, tunnel and control plane.
func measureSQL(ctx context.Context, o Options, r *Report) (err error) {
	pg, rows, err := launchTable(ctx, o, bigTable, "big")
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
	const policy = "      max_rows: 100000000\n      max_bytes: 100GiB\n"
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
	c, err := client.New(client.Config{URL: s.URL, Token: client.StaticToken(client.NewSecret(string(token[:len(token)-1])))})
	if err != nil {
		return err
	}
	defer c.Close()
	b := &sqlBench{pg: pg, stack: s, agent: agent, client: c, rows: rows}
	if err := b.bulk(ctx, r); err != nil {
		return err
	}
	if err := b.formats(ctx, r); err != nil {
		return err
	}
	return b.small(ctx, r)
}

type sqlBench struct {
	pg     *pgserver.Server
	stack  *stack.Stack
	agent  *stack.Agent
	client *client.Client
	rows   int
}

// fetch runs a statement through Postern and throws its Arrow bytes away.
func (b *sqlBench) fetch(ctx context.Context, statement string) (int64, error) {
	rows, err := b.client.SQL(ctx, "bench", "db", &posternv1.RunSQLRequest{Sql: statement})
	if err != nil {
		return 0, err
	}
	defer rows.Close() //nolint:errcheck // read to its end below
	n, err := io.Copy(io.Discard, rows)
	if err != nil {
		return n, err
	}
	outcome, err := rows.Outcome()
	if err == nil && outcome.Error != nil {
		err = fmt.Errorf("%s", outcome.Error.Message)
	}
	return n, err
}

func (b *sqlBench) psql(ctx context.Context, statement string) error {
	cmd := exec.CommandContext(ctx, "psql", "-Xq", "-d", b.pg.DSN("postgres", "postgres"), "-c", statement)
	cmd.Env = append(os.Environ(), "PGPASSWORD="+b.pg.Password)
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer null.Close() //nolint:errcheck // nothing is in it
	cmd.Stdout, cmd.Stderr = null, os.Stderr
	return cmd.Run()
}

// bulk compares all rows as Arrow with psql's COPY, and looks at memory.
func (b *sqlBench) bulk(ctx context.Context, r *Report) error {
	if _, err := b.fetch(ctx, "select * from big limit 1000"); err != nil { // warm everything
		return err
	}
	if err := b.psql(ctx, copyBig); err != nil {
		return err
	}
	pids := []func() []int{
		func() []int { return []int{b.agent.Process.PID()} },
		func() []int { return b.agent.Process.ChildrenNamed("sql-session") },
		func() []int { return []int{b.stack.ControlPlane.PID()} },
	}
	names := []string{"agentd", "sql_session", "controlplane"}
	idle := peak(pids...)()
	var ours, theirs []float64
	stop := peak(pids...)
	for round := range sqlRounds {
		began := time.Now()
		if err := b.psql(ctx, copyBig); err != nil {
			return err
		}
		copied := time.Since(began).Seconds()
		cpu := [2]time.Duration{cpuTime(b.agent.Process.PID()), cpuTime(b.stack.ControlPlane.PID())}
		began = time.Now()
		n, err := b.fetch(ctx, "select * from big")
		if err != nil {
			return err
		}
		fetched := time.Since(began).Seconds()
		theirs, ours = append(theirs, copied), append(ours, fetched)
		r.Printf("round %d: psql COPY binary %.2f s, Postern Arrow %.2f s (%.0f MB, agentd %.2f s CPU, control plane %.2f s CPU)", round+1, copied, fetched,
			float64(n)/1e6, (cpuTime(b.agent.Process.PID()) - cpu[0]).Seconds(), (cpuTime(b.stack.ControlPlane.PID()) - cpu[1]).Seconds())
	}
	highest := stop()
	r.AtLeast("sql_arrow_vs_copy_binary", median(theirs)/median(ours), 0.8, "x")
	for i, name := range names {
		r.AtMost("sql_memory_over_idle_"+name, float64(highest[i]-idle[i])/(1<<20), 100, "MiB")
	}
	return nil
}

// textFormats are the formats that the control plane makes of Arrow, and how much
// of COPY binary's speed each should have.
var textFormats = []struct {
	format string
	goal   float64
}{{"csv", 0.6}, {"ndjson", 0.5}, {"parquet", 0.4}}

// formats compares all rows in the control plane's other formats with psql's COPY.
func (b *sqlBench) formats(ctx context.Context, r *Report) error {
	var theirs []float64
	ours := make([][]float64, len(textFormats))
	for range sqlRounds {
		began := time.Now()
		if err := b.psql(ctx, copyBig); err != nil {
			return err
		}
		theirs = append(theirs, time.Since(began).Seconds())
		for i, f := range textFormats {
			cpu := cpuTime(b.stack.ControlPlane.PID())
			began := time.Now()
			n, err := b.download(ctx, "select * from big", f.format)
			if err != nil {
				return fmt.Errorf("%s: %w", f.format, err)
			}
			took := time.Since(began).Seconds()
			ours[i] = append(ours[i], took)
			r.Printf("%s: %.2f s, %.0f MB, control plane %.2f s CPU", f.format, took, float64(n)/1e6, (cpuTime(b.stack.ControlPlane.PID()) - cpu).Seconds())
		}
	}
	for i, f := range textFormats {
		r.AtLeast("sql_"+f.format+"_vs_copy_binary", median(theirs)/median(ours[i]), f.goal, "x")
	}
	return nil
}

// download runs a statement by plain HTTP, as curl does, and throws the result away.
func (b *sqlBench) download(ctx context.Context, statement, format string) (int64, error) {
	token, err := os.ReadFile(b.stack.TokenFile)
	if err != nil {
		return 0, err
	}
	body, err := protojson.Marshal(&posternv1.RunSQLRequest{Sql: statement})
	if err != nil {
		return 0, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, b.stack.URL+"/api/v1/sql/bench/db?format="+format, bytes.NewReader(body))
	if err != nil {
		return 0, err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close() //nolint:errcheck // read to its end below
	n, err := io.Copy(io.Discard, resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %s", resp.Status)
	}
	return n, err
}

// small compares a warm one-row query with the same one on an open connection.
func (b *sqlBench) small(ctx context.Context, r *Report) error {
	config, err := pgx.ParseConfig(b.pg.DSN("postgres", "postgres"))
	if err != nil {
		return err
	}
	config.Password = b.pg.Password
	// One message each way, as psql does it.
	config.DefaultQueryExecMode = pgx.QueryExecModeSimpleProtocol
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return err
	}
	defer conn.Close(ctx) //nolint:errcheck // a throwaway
	const statement = "select id, label from big limit 1"
	var direct, through []float64
	for range oneRow {
		began := time.Now()
		rows, err := conn.Query(ctx, statement)
		if err != nil {
			return err
		}
		for rows.Next() {
		}
		if err := rows.Err(); err != nil {
			return err
		}
		direct = append(direct, ms(time.Since(began)))
		began = time.Now()
		if _, err := b.fetch(ctx, statement); err != nil {
			return err
		}
		through = append(through, ms(time.Since(began)))
	}
	r.Printf("one row: direct p50 %.2f ms, through Postern p50 %.2f ms p99 %.2f ms", median(direct), median(through), percentile(through, 99))
	r.AtMost("sql_one_row_over_direct", median(through)-median(direct), 5, "ms")
	return nil
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
