package store

import (
	"context"
	"database/sql"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/postern-dev/postern/proto"
)

// tables are all tables but goose's own, in the order of their migrations.
var tables = []string{
	"organizations", "tokens", "registration_keys", "agents", "agent_certificates", "authorities",
	"link_events", "queries", "audit", "audit_heads", "agent_audit_heads", "kept_rows", "replicas", "links", "master_keys", "file_keys",
}

// preflight finds out in one line what PostgreSQL will not let us do, and which
// statement mends it. CREATE is asked for only while there is something to make.
func (s *Store) preflight(ctx context.Context, config *pgx.ConnConfig, passwordFile string) error {
	conn, err := s.read.Conn(ctx)
	if err != nil {
		return explainConnect(config, passwordFile, err)
	}
	defer func() { _ = conn.Close() }()
	var user, database, schema string
	var publicUsage bool
	if err := conn.QueryRowContext(ctx, `SELECT current_user, current_database(), coalesce(current_schema(), ''),
		coalesce((SELECT has_schema_privilege(oid, 'USAGE') FROM pg_namespace WHERE nspname = 'public'), true)`).
		Scan(&user, &database, &schema, &publicUsage); err != nil {
		return err
	}
	role := pgx.Identifier{user}.Sanitize()
	if schema == "" && !publicUsage {
		return fmt.Errorf("role %s lacks USAGE on schema public: run GRANT USAGE, CREATE ON SCHEMA public TO %s", role, role)
	}
	if schema == "" {
		return fmt.Errorf("no schema of role %s's search_path exists: run CREATE SCHEMA AUTHORIZATION %s", role, role)
	}
	version, err := postgresVersion(ctx, conn, role, schema)
	if err != nil {
		return err
	}
	_, latest, err := migrator(postgres, s.read)
	if err != nil {
		return err
	}
	if err := refuseNewer(version, latest); err != nil {
		return err
	}
	if version < latest {
		var create bool
		if err := conn.QueryRowContext(ctx, "SELECT has_schema_privilege(current_schema(), 'CREATE')").Scan(&create); err != nil {
			return err
		}
		if !create {
			in := pgx.Identifier{schema}.Sanitize()
			return fmt.Errorf("role %s lacks CREATE on schema %s, needed to make the tables: run GRANT CREATE ON SCHEMA %s TO %s", role, in, in, role)
		}
	}
	return tablePrivileges(ctx, conn, role, schema)
}

// postgresVersion reads the schema's version without making goose's table; 0 if
// there is none.
func postgresVersion(ctx context.Context, conn *sql.Conn, role, schema string) (int64, error) {
	var exists, readable bool
	if err := conn.QueryRowContext(ctx, `SELECT to_regclass($1) IS NOT NULL, coalesce(has_table_privilege(to_regclass($1), 'SELECT'), false)`,
		versionTable).Scan(&exists, &readable); err != nil || !exists {
		return 0, err
	}
	if !readable {
		return 0, missingTablePrivileges(role, schema, []string{"SELECT on " + versionTable})
	}
	var version int64
	err := conn.QueryRowContext(ctx, "SELECT coalesce(max(version_id), 0) FROM "+versionTable).Scan(&version)
	return version, err
}

func tablePrivileges(ctx context.Context, conn *sql.Conn, role, schema string) error {
	rows, err := conn.QueryContext(ctx, `SELECT p || ' on ' || t
		FROM unnest(string_to_array($1, ',')) t, unnest(string_to_array('SELECT,INSERT,UPDATE,DELETE', ',')) p
		WHERE to_regclass(t) IS NOT NULL AND NOT has_table_privilege(to_regclass(t), p) ORDER BY t, p`, strings.Join(tables, ","))
	if err != nil {
		return err
	}
	defer func() { _ = rows.Close() }()
	var missing []string
	for rows.Next() {
		var one string
		if err := rows.Scan(&one); err != nil {
			return err
		}
		missing = append(missing, one)
	}
	if err := rows.Err(); err != nil || len(missing) == 0 {
		return err
	}
	return missingTablePrivileges(role, schema, missing)
}

func missingTablePrivileges(role, schema string, missing []string) error {
	more := ""
	if len(missing) > 3 {
		more = fmt.Sprintf(" and %d more", len(missing)-3)
		missing = missing[:3]
	}
	return fmt.Errorf("role %s lacks %s%s: run GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA %s TO %s as the tables' owner",
		role, strings.Join(missing, ", "), more, pgx.Identifier{schema}.Sanitize(), role)
}

// explainConnect says what to do about a refused connection.
func explainConnect(config *pgx.ConnConfig, passwordFile string, err error) error {
	role, database := pgx.Identifier{config.User}.Sanitize(), pgx.Identifier{config.Database}.Sanitize()
	switch pgCode(err) {
	case "42501":
		return fmt.Errorf("role %s lacks CONNECT on it: run GRANT CONNECT ON DATABASE %s TO %s", role, database, role)
	case "3D000":
		return fmt.Errorf("it does not exist: run CREATE DATABASE %s OWNER %s", database, role)
	case "28P01":
		if passwordFile == "" {
			return fmt.Errorf("PostgreSQL asks role %s for a password: name a file that holds it with --database-password-file", role)
		}
		return fmt.Errorf("PostgreSQL refuses the password of role %s in %s: correct the file, or run ALTER ROLE %s PASSWORD '...'", role, passwordFile, role)
	case "28000":
		return proto.Errorf(proto.CodeUnavailable, "PostgreSQL lets role %s in from here neither with nor without a password: check that the role exists and may log in, and pg_hba.conf: %w", role, err)
	case "":
		// Not PostgreSQL's word: no connection, no password file. pgx's text names
		// the host and the cause, and hides passwords.
		return proto.Errorf(proto.CodeUnavailable, "connect: %w", err) // in one line
	}
	return err
}
