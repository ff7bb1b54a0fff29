package store

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/pressly/goose/v3"
	"golang.org/x/sys/unix"
)

//go:embed migrations
var migrations embed.FS

// versionTable is goose's table of applied migrations.
const versionTable = "postern_schema"

// migrationLock is the key of PostgreSQL's advisory lock; any fixed number.
const migrationLock = 0x706f737465726e

// migrator makes goose's provider for one engine.
func migrator(e engine, db *sql.DB, options ...goose.ProviderOption) (*goose.Provider, int64, error) {
	dir, dialect := "migrations/sqlite", goose.DialectSQLite3
	if e == postgres {
		dir, dialect = "migrations/postgres", goose.DialectPostgres
	}
	files, err := fs.Sub(migrations, dir)
	if err != nil {
		return nil, 0, err
	}
	// Migrations of different branches may be merged in another order than that of
	// their numbers; those that are not there yet are applied wherever they stand.
	options = append(options, goose.WithTableName(versionTable), goose.WithDisableGlobalRegistry(true), goose.WithAllowOutofOrder(true))
	provider, err := goose.NewProvider(dialect, db, files, options...)
	if err != nil {
		return nil, 0, err
	}
	sources := provider.ListSources()
	return provider, sources[len(sources)-1].Version, nil
}

// migrate brings the tables up to date. Only one process at a time may be here.
func migrate(ctx context.Context, provider *goose.Provider, latest int64) error {
	version, err := provider.GetDBVersion(ctx)
	if err != nil {
		return err
	}
	if err := refuseNewer(version, latest); err != nil {
		return err
	}
	if _, err := provider.Up(ctx); err != nil {
		return fmt.Errorf("migrate: %w", err)
	}
	return nil
}

func refuseNewer(version, latest int64) error {
	if version > latest {
		return fmt.Errorf("a newer control plane has used it (schema %d, this one knows %d): upgrade this control plane, or restore a backup from before that upgrade", version, latest)
	}
	return nil
}

// migrateSQLite holds a lock file, since goose looks at the version outside its
// transaction. The kernel drops the lock with the process.
func (s *Store) migrateSQLite(ctx context.Context, path string) error {
	lock, err := os.OpenFile(path+".lock", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = lock.Close() }()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	provider, latest, err := migrator(sqlite, s.durable)
	if err != nil {
		return err
	}
	return migrate(ctx, provider, latest)
}

// migratePostgres takes an advisory lock, so several control planes that start
// together migrate once.
func (s *Store) migratePostgres(ctx context.Context) error {
	provider, latest, err := migrator(postgres, s.read)
	if err != nil {
		return err
	}
	conn, err := s.read.Conn(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	if _, err := conn.ExecContext(ctx, "SELECT pg_advisory_lock($1)", int64(migrationLock)); err != nil {
		return err
	}
	err = migrate(ctx, provider, latest)
	if _, unlockErr := conn.ExecContext(context.WithoutCancel(ctx), "SELECT pg_advisory_unlock($1)", int64(migrationLock)); unlockErr != nil {
		err = errors.Join(err, unlockErr)
	}
	return err
}
