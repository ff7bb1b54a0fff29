package child

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
)

// check is engine's.
func (s *mysqlSession) check() (checks []frame.CheckResult, ok bool) {
	ctx, done := context.WithTimeout(context.Background(), checkTimeout)
	defer done()
	checks = append(checks,
		frame.CheckResult{Name: "reachable", Result: resultOK, Message: s.product() + " answers at " + s.dsn.where()},
		frame.CheckResult{Name: "credentials", Result: resultOK, Message: "the account " + clean(s.account) + " is let in"},
		s.checkVersion(),
		s.checkTLS(),
	)
	for _, question := range []func(context.Context) (frame.CheckResult, error){s.checkGrants, s.checkReadOnly, s.checkClock} {
		c, err := question(ctx)
		if err != nil {
			return append(checks, frame.CheckResult{Name: "questions", Result: resultFailed, Message: "the connection was lost: " + last(err)}), false
		}
		checks = append(checks, c)
	}
	return checks, true
}

// The oldest versions that still get fixes.
var oldestMariaDB, oldestMySQL = [2]int{10, 6}, [2]int{8, 0}

func (s *mysqlSession) checkVersion() frame.CheckResult {
	c := frame.CheckResult{Name: "version", Result: resultOK, Message: s.product() + " " + clean(s.version)}
	oldest := oldestMySQL
	if s.mariadb {
		oldest = oldestMariaDB
	}
	// MariaDB may put 5.5.5- in front, for clients of old.
	parts := strings.SplitN(strings.TrimPrefix(s.version, "5.5.5-"), ".", 3)
	var version [2]int
	for i := range min(2, len(parts)) {
		version[i], _ = strconv.Atoi(parts[i])
	}
	if slices.Compare(version[:], oldest[:]) < 0 {
		c.Result = resultWarning
		c.Remedy = fmt.Sprintf("upgrade: versions before %d.%d get no security fixes", oldest[0], oldest[1])
	}
	return c
}

func (s *mysqlSession) checkTLS() frame.CheckResult {
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

// readingPrivileges let an account do nothing but read.
var readingPrivileges = map[string]bool{"SELECT": true, "USAGE": true, "SHOW VIEW": true, "SHOW DATABASES": true, "SHOW CREATE ROUTINE": true}

// checkGrants warns of what the account could do beyond reading.
func (s *mysqlSession) checkGrants(ctx context.Context) (frame.CheckResult, error) {
	c := frame.CheckResult{Name: "role", Result: resultOK, Message: "the account " + clean(s.account) + " can read only"}
	rows, err := s.ask(ctx, "SHOW GRANTS")
	if err != nil {
		if isBroken(err) {
			return c, err
		}
		c.Result, c.Message = resultWarning, "what the account may do could not be found out: "+clean(err.Error())
		return c, nil
	}
	more := map[string]bool{}
	roles := 0
	for _, row := range rows {
		if len(row) == 0 {
			continue
		}
		grant, ok := strings.CutPrefix(row[0], "GRANT ")
		if !ok {
			continue // SET DEFAULT ROLE ...
		}
		if strings.HasSuffix(grant, "WITH GRANT OPTION") {
			more["GRANT OPTION"] = true
		}
		list, _, isPrivileges := strings.Cut(grant, " ON ")
		if !isPrivileges {
			roles++
			continue
		}
		for _, p := range splitPrivileges(list) {
			if !readingPrivileges[p] {
				more[p] = true
			}
		}
	}
	var has []string
	for p := range more {
		has = append(has, p)
	}
	slices.Sort(has)
	if len(has) > 12 {
		has = append(has[:12], fmt.Sprintf("and %d more", len(has)-12))
	}
	switch {
	case len(has) > 0:
		c.Result = resultWarning
		c.Message = fmt.Sprintf("the account %s can do more than read: it has %s", clean(s.account), clean(strings.Join(has, ", ")))
		c.Remedy = "use an account of its own with SELECT and SHOW VIEW on what may be seen, and nothing else"
	case roles > 0:
		c.Message += fmt.Sprintf(", as far as its %d roles are not looked at", roles)
	}
	return c, nil
}

// splitPrivileges cuts SELECT (a, b), INSERT into SELECT and INSERT.
func splitPrivileges(list string) []string {
	var out []string
	depth, start := 0, 0
	add := func(p string) {
		p, _, _ = strings.Cut(p, "(")
		out = append(out, strings.TrimSpace(p))
	}
	for i, c := range list {
		switch c {
		case '(':
			depth++
		case ')':
			depth--
		case ',':
			if depth == 0 {
				add(list[start:i])
				start = i + 1
			}
		}
	}
	add(list[start:])
	return out
}

func (s *mysqlSession) checkReadOnly(ctx context.Context) (frame.CheckResult, error) {
	c := frame.CheckResult{Name: "read-only", Result: resultOK, Message: "the server holds a transaction read-only"}
	failed := func(err error) (frame.CheckResult, error) {
		if isBroken(err) {
			return c, err
		}
		c.Result, c.Message = resultFailed, "the server does not hold a transaction read-only: "+clean(err.Error())
		c.Remedy = "is this MySQL or MariaDB itself? proxies and look-alikes are not supported"
		return c, nil
	}
	if err := s.tell(ctx, "START TRANSACTION READ ONLY"); err != nil {
		return failed(err)
	}
	// The server must refuse this before it looks for the table, which there is not: a
	// server that does not refuse it does nothing.
	err := s.tell(ctx, "DROP TABLE IF EXISTS `postern_check_"+rand.Text()+"`")
	_ = s.tell(ctx, "ROLLBACK")
	switch {
	case err == nil:
		return failed(errors.New("it would have dropped a table"))
	case isBroken(err):
		return c, err
	case !isRefusal(err, mysqlReadOnly):
		c.Result, c.Message = resultWarning, "whether the server holds a transaction read-only could not be found out: "+clean(err.Error())
	}
	return c, nil
}

func (s *mysqlSession) checkClock(ctx context.Context) (frame.CheckResult, error) {
	c := frame.CheckResult{Name: "clock", Result: resultOK, Message: "the server's clock agrees with this host's"}
	before := time.Now()
	rows, err := s.ask(ctx, "SELECT UNIX_TIMESTAMP(SYSDATE(6))")
	if err != nil && isBroken(err) {
		return c, err
	}
	seconds := math.NaN()
	if err == nil && len(rows) == 1 {
		seconds, err = strconv.ParseFloat(rows[0][0], 64)
	}
	if err != nil || math.IsNaN(seconds) {
		c.Result, c.Message = resultWarning, "the server's clock could not be read"
		return c, nil
	}
	middle := before.Add(time.Since(before) / 2)
	difference := time.Duration(math.Round(seconds*1e3-float64(middle.UnixMilli()))) * time.Millisecond
	if difference.Abs() > maxClockDifference {
		c.Result, c.Message = resultWarning, fmt.Sprintf("the server's clock is %s off this host's", difference)
		c.Remedy = "run a time service (chrony, systemd-timesyncd) on both"
	}
	return c, nil
}
