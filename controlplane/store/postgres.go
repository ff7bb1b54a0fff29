package store

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
)

const (
	// defaultMaxConns bounds our share of PostgreSQL's 100 default places.
	defaultMaxConns = 16
	// connectTimeout bounds one attempt to connect, unless the DSN says otherwise.
	connectTimeout = 10 * time.Second
)

func openPostgres(ctx context.Context, cfg Config) (*Store, error) {
	config, err := parseDSN(cfg.PostgresDSN)
	if err != nil {
		return nil, fmt.Errorf("open the metadata store: %w", err)
	}
	if cfg.MaxConns == 0 {
		cfg.MaxConns = defaultMaxConns
	}
	s := &Store{engine: postgres, log: cfg.Logger, replica: cfg.Replica, keep: maxQueries, keepBytes: maxKeptBytes, kept: map[string]int64{}, keepWire: maxWireQueries, wire: map[string]int{}}
	s.read = sql.OpenDB(&connector{
		Connector: stdlib.GetConnector(*config, stdlib.OptionBeforeConnect(readPassword(cfg.PasswordFile))),
		rereads:   cfg.PasswordFile != "",
	})
	s.durable, s.relaxed = s.read, s.read
	s.read.SetMaxOpenConns(cfg.MaxConns)
	s.read.SetMaxIdleConns(cfg.MaxConns / 2)
	s.read.SetConnMaxIdleTime(5 * time.Minute)
	where := fmt.Sprintf("database %q at %s", config.Database, config.Host)
	if err := s.preflight(ctx, config, cfg.PasswordFile); err != nil {
		return nil, errors.Join(fmt.Errorf("open the metadata store, %s: %w", where, err), s.Close())
	}
	if err := s.migratePostgres(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("open the metadata store, %s: %w", where, err), s.Close())
	}
	return s, nil
}

// parseDSN reads the address. It refuses a password in it: the address is on a
// command line and in process listings.
func parseDSN(dsn string) (*pgx.ConnConfig, error) {
	if hasPassword(dsn) {
		return nil, errors.New("the database's address holds a password, which others can see in the process list: put it in a file and name that with --database-password-file")
	}
	config, err := pgx.ParseConfig(dsn)
	if err != nil {
		return nil, fmt.Errorf("the database's address: %w", err)
	}
	if config.ConnectTimeout == 0 {
		config.ConnectTimeout = connectTimeout
	}
	if config.RuntimeParams["application_name"] == "" {
		config.RuntimeParams["application_name"] = "postern"
	}
	return config, nil
}

// hasPassword finds a password in a URL's user part or parameters, or among
// key=value pairs. It is strict rather than clever: a value that merely contains
// " password=" is refused as well.
func hasPassword(dsn string) bool {
	if scheme, rest, ok := strings.Cut(dsn, "://"); ok && (scheme == "postgres" || scheme == "postgresql") {
		authority, query, _ := strings.Cut(rest, "?")
		if at := strings.LastIndexByte(authority, '@'); at >= 0 && strings.Contains(authority[:at], ":") {
			return true
		}
		values, err := url.ParseQuery(query)
		return values.Has("password") || values.Has("sslpassword") || (err != nil && strings.Contains(query, "password"))
	}
	parts := strings.Split(dsn, "=")
	for _, part := range parts[:len(parts)-1] {
		key := strings.Fields(part)
		if len(key) > 0 && strings.HasSuffix(key[len(key)-1], "password") {
			return true
		}
	}
	return false
}

// readPassword reads the file for every connection. Without a file, libpq's own
// places (PGPASSWORD, ~/.pgpass, peer authentication) hold.
func readPassword(file string) func(context.Context, *pgx.ConnConfig) error {
	return func(_ context.Context, config *pgx.ConnConfig) error {
		if file == "" {
			return nil
		}
		content, err := os.ReadFile(file)
		if err != nil {
			return fmt.Errorf("the database's password: %w", err)
		}
		config.Password = strings.TrimRight(string(content), "\r\n")
		if config.Password == "" {
			return fmt.Errorf("the database's password: %s is empty", file)
		}
		return nil
	}
}

// connector tries again when PostgreSQL refuses the password: between changing
// the role and replacing the file there is a moment when they differ.
type connector struct {
	driver.Connector
	rereads bool
}

// rereadDelays are the pauses before the password file is read again.
var rereadDelays = []time.Duration{50 * time.Millisecond, 200 * time.Millisecond, time.Second}

// Connect opens a connection, with the password as the file says now.
func (c *connector) Connect(ctx context.Context) (driver.Conn, error) {
	for _, delay := range rereadDelays {
		conn, err := c.Connector.Connect(ctx)
		if err == nil || !c.rereads || pgCode(err) != "28P01" {
			return conn, err
		}
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return nil, err
		}
	}
	return c.Connector.Connect(ctx)
}
