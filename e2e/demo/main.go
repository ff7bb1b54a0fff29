// Command demo does Postern's main job before your eyes: it starts a control
// plane, a throwaway PostgreSQL with a sample database and a host's agentd, lets
// the host join with a registration key, and runs three queries through the
// tunnel that the host dialed. It stays up until Ctrl-C on a terminal; with
// DEMO_ONCE=1, or without a terminal, it ends by itself. It leaves nothing behind.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/term"

	"github.com/postern-dev/postern/e2e/pgserver"
	"github.com/postern-dev/postern/e2e/stack"
)

func main() {
	bin := flag.String("bin", "bin", "directory of agentd, controlplane and postern")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	err := run(ctx, *bin)
	interrupted := ctx.Err() != nil // stop ends it too
	stop()
	if err != nil && !interrupted {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

const (
	customers = 50_000
	orders    = 400_000
)

// sample is a small shop; e-mail addresses and card numbers are made up, for
// masks to work on. The card numbers begin with 9, which no issuer uses.
var sample = []string{
	`create table customers (
		id int8 primary key, name text not null, email text not null, card text not null,
		country text not null, joined timestamptz not null)`,
	fmt.Sprintf(`insert into customers
		select i, 'Customer ' || i, 'customer' || i || '@example.com',
		       lpad((9000000000000000 + (i::int8 * 7919 %% 1000000000))::text, 16, '9'),
		       (array['DE','FR','NL','PL','ES','IT','SE','US'])[1 + i %% 8],
		       timestamptz '2020-01-01' + i * interval '47 minutes'
		from generate_series(1, %d) i`, customers),
	`create table orders (
		id int8 primary key, customer_id int8 not null references customers,
		placed timestamptz not null, amount numeric(12,2) not null, status text not null)`,
	fmt.Sprintf(`insert into orders
		select i, 1 + (i::int8 * 31 %% %d), timestamptz '2024-01-01' + i * interval '2 minutes',
		       ((i::int8 * 7919 %% 100000) / 100.0)::numeric(12,2),
		       (array['paid','paid','paid','shipped','returned'])[1 + i %% 5]
		from generate_series(1, %d) i`, customers, orders),
	`grant select on all tables in schema public to reader`,
	`analyze`,
}

// policy is what this host allows on its data source.
const policy = `      mode: read-only
      max_rows: 1000000
      statement_timeout: 1m
`

func run(ctx context.Context, bin string) (err error) {
	say("starting a control plane (SQLite) and a throwaway PostgreSQL with %d customers and %d orders", customers, orders)
	s, err := stack.New(stack.Options{Bin: bin})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	pg, err := pgserver.Launch(ctx, pgserver.Options{NoCache: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, pg.Stop()) }()
	if err := fill(ctx, pg); err != nil {
		return err
	}
	if err := s.StartControlPlane(ctx); err != nil {
		return err
	}

	say("this host joins: a registration key, then agentd dials out; nothing listens on its side")
	source, err := stack.Source(s.Dir, "shop", pg.DSN("reader", "shop"), readerPassword, policy)
	if err != nil {
		return err
	}
	if _, err := s.Join(ctx, "demo-host", "sources:\n"+source); err != nil {
		return err
	}
	for _, args := range [][]string{
		{"agent", "list"},
		{"source", "list"},
		{"sql", "demo-host/shop", "select id, name, email, country from customers order by id limit 5"},
		{"sql", "demo-host/shop", "select country, count(*) as orders, sum(amount) as revenue from orders join customers c on c.id = customer_id group by country order by revenue desc"},
	} {
		if err := show(ctx, s, args...); err != nil {
			return err
		}
	}
	if err := bulk(ctx, s); err != nil {
		return err
	}
	say("the host has the last word: a write is refused")
	fmt.Printf("$ postern sql demo-host/shop %q\n", "delete from orders")
	cmd := s.Command(ctx, "sql", "demo-host/shop", "delete from orders")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stdout
	var exit *exec.ExitError
	if err := cmd.Run(); !errors.As(err, &exit) || exit.ExitCode() != 3 {
		return fmt.Errorf("the write was not refused with exit code 3: %v", err)
	}
	if err := show(ctx, s, "audit", "verify"); err != nil {
		return err
	}
	return stay(ctx, s)
}

// readerPassword is for a database that lives as long as the demo.
const readerPassword = "demo-only"

func fill(ctx context.Context, pg *pgserver.Server) error {
	if err := pg.CreateRole(ctx, "reader", readerPassword); err != nil {
		return err
	}
	if err := pg.CreateDatabase(ctx, "shop", ""); err != nil {
		return err
	}
	return pg.SQLIn(ctx, "shop", sample...)
}

func say(format string, args ...any) { fmt.Printf("\n== "+format+"\n", args...) }

// show prints a postern command and what it answers.
func show(ctx context.Context, s *stack.Stack, args ...string) error {
	shown := make([]string, len(args))
	for i, a := range args {
		if shown[i] = a; strings.ContainsAny(a, " *") {
			shown[i] = fmt.Sprintf("%q", a)
		}
	}
	fmt.Printf("\n$ postern %s\n", strings.Join(shown, " "))
	cmd := s.Command(ctx, args...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stdout
	return cmd.Run()
}

// bulk fetches all orders as CSV and throws them away, for the rate.
func bulk(ctx context.Context, s *stack.Stack) error {
	fmt.Printf("\n$ postern sql demo-host/shop -f csv 'select * from orders' >/dev/null\n")
	cmd := s.Command(ctx, "sql", "demo-host/shop", "-f", "csv", "select * from orders")
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	cmd.Stderr = os.Stdout
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return err
	}
	n, err := io.Copy(io.Discard, out)
	if err := errors.Join(err, cmd.Wait()); err != nil {
		return err
	}
	took := time.Since(began).Seconds()
	fmt.Printf("%d rows, %.1f MB of CSV in %.2f s: %.0f rows/s, %.1f MB/s\n", orders, float64(n)/1e6, took, orders/took, float64(n)/1e6/took)
	return nil
}

// stay waits for Ctrl-C where somebody can press it.
func stay(ctx context.Context, s *stack.Stack) error {
	postern := filepath.Join(s.Bin, "postern")
	say("what to try next, in another terminal:")
	fmt.Printf(`
    export POSTERN_URL=%s POSTERN_TOKEN=$(cat %s)
    %s sql demo-host/shop 'select status, count(*) from orders group by 1'
    %s sql demo-host/shop -f parquet -O orders.parquet 'select * from orders'
    %s source check demo-host/shop
    %s query list
    %s audit list
`, s.URL, s.TokenFile, postern, postern, postern, postern, postern)
	if os.Getenv("DEMO_ONCE") == "1" || !term.IsTerminal(int(os.Stdin.Fd())) {
		say("done")
		return nil
	}
	say("running until Ctrl-C")
	<-ctx.Done()
	return nil
}
