package child

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
)

const (
	resultOK      = "ok"
	resultWarning = "warning"
	resultFailed  = "failed"
)

// checkTimeout bounds all questions of a check together.
const checkTimeout = 15 * time.Second

// maxClockDifference is how far the two clocks may be apart.
const maxClockDifference = 5 * time.Second

// oldestVersion is the oldest PostgreSQL that still gets fixes.
const oldestVersion = 13

// check looks at the connection, the server and the role. ok tells whether the
// database session may be used again.
func (s *session) check() (checks []frame.CheckResult, ok bool) {
	_ = s.wire.conn.SetDeadline(time.Now().Add(checkTimeout))
	defer func() { _ = s.wire.conn.SetDeadline(time.Time{}) }()
	checks = append(checks,
		frame.CheckResult{Name: "reachable", Result: resultOK, Message: "PostgreSQL answers at " + s.network},
		frame.CheckResult{Name: "credentials", Result: resultOK, Message: "the role " + clean(s.user) + " is let in"},
		s.checkVersion(),
		s.checkTLS(),
	)
	for _, question := range []func() (frame.CheckResult, error){s.checkRole, s.checkReadOnly, s.checkClock} {
		c, err := question()
		if err != nil {
			return append(checks, frame.CheckResult{Name: "questions", Result: resultFailed, Message: "the connection was lost: " + last(err)}), false
		}
		checks = append(checks, c)
	}
	return checks, true
}

func (s *session) checkVersion() frame.CheckResult {
	c := frame.CheckResult{Name: "version", Result: resultOK, Message: "PostgreSQL " + clean(s.version)}
	if s.majorVersion() < oldestVersion {
		c.Result = resultWarning
		c.Remedy = fmt.Sprintf("upgrade: versions before %d get no security fixes", oldestVersion)
	}
	return c
}

func (s *session) checkTLS() frame.CheckResult {
	c := frame.CheckResult{Name: "tls", Result: resultOK}
	switch {
	case s.verified:
		c.Message = "the connection is encrypted and the server's certificate verified"
	case s.local:
		c.Message = "the connection stays on this host"
	case s.tls:
		c.Result, c.Message = resultWarning, "the connection is encrypted, but anybody could pose as the server"
		c.Remedy = "set sslmode=verify-full and sslrootcert in the dsn"
	default:
		c.Result, c.Message = resultWarning, "the connection is not encrypted"
		c.Remedy = "turn on TLS in the server, set sslmode=verify-full and sslrootcert in the dsn"
	}
	return c
}

// roleQuestion asks in one row what the role could do beyond reading. Each
// column but the first is t or f.
const roleQuestion = `SELECT r.rolname, r.rolsuper, r.rolbypassrls, r.rolcreaterole, r.rolcreatedb, r.rolreplication,
 EXISTS (SELECT 1 FROM pg_catalog.pg_roles p WHERE p.rolname = 'pg_read_server_files' AND pg_catalog.pg_has_role(p.oid, 'MEMBER')),
 EXISTS (SELECT 1 FROM pg_catalog.pg_roles p WHERE p.rolname = 'pg_write_server_files' AND pg_catalog.pg_has_role(p.oid, 'MEMBER')),
 EXISTS (SELECT 1 FROM pg_catalog.pg_roles p WHERE p.rolname = 'pg_execute_server_program' AND pg_catalog.pg_has_role(p.oid, 'MEMBER')),
 EXISTS (SELECT 1 FROM pg_catalog.pg_roles p WHERE p.rolname IN ('pg_signal_backend', 'pg_write_all_data') AND pg_catalog.pg_has_role(p.oid, 'MEMBER')),
 EXISTS (SELECT 1 FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
  WHERE c.relkind IN ('r', 'p', 'f', 'v') AND n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname !~ '^pg_(toast|temp)'
  AND pg_catalog.has_schema_privilege(n.oid, 'USAGE')
  AND pg_catalog.has_table_privilege(c.oid, 'INSERT, UPDATE, DELETE, TRUNCATE')),
 EXISTS (SELECT 1 FROM pg_catalog.pg_namespace n WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' AND pg_catalog.has_schema_privilege(n.oid, 'CREATE')),
 EXISTS (SELECT 1 FROM pg_catalog.pg_language l WHERE NOT l.lanpltrusted AND l.lanname NOT IN ('internal', 'c') AND pg_catalog.has_language_privilege(l.oid, 'USAGE'))
 FROM pg_catalog.pg_roles r WHERE r.rolname = current_user`

// powers are what the columns of roleQuestion stand for.
var powers = []string{
	"is a superuser", "bypasses row security", "can create roles", "can create databases", "can replicate",
	"can read the server's files", "can write the server's files", "can run programs on the server",
	"can end other sessions or write all tables", "can write tables", "can create objects", "can use untrusted languages",
}

func (s *session) checkRole() (frame.CheckResult, error) {
	c := frame.CheckResult{Name: "role", Result: resultOK, Message: "the role " + clean(s.user) + " can read only"}
	rows, refusal, err := s.wire.simple("SET search_path = pg_catalog; " + roleQuestion)
	if err != nil {
		return c, err
	}
	if refusal != nil || len(rows) != 1 || len(rows[0]) != len(powers)+1 {
		c.Result, c.Message = resultWarning, "what the role may do could not be found out"
		if refusal != nil {
			c.Message += ": " + clean(refusal.Message)
		}
		c.Remedy = "grant the role SELECT on pg_catalog"
		return c, nil
	}
	var has []string
	for i, power := range powers {
		if rows[0][i+1] == "t" {
			has = append(has, power)
		}
	}
	if len(has) > 0 {
		c.Result = resultWarning
		c.Message = fmt.Sprintf("the role %s can do more than read: it %s", clean(rows[0][0]), strings.Join(has, ", "))
		c.Remedy = "use a role of its own with CONNECT, USAGE and SELECT on what may be seen, and nothing else"
	}
	return c, nil
}

func (s *session) checkReadOnly() (frame.CheckResult, error) {
	c := frame.CheckResult{Name: "read-only", Result: resultOK, Message: "the server holds a transaction read-only"}
	rows, refusal, err := s.wire.simple("BEGIN READ ONLY; SELECT pg_catalog.current_setting('transaction_read_only'); ROLLBACK")
	if err != nil {
		return c, err
	}
	if refusal != nil || len(rows) != 1 || rows[0][0] != "on" {
		c.Result, c.Message = resultFailed, "the server does not hold a transaction read-only"
		if refusal != nil {
			c.Message += ": " + clean(refusal.Message)
		}
		c.Remedy = "is this PostgreSQL itself? connection poolers and look-alikes are not supported"
	}
	return c, nil
}

func (s *session) checkClock() (frame.CheckResult, error) {
	c := frame.CheckResult{Name: "clock", Result: resultOK, Message: "the server's clock agrees with this host's"}
	before := time.Now()
	rows, refusal, err := s.wire.simple("SELECT pg_catalog.date_part('epoch', pg_catalog.clock_timestamp())")
	if err != nil {
		return c, err
	}
	if refusal != nil || len(rows) != 1 {
		c.Result, c.Message = resultWarning, "the server's clock could not be read"
		return c, nil
	}
	seconds, err := strconv.ParseFloat(rows[0][0], 64)
	if err != nil {
		c.Result, c.Message = resultWarning, "the server's clock could not be read"
		return c, nil
	}
	middle := before.Add(time.Since(before) / 2)
	difference := time.Duration(math.Round(seconds*1e3-float64(middle.UnixMilli()))) * time.Millisecond
	if difference.Abs() > maxClockDifference {
		c.Result = resultWarning
		c.Message = fmt.Sprintf("the server's clock is %s off this host's", difference)
		c.Remedy = "run a time service (chrony, systemd-timesyncd) on both"
	}
	return c, nil
}
