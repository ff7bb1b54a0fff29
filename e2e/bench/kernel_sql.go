package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/postern-dev/postern/client"
	"github.com/postern-dev/postern/e2e/stack"
)

// measureKernelSQL measures the rows that a kernel asks for on its own host, against psql
// that fetches them in binary and throws them away: to Arrow in the kernel's memory, and to
// a DataFrame.
func measureKernelSQL(ctx context.Context, o Options, r *Report) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("kernels need root")
	}
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
	source, err := stack.Source(s.Dir, "db", pg.DSN("postgres", "postgres"), pg.Password, "      max_rows: 100000000\n      max_bytes: 100GiB\n")
	if err != nil {
		return err
	}
	if _, err := s.Join(ctx, "bench", "sources:\n"+source+kernelConfig+"  sources: [db]\n  limits: {memory: 8GiB}\n"); err != nil {
		return err
	}
	token, err := os.ReadFile(s.TokenFile)
	if err != nil {
		return err
	}
	c, err := client.New(client.Config{URL: s.URL, Token: client.StaticToken(client.NewSecret(strings.TrimSpace(string(token)))), CAFile: s.CAFile})
	if err != nil {
		return err
	}
	defer c.Close()
	k, _, err := startKernel(ctx, c)
	if err != nil {
		return err
	}
	defer k.stop(ctx) //nolint:errcheck // a throwaway
	b := &sqlBench{pg: pg, stack: s, rows: rows}
	// What a cell prints shows that all rows came.
	ask := func(to string) (float64, error) {
		began := time.Now()
		n, err := k.run(ctx, fmt.Sprintf("import postern\nr = postern.sql('select * from big', to=%s)\nif len(r) == %d: print('whole')\ndel r", to, rows))
		if err == nil && n != len("whole\n") {
			err = fmt.Errorf("the kernel did not get all rows")
		}
		return time.Since(began).Seconds(), err
	}
	const arrow, frame = "None", "'df'"
	for _, to := range []string{arrow, frame} { // warm everything
		if _, err := ask(to); err != nil {
			return err
		}
	}
	if err := b.psql(ctx, copyBig); err != nil {
		return err
	}
	var copied, arrows, frames []float64
	for round := range sqlRounds {
		began := time.Now()
		if err := b.psql(ctx, copyBig); err != nil {
			return err
		}
		copied = append(copied, time.Since(began).Seconds())
		one, err := ask(arrow)
		if err != nil {
			return err
		}
		two, err := ask(frame)
		if err != nil {
			return err
		}
		arrows, frames = append(arrows, one), append(frames, two)
		r.Printf("round %d: psql COPY binary %.2f s, %%%%sql to Arrow in the kernel %.2f s, to a DataFrame %.2f s", round+1, copied[round], one, two)
	}
	r.Printf("%.2f million rows a second to Arrow, %.2f to a DataFrame", float64(rows)/median(arrows)/1e6, float64(rows)/median(frames)/1e6)
	r.AtLeast("kernel_sql_arrow_vs_copy_binary", median(copied)/median(arrows), 0.7, "x")
	r.Printf("DataFrame: %.2f of COPY binary", median(copied)/median(frames))
	return nil
}
