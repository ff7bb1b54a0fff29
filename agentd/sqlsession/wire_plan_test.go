package sqlsession_test

import (
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/e2e/pgserver"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// TestWireExplain: EXPLAIN is answered as far as the policy tells plans.
func TestWireExplain(t *testing.T) {
	if err := server.SQL(t.Context(), "CREATE SCHEMA plot", "CREATE TABLE plot.points (id int PRIMARY KEY, secret text, n int)",
		"INSERT INTO plot.points SELECT i, 'c4nary' || i, i % 7 FROM generate_series(1, 2000) i", "ANALYZE plot.points",
		"CREATE FUNCTION plot.told() RETURNS text STABLE LANGUAGE sql AS 'SELECT max(secret) FROM plot.points'"); err != nil {
		t.Fatal(err)
	}
	cleanUp(t, "DROP SCHEMA plot CASCADE")
	open := func(plans, mode string, masks ...sqlsession.Mask) *wireClient {
		src := source("db")
		src.DSN, src.Password = server.DSN(pgserver.Superuser, pgserver.Superuser), password(server.Password)
		src.ReadWrite, src.Guard.Mode, src.Guard.Plans, src.Guard.Masks, src.Guard.MaskKey = mode == "read-write", mode, plans, masks, make([]byte, 32)
		return openWire(t, newManager(t, sqlsession.Config{}, src), "wire_"+plans+mode)
	}
	has := func(c *wireClient, sql string, want ...string) {
		t.Helper()
		got := c.ask(sql)
		for _, w := range want {
			no, reverse := strings.CutPrefix(w, "!")
			if strings.Contains(got, no) == reverse {
				t.Errorf("%s: %s: got\n%s", sql, w, got)
			}
		}
	}
	const query = "SELECT secret FROM plot.points WHERE n = 3 AND secret <> 'c4nary5' ORDER BY id"
	c := open("off", "read-only")
	has(c, "EXPLAIN "+query, "42501")
	has(c, "SELECT 1", "1")

	c = open("structure", "read-only")
	has(c, "EXPLAIN "+query, "Sort", "Seq Scan on plot.points", "Filter: ", "cost=", "!c4nary", "!= 3")
	has(c, "EXPLAIN (COSTS off) "+query, "Seq Scan on plot.points", "!cost=")
	has(c, "explain (format json)"+query, `"Node Type"`, "!c4nary")
	has(c, "EXPLAIN (SELECT 1)", "Result")
	has(c, "/* a */ EXPLAIN /* b */ VERBOSE -- c\n SELECT 1;", "Result")
	has(c, "EXPLAIN UPDATE plot.points SET n = 1 WHERE id = 5", "Update on plot.points", "Index Scan using points_pkey")
	has(c, "EXPLAIN ANALYZE SELECT 1", "42501")
	has(c, "EXPLAIN (WAL) SELECT 1", "0A000")
	has(c, "EXPLAIN (FORMAT xml) SELECT 1", "0A000")
	has(c, "EXPLAIN (COSTS maybe) SELECT 1", "22023")
	has(c, "EXPLAIN SELECT plot.told()", "42501")
	has(c, "EXPLAIN SELECT pg_advisory_lock(1)", "42501")
	has(c, "EXPLAIN CREATE TABLE x AS SELECT 1", "42501")
	has(c, "EXPLAIN SELECT nothing FROM plot.points", "42703")
	has(c, "EXPLAIN SELECT 1; SELECT 2", "0A000")

	c = open("full", "read-only")
	has(c, "EXPLAIN "+query, "Seq Scan on points", "cost=", "rows=", "n = 3", "'c4nary5'::text", "!Output:")
	has(c, "EXPLAIN VERBOSE "+query, "Seq Scan on plot.points", "Output: secret, id")
	has(c, "EXPLAIN ANALYZE SELECT 1", "42501")
	has(c, "EXPLAIN SELECT * FROM plot.points WHERE id = $1", "0A000")

	c = open("analyze", "read-write")
	has(c, "EXPLAIN ANALYZE "+query, "actual time=", "Rows Removed by Filter", "Execution Time")
	has(c, "EXPLAIN (ANALYZE, TIMING off, SUMMARY off, COSTS off, BUFFERS) SELECT count(*) FROM plot.points", "(actual rows=1 loops=1)", "Buffers: shared", "!Execution Time")
	has(c, "EXPLAIN ANALYZE DELETE FROM plot.points", "42501")
	has(c, "EXPLAIN ANALYZE SELECT pg_advisory_lock(1)", "42501")
	// In a transaction, which goes on.
	has(c, "BEGIN", "")
	has(c, "UPDATE plot.points SET n = 100 WHERE id = 1", "")
	has(c, "EXPLAIN ANALYZE SELECT * FROM plot.points WHERE n = 100", "actual time", "rows=1 ")
	has(c, "UPDATE plot.points SET n = 101 WHERE id = 1 RETURNING n", "101")
	has(c, "ROLLBACK", "")
	// By the extended protocol, prepared: each time a plan of now.
	c.front.Send(&pgproto3.Parse{Name: "p", Query: "EXPLAIN (ANALYZE, TIMING off, COSTS off) SELECT * FROM plot.points WHERE n = 200"})
	c.front.Send(&pgproto3.Describe{ObjectType: 'S', Name: "p"})
	bind := func() {
		c.front.Send(&pgproto3.Bind{PreparedStatement: "p"})
		c.front.Send(&pgproto3.Execute{})
		c.front.Send(&pgproto3.Sync{})
		if err := c.front.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	bind()
	if got := c.answer(); !strings.Contains(got, "actual rows=0 loops") {
		t.Errorf("prepared: %s", got)
	}
	has(c, "UPDATE plot.points SET n = 200 WHERE id IN (1, 2)", "")
	bind()
	if got := c.answer(); !strings.Contains(got, "actual rows=2 loops") {
		t.Errorf("again: %s", got)
	}
	// One that takes too long is cancelled, and the session lives on.
	c.front.Send(&pgproto3.Query{String: "EXPLAIN ANALYZE SELECT count(*) FROM generate_series(1, 100000) a, generate_series(1, 100000) b"})
	if err := c.front.Flush(); err != nil {
		t.Fatal(err)
	}
	happens(t, func() bool {
		c.log.mu.Lock()
		defer c.log.mu.Unlock()
		last := c.log.events[len(c.log.events)-1]
		return strings.Contains(last.Sql, "100000") && last.State == posternv1.WireEvent_STATE_RUNNING
	})
	if !c.m.Cancel("wire_analyzeread-write") {
		t.Error("nothing to cancel")
	}
	if got := c.answer(); got != "57014" {
		t.Errorf("cancelled: %s: %v", got, c.end)
	}
	has(c, "SELECT 1", "1")
	// The log has each once.
	c.log.mu.Lock()
	seen := map[string]int{}
	for _, e := range c.log.events {
		if strings.HasPrefix(e.Sql, "EXPLAIN") && e.State == posternv1.WireEvent_STATE_ENDED {
			seen[e.Sql]++
		}
	}
	c.log.mu.Unlock()
	if seen["EXPLAIN ANALYZE "+query] != 1 || seen["EXPLAIN ANALYZE DELETE FROM plot.points"] != 1 {
		t.Errorf("the log has %v", seen)
	}

	c = open("analyze", "read-only", sqlsession.Mask{Columns: []string{"points.secret"}, With: "redact"})
	has(c, "EXPLAIN SELECT n FROM plot.points WHERE secret = 'c4nary5'", "Seq Scan on plot.points", "!c4nary", "!rows=")
	has(c, "EXPLAIN ANALYZE SELECT n FROM plot.points", "42501")
	has(c, "EXPLAIN SELECT n FROM plot.points WHERE secret > 'c4nary5'", "42501")

	c = open("structure", "metadata")
	has(c, "EXPLAIN "+query, "Seq Scan on plot.points", "!c4nary", "!cost=", "!rows=")
	has(c, "EXPLAIN SELECT 1/0", "22012", "!division")
}
