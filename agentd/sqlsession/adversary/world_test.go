package adversary

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/e2e/pgserver"
)

// The two databases of a world. They differ in the values of values.sql alone.
const (
	alpha = "alpha"
	beta  = "beta"
)

// A role that every statement runs as: superusers both; shadow has a
// search_path that puts a schema of traps before pg_catalog.
const (
	roleRoot   = "root"
	roleShadow = "shadow"

	rolePassword = "marked-adversary-password"
)

// values are what the databases differ in. Lengths, order and counts differ, too.
var values = map[string]map[string]string{
	alpha: {"@S@": "kanari-a", "@N@": "77123450", "@D@": "1971-03-05", "@ROWS@": "100"},
	beta:  {"@S@": "x-kanari-longer-b", "@N@": "981237712", "@D@": "1999-11-28", "@ROWS@": "20000"},
}

// world is a server under attack, with what it could reach from there.
type world struct {
	server, other *pgserver.Server
	// dir is what the server may write to.
	dir string
	// sentinel listens and does nothing; busy runs a long statement.
	sentinel, busy *pgx.Conn
	// watcher reads the state of alpha.
	watcher *pgx.Conn
	busyEnd func()
	// state and sequences are the queries for everything that has a table.
	state, sequences string
	wrote            bool // the watcher itself used a transaction id
}

var (
	worldOnce sync.Once
	theWorld  *world
	worldErr  error
)

// sharedWorld is one for all tests of this package that attack.
func sharedWorld(t *testing.T) *world {
	t.Helper()
	worldOnce.Do(func() { theWorld, worldErr = makeWorld(context.Background()) })
	if worldErr != nil {
		t.Fatal(worldErr)
	}
	return theWorld
}

// ownWorld is one for a test that changes it.
func ownWorld(t *testing.T) *world {
	t.Helper()
	w, err := makeWorld(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.stop(); err != nil {
			t.Error(err)
		}
	})
	return w
}

func stopWorlds() error {
	if theWorld == nil {
		return nil
	}
	return theWorld.stop()
}

func makeWorld(ctx context.Context) (_ *world, err error) {
	w := &world{busyEnd: func() {}}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.stop())
		}
	}()
	if w.other, err = pgserver.Launch(ctx, pgserver.Options{Settings: map[string]string{"log_connections": "on"}}); err != nil {
		return nil, err
	}
	if err = w.other.SQL(ctx, "CREATE TABLE there (id int, what text)", "INSERT INTO there VALUES (1, 'there')"); err != nil {
		return nil, err
	}
	w.server, err = pgserver.Launch(ctx, pgserver.Options{Settings: map[string]string{
		"max_connections": "60", "autovacuum": "off", "checkpoint_timeout": "1d", "wal_level": "logical", "max_prepared_transactions": "5",
		"shared_preload_libraries": "pg_stat_statements", "log_connections": "off", "wal_writer_delay": "10ms",
	}})
	if err != nil {
		return nil, err
	}
	w.dir = filepath.Join(w.server.Dir, "watched")
	if err = os.Mkdir(w.dir, 0o777); err != nil {
		return nil, err
	}
	if err = os.Chmod(w.dir, 0o777); err != nil {
		return nil, err
	}
	for _, role := range []string{roleRoot, roleShadow} {
		if err = w.server.CreateRole(ctx, role, rolePassword, "SUPERUSER"); err != nil {
			return nil, err
		}
	}
	err = w.server.SQL(ctx, "CREATE ROLE bystander", "CREATE ROLE member", "CREATE DATABASE "+alpha, "ALTER ROLE shadow SET search_path = evil, public, pg_catalog")
	if err != nil {
		return nil, err
	}
	if err = w.script(ctx, alpha, "testdata/world.sql"); err != nil {
		return nil, err
	}
	if err = w.server.SQL(ctx, "CREATE DATABASE "+beta+" TEMPLATE "+alpha); err != nil {
		return nil, err
	}
	for _, database := range []string{alpha, beta} {
		if err = w.script(ctx, database, "testdata/values.sql"); err != nil {
			return nil, err
		}
	}
	if w.watcher, err = w.server.Connect(ctx, alpha); err != nil {
		return nil, err
	}
	if err = w.startSentinel(ctx); err != nil {
		return nil, err
	}
	if err = w.startBusy(ctx); err != nil {
		return nil, err
	}
	return w, w.prepareState(ctx)
}

// startSentinel connects who listens.
func (w *world) startSentinel(ctx context.Context) error {
	var err error
	if w.sentinel, err = w.server.Connect(ctx, alpha); err != nil {
		return err
	}
	_, err = w.sentinel.Exec(ctx, "LISTEN canary_channel")
	return err
}

// startBusy runs a statement with a canary in its text for as long as the world lives.
func (w *world) startBusy(ctx context.Context) error {
	var err error
	if w.busy, err = w.server.Connect(ctx, alpha); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = w.busy.Exec(ctx, "SELECT pg_sleep(100000) -- kanari-query", pgx.QueryExecModeSimpleProtocol)
	}()
	w.busyEnd = func() {
		cancel()
		<-done
	}
	for {
		var active bool
		err := w.watcher.QueryRow(ctx, "SELECT coalesce(state, '') = 'active' AND coalesce(wait_event, '') = 'PgSleep' FROM pg_stat_activity WHERE pid = $1", int(w.busy.PgConn().PID())).Scan(&active)
		if err != nil || active {
			return err
		}
		time.Sleep(time.Millisecond)
	}
}

// script runs a file of testdata as the superuser.
func (w *world) script(ctx context.Context, database, path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	conn, err := w.server.Connect(ctx, database)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(ctx) }()
	if _, err := conn.PgConn().Exec(ctx, w.fill(string(text), database)).ReadAll(); err != nil {
		return fmt.Errorf("%s in %s: %w", path, database, err)
	}
	return nil
}

// fill puts a world's own words into a text of testdata.
func (w *world) fill(text, database string) string {
	pairs := []string{
		"@DB@", database,
		"@DIR@", w.dir, "@OTHERPORT@", strconv.Itoa(w.other.Port), "@OTHERPASSWORD@", w.other.Password,
		"@OTHER@", fmt.Sprintf("host=127.0.0.1 port=%d user=postgres password=%s dbname=postgres", w.other.Port, w.other.Password),
		"@SELF@", fmt.Sprintf("host=127.0.0.1 port=%d user=postgres password=%s dbname=%s", w.server.Port, w.server.Password, alpha),
	}
	if w.sentinel != nil && w.busy != nil {
		pairs = append(pairs, "@SENTINEL@", strconv.Itoa(int(w.sentinel.PgConn().PID())), "@BUSY@", strconv.Itoa(int(w.busy.PgConn().PID())))
	}
	for mark, value := range values[database] {
		pairs = append(pairs, mark, value)
	}
	return strings.NewReplacer(pairs...).Replace(text)
}

func (w *world) stop() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	w.busyEnd()
	for _, conn := range []*pgx.Conn{w.watcher, w.sentinel, w.busy} {
		if conn != nil {
			_ = conn.Close(ctx)
		}
	}
	var err error
	for _, s := range []*pgserver.Server{w.server, w.other} {
		if s != nil {
			err = errors.Join(err, s.Stop())
		}
	}
	return err
}

// source is a database of the world as a data source.
func (w *world) source(name, role, database string, guard sqlsession.Guard) sqlsession.Source {
	return sqlsession.Source{
		Name: name, Engine: "postgres", DSN: w.server.DSN(role, database), Guard: guard, ReadWrite: guard.Mode == "read-write",
		Password: func(context.Context) (string, error) { return rolePassword, nil },
		MaxRows:  5000, MaxBytes: 32 << 20, StatementTimeout: time.Minute,
	}
}

// newManager makes a manager whose log is kept: it is searched for canaries, too.
func newManager(t *testing.T, sources ...sqlsession.Source) (*sqlsession.Manager, *lockedBuffer) {
	t.Helper()
	log := new(lockedBuffer)
	m := sqlsession.New(sqlsession.Config{Warm: -1, Parser: parser, Logger: slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	m.SetSources(sources)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := m.Close(ctx); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return m, log
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// take returns what was written since the last time.
func (l *lockedBuffer) take() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	text := l.b.String()
	l.b.Reset()
	return text
}

var queryNumber atomic.Int64

func queryID() string { return fmt.Sprintf("qry_%d", queryNumber.Add(1)) }
