package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/postern-dev/postern/client"
	"github.com/postern-dev/postern/e2e/stack"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// maskTable has two columns to mask beside what bigTable has.
const maskTable = `create table people as
	select i::int8 as id, lpad(md5(i::text), 20, '0')::text as email, lpad(i::text, 13, '4')::text as phone, (i * 0.37)::float8 as amount,
	       timestamptz '2020-01-01' + i * interval '1 second' as at
	from generate_series(1, %d) i`

// measureMask compares the rows a second of a source that masks two columns, one by
// hash and one in part, with those of one that masks nothing, through agent, tunnel
// and control plane. Both are read in turn. docs/performance.md says what limits it.
func measureMask(ctx context.Context, o Options, r *Report) (err error) {
	pg, _, err := launchTable(ctx, o, maskTable, "people")
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
	const limits = "      max_rows: 100000000\n      max_bytes: 100GiB\n"
	const masks = "      mask:\n        - {columns: [people.email], with: hash}\n        - {columns: [people.phone], with: partial}\n"
	const pattern = "        - {pattern: '\\b\\d{16,19}\\b', with: redact}\n"
	var sources string
	policies := map[string]string{"plain": limits, "masked": limits + masks, "patterns": limits + masks + pattern}
	names := []string{"plain", "masked", "patterns"}
	for _, name := range names {
		source, err := stack.Source(s.Dir, name, pg.DSN("postgres", "postgres"), pg.Password, policies[name])
		if err != nil {
			return err
		}
		sources += source
	}
	agent, err := s.Join(ctx, "bench", "sources:\n"+sources)
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
	fetch := func(source, statement string) (time.Duration, error) {
		began := time.Now()
		result, err := c.SQL(ctx, "bench", source, &posternv1.RunSQLRequest{Sql: statement})
		if err != nil {
			return 0, err
		}
		defer result.Close() //nolint:errcheck // read to its end below
		if _, err := io.Copy(io.Discard, result); err != nil {
			return 0, err
		}
		outcome, err := result.Outcome()
		if err == nil && outcome.Error != nil {
			err = fmt.Errorf("%s", outcome.Error.Message)
		}
		return time.Since(began), err
	}
	took := map[string][]float64{}
	for round := range sqlRounds + 1 {
		line := fmt.Sprintf("round %d:", round)
		for _, source := range names {
			before := sessionsCPU(agent)
			d, err := fetch(source, "select * from people")
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %s %.2f s (sessions %.2f s CPU)", source, d.Seconds(), sessionsCPU(agent)-before)
			if round > 0 { // the first warms
				took[source] = append(took[source], d.Seconds())
			}
		}
		r.Printf("%s", line)
	}
	var small []float64
	for range oneRow {
		d, err := fetch("masked", "select id, email from people limit 1")
		if err != nil {
			return err
		}
		small = append(small, ms(d))
	}
	r.Printf("one row of a source that masks: p50 %.2f ms", median(small))
	r.AtLeast("mask_two_columns_throughput", median(took["plain"])/median(took["masked"]), 0.75, "x")
	r.AtLeast("mask_two_columns_and_pattern_throughput", median(took["plain"])/median(took["patterns"]), 0.7, "x")
	return nil
}

// sessionsCPU is the CPU time of an agent's SQL sessions in seconds.
func sessionsCPU(agent *stack.Agent) float64 {
	var sum time.Duration
	for _, pid := range agent.Process.ChildrenNamed("sql-session") {
		sum += cpuTime(pid)
	}
	return sum.Seconds()
}
