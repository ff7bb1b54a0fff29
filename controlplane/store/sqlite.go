package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"

	sqlitecode "modernc.org/sqlite/lib"
)

// busyTimeout is how long a statement waits for another process's lock, in
// milliseconds. Within a process the writer's place is waited for instead.
const busyTimeout = "10000"

// sqliteReaders bounds the connections that read at once.
const sqliteReaders = 4

func openSQLite(ctx context.Context, cfg Config) (*Store, error) {
	path, err := filepath.Abs(cfg.SQLitePath)
	if err != nil {
		return nil, fmt.Errorf("open the metadata store: %w", err)
	}
	// SQLite gives its -wal and -shm files the mode of the database's.
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the metadata store: %w", err)
	}
	if err := file.Close(); err != nil {
		return nil, fmt.Errorf("open the metadata store: %w", err)
	}
	s := &Store{engine: sqlite, log: cfg.Logger, replica: cfg.Replica, keep: maxQueries, keepBytes: maxKeptBytes, kept: map[string]int64{}, keepWire: maxWireQueries, wire: map[string]int{}, writer: make(chan struct{}, 1)}
	for _, db := range []struct {
		at      **sql.DB
		pragmas []string
		conns   int
	}{
		{&s.durable, []string{"synchronous(FULL)"}, 1},
		{&s.relaxed, []string{"synchronous(NORMAL)"}, 1},
		{&s.read, []string{"query_only(1)"}, sqliteReaders},
	} {
		if *db.at, err = sql.Open("sqlite", sqliteDSN(path, db.pragmas)); err != nil {
			return nil, errors.Join(fmt.Errorf("open the metadata store %s: %w", path, err), s.Close())
		}
		(*db.at).SetMaxOpenConns(db.conns)
		(*db.at).SetMaxIdleConns(db.conns)
	}
	if err := s.migrateSQLite(ctx, path); err != nil {
		if sqliteCode(err)&0xff == sqlitecode.SQLITE_NOTADB {
			err = errors.New("it is not a SQLite database")
		}
		return nil, errors.Join(fmt.Errorf("open the metadata store %s: %w", path, err), s.Close())
	}
	return s, nil
}

func sqliteDSN(path string, pragmas []string) string {
	q := url.Values{"_txlock": {"immediate"}}
	q.Add("_pragma", "busy_timeout("+busyTimeout+")")
	q.Add("_pragma", "journal_mode(WAL)")
	q.Add("_pragma", "foreign_keys(1)")
	q.Add("_pragma", "journal_size_limit(67108864)")
	for _, p := range pragmas {
		q.Add("_pragma", p)
	}
	return "file://" + (&url.URL{Path: path}).EscapedPath() + "?" + q.Encode()
}
