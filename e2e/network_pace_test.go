package e2e

import (
	"context"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/postern-dev/postern/client"
	"github.com/postern-dev/postern/e2e/stack"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/tunnel/tunneltest"
)

// endless is a statement whose rows nobody fetches to the end. (With the series in
// FROM the database would first write all of it to disk.)
const endless = "select g, repeat(md5(g::text), 3) as text from (select generate_series(1, 50000000) as g) series"

// fetch starts a statement by the Go client; it ends with the test.
func fetchRows(t *testing.T, c *client.Client, target, sql string) *client.Rows {
	t.Helper()
	agent, source, _ := strings.Cut(target, "/")
	ctx, cancel := context.WithCancel(context.Background())
	rows, err := c.SQL(ctx, agent, source, &posternv1.RunSQLRequest{Sql: sql})
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	t.Cleanup(func() { cancel(); rows.Close() })
	return rows
}

// TestSlowLinkIsNeverCut moves a bulk result over a link of 100 kB/s: everything on
// it is late, and nothing may take that for death.
func TestSlowLinkIsNeverCut(t *testing.T) {
	t.Parallel()
	const rate = 100_000
	length := 30 * time.Second
	if long {
		length = 3 * time.Minute
	}
	s := newStack(t, stack.Options{})
	relay, err := tunneltest.NewRelay(s.Listen, tunneltest.RelayConfig{Rate: rate, Delay: 20 * time.Millisecond, Queue: 128 << 10})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(relay.Close)
	joinWith(t, s, "host", func(a *stack.Agent) { a.URL = "http://" + relay.Addr() })
	c := api(t, s)
	rows := fetchRows(t, c, "host/db", endless)
	var moved atomic.Int64
	ended := make(chan error, 1)
	go func() {
		buffer := make([]byte, 32<<10)
		for {
			n, err := rows.Read(buffer)
			moved.Add(int64(n))
			if err != nil {
				ended <- err
				return
			}
		}
	}()
	began := time.Now()
	var slowest time.Duration
	for time.Since(began) < length {
		asked := time.Now()
		answers(t, s, "host/db", "select 1", "1")
		slowest = max(slowest, time.Since(asked))
		select {
		case err := <-ended:
			t.Fatalf("the result ended after %s and %d bytes: %v", time.Since(began), moved.Load(), err)
		case <-time.After(time.Second):
		}
	}
	took := time.Since(began)
	t.Logf("%d kB in %.0f s beside small queries, the slowest of which took %.1f s", moved.Load()/1000, took.Seconds(), slowest.Seconds())
	if got := float64(moved.Load()) / took.Seconds(); got < rate/2 {
		t.Errorf("only %.0f bytes/s came over a link of %d", got, rate)
	}
	a, err := agentState(t, s, "host")
	if err != nil || !a.Online || len(a.LinkEvents) != 1 {
		t.Errorf("online %v, link events %v, %v; want one", a.GetOnline(), a.GetLinkEvents(), err)
	}
	rows.Close()
	<-ended
}

// TestSlowClientsSlowNobody compares what a client gets alone with what it gets
// beside others that hardly read what they asked for.
func TestSlowClientsSlowNobody(t *testing.T) {
	t.Parallel()
	s := newStack(t, stack.Options{})
	join(t, s, "host")
	c := api(t, s)
	small := func() time.Duration {
		var all []time.Duration
		for range 60 {
			began := time.Now()
			rows := fetchRows(t, c, "host/db", "select 1")
			if _, err := io.Copy(io.Discard, rows); err != nil {
				t.Fatal(err)
			}
			rows.Close()
			all = append(all, time.Since(began))
			time.Sleep(10 * time.Millisecond) // below the rate limit of a token
		}
		slices.Sort(all)
		return all[len(all)/2]
	}
	bulk := func() time.Duration {
		best := time.Hour
		for range 3 {
			began := time.Now()
			rows := fetchRows(t, c, "host/db", "select g, repeat(md5(g::text), 3) as text from generate_series(1, 200000) g")
			if _, err := io.Copy(io.Discard, rows); err != nil {
				t.Fatal(err)
			}
			if outcome, err := rows.Outcome(); err != nil || outcome.Rows != 200000 {
				t.Fatalf("got %v, %v", outcome, err)
			}
			rows.Close()
			best = min(best, time.Since(began))
		}
		return best
	}
	small() // warm up
	smallAlone, bulkAlone := small(), bulk()

	// More slow readers than a tunnel has lanes for single streams.
	const readers, rate = 8, 10_000
	var wg sync.WaitGroup
	var read atomic.Int64
	done := make(chan struct{})
	stop := sync.OnceFunc(func() { close(done); wg.Wait() })
	defer stop()
	for range readers {
		rows := fetchRows(t, c, "host/db", endless+" /* slow reader */")
		wg.Go(func() {
			defer rows.Close()
			tick := time.NewTicker(100 * time.Millisecond)
			defer tick.Stop()
			buffer := make([]byte, rate/10)
			for {
				select {
				case <-done:
					return
				case <-tick.C:
				}
				n, err := io.ReadFull(rows, buffer)
				read.Add(int64(n))
				if err != nil {
					t.Errorf("a slow reader's result ended: %v", err)
					return
				}
			}
		})
	}
	began, before := time.Now(), read.Load()
	time.Sleep(2 * time.Second) // until every buffer on the way is full
	smallBeside, bulkBeside := small(), bulk()
	perReader := float64(read.Load()-before) / time.Since(began).Seconds() / readers
	stop()
	t.Logf("a small query: median %.1f ms alone, %.1f ms beside %d slow readers; 200,000 rows: %.2f s alone, %.2f s beside them; each got %.0f bytes/s",
		smallAlone.Seconds()*1000, smallBeside.Seconds()*1000, readers, bulkAlone.Seconds(), bulkBeside.Seconds(), perReader)
	// Generous: other tests run meanwhile. A reader in the way would cost seconds.
	if limit := 4*smallAlone + 20*time.Millisecond; smallBeside > limit {
		t.Errorf("small queries take %s beside slow readers, %s alone", smallBeside, smallAlone)
	}
	if limit := 4*bulkAlone + time.Second; bulkBeside > limit {
		t.Errorf("200,000 rows take %s beside slow readers, %s alone", bulkBeside, bulkAlone)
	}
	if perReader < rate/2 {
		t.Errorf("a slow reader got %.0f bytes/s and wanted %d", perReader, rate)
	}
	underWay(t, "slow reader", 0)
}
