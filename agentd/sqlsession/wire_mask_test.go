package sqlsession_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/e2e/pgserver"
)

// pgClient makes a client with a library's own ways of a wire session.
func pgClient(t *testing.T, c *wireClient) *pgconn.PgConn {
	t.Helper()
	config, err := pgconn.ParseConfig(server.DSN("reader", pgserver.Superuser))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := pgconn.Construct(&pgconn.HijackedConn{Conn: c.conn, Frontend: c.front, TxStatus: 'I', ParameterStatuses: map[string]string{}, Config: config})
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// results is all that a client saw of a statement.
func results(ctx context.Context, conn *pgconn.PgConn, sql string, way int) (rows [][][]byte, fields []pgconn.FieldDescription, err error) {
	switch way {
	case 0: // simple
		all, err := conn.Exec(ctx, sql).ReadAll()
		for _, r := range all {
			rows, fields = append(rows, r.Rows...), r.FieldDescriptions
		}
		return rows, fields, err
	case 1, 2: // extended, unnamed, text or binary
		r := conn.ExecParams(ctx, sql, nil, nil, nil, []int16{int16(way - 1)}).Read()
		return r.Rows, r.FieldDescriptions, r.Err
	}
	description, err := conn.Prepare(ctx, "prepared", sql, nil)
	if err != nil {
		return nil, nil, err
	}
	r := conn.ExecPrepared(ctx, "prepared", nil, nil, []int16{0}).Read()
	if err := conn.Deallocate(ctx, "prepared"); err != nil && r.Err == nil {
		return nil, nil, err
	}
	return r.Rows, description.Fields, r.Err
}

// TestWireMasked: PostgreSQL's own protocol masks as every other path does.
func TestWireMasked(t *testing.T) {
	ctx, done := context.WithTimeout(t.Context(), time.Minute)
	defer done()
	m := newManager(t, sqlsession.Config{}, maskSource(t, "equality"))
	want, _ := query(t, m, request("SELECT id, email, name, salary, pay, vip, token, data, note FROM people WHERE id IN (1, 51) ORDER BY id"))
	c := openWire(t, m, "wire_mask")
	conn := pgClient(t, c)
	for way := range 4 {
		rows, fields, err := results(ctx, conn, "SELECT id, email, name, salary, pay, vip, token, data, note FROM people WHERE id IN (1, 51) ORDER BY id", way)
		if err != nil {
			t.Fatal(way, err)
		}
		if len(rows) != 2 {
			t.Fatalf("way %d: %d rows", way, len(rows))
		}
		for i, oid := range []uint32{23, 25, 25, 23, 1700, 16, 2950, 3802, 25} {
			if fields[i].DataTypeOID != oid {
				t.Errorf("way %d: column %d has type %d, want %d", way, i, fields[i].DataTypeOID, oid)
			}
			if rows[1][i] != nil && i > 0 {
				t.Errorf("way %d: NULL became %q", way, rows[1][i])
			}
			if way == 2 {
				continue
			}
			got := string(rows[0][i])
			if rows[0][i] == nil {
				got = "(null)"
			}
			if got != want.rows[0][i] {
				t.Errorf("way %d: column %d is %s, as Arrow %s", way, i, got, want.rows[0][i])
			}
		}
		if way == 2 {
			if string(rows[0][1]) != want.rows[0][1] || len(rows[0][6]) != 16 || string(rows[0][7]) != "\x01\"***\"" || len(rows[0][3]) != 4 {
				t.Errorf("binary: %q", rows[0])
			}
		}
		// Patterns, also where no column is masked.
		rows, _, err = results(ctx, conn, "SELECT t, a FROM plain WHERE id = 1", way)
		if err != nil || string(rows[0][0]) != "call ************1111 now" || strings.Contains(string(rows[0][1]), "4111111111111111") {
			t.Errorf("way %d: %q, %v", way, rows, err)
		}
		for _, sql := range []string{
			"SELECT id FROM people WHERE email LIKE 'c%'", "SELECT email FROM people ORDER BY 1", "COPY people TO STDOUT", "COPY (SELECT email FROM people) TO STDOUT",
			"SELECT query_to_xml('select email from masked.people', true, true, '')", "INSERT INTO orders (email) SELECT email FROM people",
			"CREATE VIEW masked.seen AS SELECT email FROM people", "ALTER TABLE people RENAME email TO x", "DO 'BEGIN END'",
		} {
			var e *pgconn.PgError
			if _, _, err := results(ctx, conn, sql, way); !errors.As(err, &e) || e.Code != "42501" && e.Code != "0A000" {
				t.Errorf("way %d: %s: %v", way, sql, err)
			}
		}
	}
	// A statement that is prepared once and bound often is described by nobody but us.
	c.front.Send(&pgproto3.Parse{Name: "p", Query: "SELECT email FROM people WHERE id = $1", ParameterOIDs: []uint32{23}})
	for _, id := range []string{"1", "2"} {
		c.front.Send(&pgproto3.Bind{PreparedStatement: "p", Parameters: [][]byte{[]byte(id)}})
		c.front.Send(&pgproto3.Execute{})
	}
	c.front.Send(&pgproto3.Sync{})
	if err := c.front.Flush(); err != nil {
		t.Fatal(err)
	}
	if words := strings.Fields(c.answer()); len(words) != 2 || len(words[0]) != 26 || len(words[1]) != 26 || words[0] == words[1] {
		t.Errorf("pipelined: %q", words)
	}
	// A named portal in pieces.
	c.front.Send(&pgproto3.Parse{Query: "SELECT email FROM people WHERE id < 10 ORDER BY id"})
	c.front.Send(&pgproto3.Bind{DestinationPortal: "q"})
	c.front.Send(&pgproto3.Execute{Portal: "q", MaxRows: 2})
	c.front.Send(&pgproto3.Execute{Portal: "q", MaxRows: 2})
	c.front.Send(&pgproto3.Sync{})
	if err := c.front.Flush(); err != nil {
		t.Fatal(err)
	}
	if words := strings.Fields(c.answer()); len(words) != 4 || len(words[3]) != 26 {
		t.Errorf("in pieces: %q", words)
	}
	// Prepared by SQL, cursors.
	c.want("PREPARE s AS SELECT email FROM people WHERE id = 1", "")
	if got := c.ask("EXECUTE s"); got != want.rows[0][1] {
		t.Errorf("EXECUTE: %s", got)
	}
	c.want("BEGIN", "")
	c.want("DECLARE x CURSOR FOR SELECT note FROM people WHERE id = 1", "")
	c.want("FETCH ALL FROM x", "note 1 card ************1001")
	c.want("DECLARE y CURSOR FOR SELECT email FROM people", "42501")
	c.want("ROLLBACK", "")
	// An error in a cycle keeps to its text.
	for _, sql := range []string{"UPDATE people SET id = NULL WHERE id = 1", "INSERT INTO people (id, email) VALUES (1, 'c4nary')"} {
		_, _, err := results(ctx, conn, sql, 0)
		var e *pgconn.PgError
		if !errors.As(err, &e) || hasCanary(fmt.Sprintf("%+v", *e)) != "" || e.Code[:2] != "23" {
			t.Errorf("%s: %+v", sql, err)
		}
	}
	_, _, err := results(ctx, conn, "SELECT nothing FROM people", 0)
	if err == nil || !strings.Contains(err.Error(), "nothing") {
		t.Errorf("an error of names is not told: %v", err)
	}
	c.log.mu.Lock()
	defer c.log.mu.Unlock()
	for _, e := range c.log.events {
		if strings.Contains(e.String(), "4111111111111") {
			t.Errorf("told: %v", e)
		}
	}
}

// TestWireCanary is TestCanary through PostgreSQL's own protocol.
func TestWireCanary(t *testing.T) {
	ctx, done := context.WithTimeout(t.Context(), 2*time.Minute)
	defer done()
	for _, filters := range []string{"equality", "allow"} {
		t.Run(filters, func(t *testing.T) {
			m := newManager(t, sqlsession.Config{}, maskSource(t, filters))
			c := openWire(t, m, "wire_canary")
			conn := pgClient(t, c)
			g := &generator{Rand: rand.New(rand.NewPCG(8, uint64(len(filters))))}
			ran := 0
			for i := range 300 {
				sql := g.statement()
				rows, _, err := results(ctx, conn, sql, i%4)
				text := fmt.Sprintf("%q", rows)
				if err != nil {
					var e *pgconn.PgError
					if !errors.As(err, &e) {
						t.Fatalf("%s: %v", sql, err)
					}
					text += fmt.Sprintf("%+v", *e)
				} else {
					ran++
				}
				if canary := hasCanary(text); canary != "" {
					t.Fatalf("%s came out of %s (way %d)", canary, sql, i%4)
				}
			}
			if ran < 20 {
				t.Errorf("only %d statements ran", ran)
			}
		})
	}
}
