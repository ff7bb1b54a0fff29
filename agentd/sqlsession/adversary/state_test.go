package adversary

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// state is everything of a world that a later session, another backend, another
// server or the file system could see, by what it is:
//
//   - every table of the database, catalogs included: each row with its ctid, xmin
//     and xmax, so that rewriting a row as it was and locking it show, too;
//   - every sequence; large objects are rows of a catalog;
//   - the next transaction id, and the WAL but for what plain reading writes;
//   - settings of a new session with where each comes from, the time they were
//     loaded, postgresql.conf and its neighbours;
//   - locks, prepared transactions, replication slots and origins, snapshots exported;
//   - when statistics were reset;
//   - the other backends: the one that listens (and what it heard) and the busy one;
//   - the names of the server's files, and all of the directory it may write to;
//   - how often the other server was connected to, and its table.
type state map[string]string

// settling is how long what the reset after a statement puts right may take.
const settling = 2 * time.Second

// tablePrefix is how the names of tables begin in a state.
const tablePrefix = "table "

// prepareState builds the queries that read what has a table.
func (w *world) prepareState(ctx context.Context) error {
	rows, err := w.watcher.Query(ctx, `SELECT n.nspname, c.relname, c.relkind::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE c.relkind IN ('r', 'm', 'S') AND n.nspname NOT IN ('pg_toast') AND n.nspname !~ '^pg_temp' ORDER BY 1, 2`)
	if err != nil {
		return err
	}
	defer rows.Close()
	var tables, sequences []string
	for rows.Next() {
		var schema, name, kind string
		if err := rows.Scan(&schema, &name, &kind); err != nil {
			return err
		}
		full := pgx.Identifier{schema, name}.Sanitize()
		// A version of a row is known by its place and its transactions; these two
		// catalogs are also written in place.
		row := "concat_ws(' ', t.ctid, t.xmin, t.xmax)"
		if schema != "pg_catalog" || name == "pg_class" || name == "pg_database" {
			row = "concat_ws(' ', t.ctid, t.xmin, t.xmax, t.*)"
		}
		name = strings.ReplaceAll(full, "'", "''")
		if kind == "S" {
			sequences = append(sequences, fmt.Sprintf("SELECT 'sequence %s', concat_ws(' ', last_value, is_called, log_cnt) FROM %s", name, full))
			continue
		}
		tables = append(tables, fmt.Sprintf("SELECT '%s%s', md5(coalesce(string_agg(%s, E'\\n' ORDER BY t.ctid), '')) FROM %s t", tablePrefix, name, row, full))
	}
	w.state, w.sequences = strings.Join(tables, "\nUNION ALL "), strings.Join(sequences, "\nUNION ALL ")
	return rows.Err()
}

// scalars are asked beside the tables, each for one text.
var scalars = map[string]string{
	"next xid":              "SELECT pg_snapshot_xmax(pg_current_snapshot())::text",
	"settings loaded":       "SELECT pg_conf_load_time()::text || pg_postmaster_start_time()",
	"prepared transactions": "SELECT coalesce(string_agg(t::text, ' '), '') FROM pg_prepared_xacts t",
	"replication slots":     "SELECT coalesce(string_agg(slot_name, ' '), '') FROM pg_replication_slots",
	"replication origins":   "SELECT coalesce(string_agg(t::text, ' '), '') FROM pg_replication_origin_status t",
	"statistics reset": `SELECT concat_ws(' ', (SELECT string_agg(stats_reset::text, ',' ORDER BY datid) FROM pg_stat_database), (SELECT stats_reset FROM pg_stat_bgwriter),
		(SELECT stats_reset FROM pg_stat_wal), (SELECT stats_reset FROM pg_stat_archiver), (SELECT string_agg(stats_reset::text, ',' ORDER BY name) FROM pg_stat_slru),
		(SELECT stats_reset FROM pg_stat_statements_info))`,
	"exported snapshots": "SELECT coalesce(string_agg(f, ' '), '') FROM pg_ls_dir('pg_snapshots') f",
	"locks": `SELECT coalesce(string_agg(concat_ws(' ', locktype, relation::regclass, mode, classid, objid), ', ' ORDER BY pid, locktype, relation, objid), '')
		FROM pg_locks WHERE pid NOT IN (pg_backend_pid(), @BUSY@) AND locktype <> 'virtualxid' AND pid IN (SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend')`,
	"sentinels": "SELECT coalesce(string_agg(concat_ws(' ', pid, backend_start, CASE WHEN pid = @BUSY@ THEN query_start END, state, application_name), ', ' ORDER BY pid), '') FROM pg_stat_activity WHERE pid IN (@SENTINEL@, @BUSY@)",
	"strangers": "SELECT coalesce(string_agg(concat_ws(' ', usename, backend_type, left(query, 60)), ', '), '') FROM pg_stat_activity WHERE backend_type NOT IN ('client backend', 'checkpointer', 'background writer', 'walwriter', 'logical replication launcher', 'archiver') OR (usename NOT IN ('root', 'shadow') AND pid NOT IN (@SENTINEL@, @BUSY@, pg_backend_pid()))",
}

// snapshot reads the state. Nothing but a sequence changes in a table without WAL:
// where there is none since before, which may be nil, the tables are not read again.
func (w *world) snapshot(ctx context.Context, before state) (state, error) {
	s := state{}
	for name, sql := range scalars {
		var text string
		if err := w.watcher.QueryRow(ctx, w.fill(sql, alpha)).Scan(&text); err != nil {
			return nil, fmt.Errorf("read %s: %w", name, err)
		}
		s[name] = text
	}
	var lsn string
	if err := w.watcher.QueryRow(ctx, "SELECT pg_current_wal_insert_lsn()::text").Scan(&lsn); err != nil {
		return nil, err
	}
	s["wal"] = lsn
	if before != nil && before["wal"] == lsn && before["next xid"] == s["next xid"] {
		for name, sum := range before {
			if strings.HasPrefix(name, tablePrefix) {
				s[name] = sum
			}
		}
	} else if err := w.read(ctx, s, w.state); err != nil {
		// A table may be gone: then it is in the state before alone.
		if err := w.prepareState(ctx); err != nil {
			return nil, err
		}
		if err := w.read(ctx, s, w.state); err != nil {
			return nil, err
		}
	}
	if err := w.read(ctx, s, w.sequences); err != nil {
		return nil, err
	}
	if err := w.settings(ctx, s); err != nil {
		return nil, err
	}
	heard, err := w.heard(ctx)
	if err != nil {
		return nil, err
	}
	s["notifications"] = heard
	if err := w.files(s); err != nil {
		return nil, err
	}
	log, err := os.ReadFile(w.other.LogFile())
	if err != nil {
		return nil, err
	}
	s["other server"] = fmt.Sprint(strings.Count(string(log), "connection received"))
	return s, nil
}

// read adds the names and sums that a query tells.
func (w *world) read(ctx context.Context, s state, sql string) error {
	rows, err := w.watcher.Query(ctx, sql)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var name, sum string
		if err := rows.Scan(&name, &sum); err != nil {
			return err
		}
		s[name] = sum
	}
	return rows.Err()
}

// settings are those of a new session, as the attacked role.
func (w *world) settings(ctx context.Context, s state) error {
	config, err := pgx.ParseConfig(w.server.SocketDSN(roleRoot, alpha))
	if err != nil {
		return err
	}
	config.Password = rolePassword
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return fmt.Errorf("a new session: %w", err)
	}
	defer func() { _ = conn.Close(ctx) }()
	var text string
	err = conn.QueryRow(ctx, "SELECT string_agg(concat_ws('|', name, setting, source, sourcefile, pending_restart), E'\n' ORDER BY name) FROM pg_settings").Scan(&text)
	s["settings"] = text
	return err
}

// heard is what the sentinel was notified of, so far.
func (w *world) heard(ctx context.Context) (string, error) {
	if _, err := w.sentinel.Exec(ctx, "-- idle", pgx.QueryExecModeSimpleProtocol); err != nil {
		return "the sentinel is gone: " + err.Error(), nil
	}
	wait, cancel := context.WithTimeout(ctx, time.Millisecond)
	defer cancel()
	if n, err := w.sentinel.WaitForNotification(wait); err == nil {
		return fmt.Sprintf("%s %q from %d", n.Channel, n.Payload, n.PID), nil
	}
	return "", nil
}

// volatileFiles are names that come and go by themselves.
var volatileFiles = []string{"pg_wal/", "pg_stat_tmp", "pg_stat/", "pgsql_tmp", "pg_internal.init", "pg_logical/snapshots", "pg_logical/mappings", "pg_xact/", "pg_subtrans/", "pg_multixact/", "pg_notify/", "postmaster.", "pg_dynshmem", "pg_snapshots/"}

func (w *world) files(s state) error {
	data := filepath.Join(w.server.Dir, "data")
	var names []string
	err := filepath.WalkDir(data, func(path string, d fs.DirEntry, err error) error {
		if os.IsNotExist(err) {
			return nil
		}
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(data, path)
		for _, v := range volatileFiles {
			if strings.Contains(name, v) {
				return nil
			}
		}
		names = append(names, name)
		return nil
	})
	if err != nil {
		return err
	}
	s["data directory"] = strings.Join(names, "\n")
	for _, name := range []string{"postgresql.conf", "postgresql.auto.conf", "pg_hba.conf", "pg_ident.conf", "PG_VERSION"} {
		text, err := os.ReadFile(filepath.Join(data, name))
		if err != nil {
			return err
		}
		s["file "+name] = string(text)
	}
	found, err := os.ReadDir(w.dir)
	if err != nil {
		return err
	}
	names = nil
	for _, f := range found {
		text, _ := os.ReadFile(filepath.Join(w.dir, f.Name()))
		names = append(names, fmt.Sprintf("%s %x", f.Name(), sha256.Sum256(text)))
	}
	s["watched directory"] = strings.Join(names, "\n")
	return nil
}

// reading are the WAL records that plain reading may write: pruning of pages,
// hints, and the server's own heartbeats.
const reading = `SELECT coalesce(string_agg(resource_manager || ' ' || record_type, ', '), '') FROM pg_get_wal_records_info($1::text::pg_lsn, $2::text::pg_lsn)
	WHERE NOT (resource_manager = 'Standby' AND record_type = 'RUNNING_XACTS') AND NOT (resource_manager = 'Heap2' AND record_type IN ('PRUNE', 'VISIBLE'))
	AND NOT (resource_manager = 'XLOG' AND record_type = 'FPI_FOR_HINT')`

// diff tells what differs between two states; empty: nothing.
func (w *world) diff(ctx context.Context, before, after state) ([]string, error) {
	var found []string
	for name := range after {
		if _, ok := before[name]; !ok {
			found = append(found, name+" is new")
		}
	}
	for name, old := range before {
		now, ok := after[name]
		switch {
		case !ok:
			found = append(found, name+" is gone")
		case now == old:
		case name == "wal":
			records, err := w.wal(ctx, old, now)
			if err != nil {
				return nil, err
			}
			if records != "" {
				found = append(found, "wal: "+clip(records))
			}
		default:
			found = append(found, fmt.Sprintf("%s: %s", name, clip(delta(old, now))))
		}
	}
	sort.Strings(found)
	return found, nil
}

// wal names the records between two positions that reading does not write.
func (w *world) wal(ctx context.Context, from, to string) (string, error) {
	// What was inserted can be read when it is flushed. The WAL writer may sleep: a
	// commit of our own, with a transaction id, wakes it.
	var flushed bool
	if err := w.watcher.QueryRow(ctx, "SELECT pg_current_wal_flush_lsn() >= $1::text::pg_lsn", to).Scan(&flushed); err != nil {
		return "", err
	}
	if !flushed {
		w.wrote = true
		if _, err := w.watcher.Exec(ctx, "SELECT pg_logical_emit_message(true, 'flush', '')"); err != nil {
			return "", err
		}
	}
	var records string
	if err := w.watcher.QueryRow(ctx, reading, from, to).Scan(&records); err != nil {
		return "", fmt.Errorf("read the WAL from %s to %s: %w", from, to, err)
	}
	return records, nil
}

// delta shows the first line that differs.
func delta(old, now string) string {
	o, n := strings.Split(old, "\n"), strings.Split(now, "\n")
	for i := range min(len(o), len(n)) {
		if o[i] != n[i] {
			return fmt.Sprintf("%q became %q", o[i], n[i])
		}
	}
	return fmt.Sprintf("%d lines became %d", len(o), len(n))
}

func clip(text string) string {
	if len(text) > 300 {
		return text[:300] + "…"
	}
	return text
}

// changed compares the world with a state, and waits a little for what the reset
// after a statement puts right.
func (w *world) changed(ctx context.Context, before state) (found []string, after state, err error) {
	for deadline := time.Now().Add(settling); ; time.Sleep(10 * time.Millisecond) {
		if after, err = w.snapshot(ctx, before); err != nil {
			return nil, nil, err
		}
		found, err = w.diff(ctx, before, after)
		if w.wrote && err == nil {
			w.wrote = false
			if after, err = w.snapshot(ctx, nil); err != nil {
				return nil, nil, err
			}
			// Our own transaction is no change, should this be looked at again.
			before = maps.Clone(before)
			for _, name := range []string{"next xid", "wal"} {
				if !slices.ContainsFunc(found, func(f string) bool { return strings.HasPrefix(f, name+":") }) {
					before[name] = after[name]
				}
			}
		}
		if err != nil || len(found) == 0 || time.Now().After(deadline) {
			return found, after, err
		}
		// Only what the session still holds can settle.
		if !slices.ContainsFunc(found, func(f string) bool { return strings.HasPrefix(f, "locks:") }) {
			return found, after, nil
		}
	}
}
