package child

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/go-sql-driver/mysql"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/sqltext"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Errors of the server that mean something to us.
const (
	mysqlTooMany        = 1040
	mysqlNoSchemaAccess = 1044
	mysqlDenied         = 1045
	mysqlNoDatabase     = 1049
	mysqlSyntax         = 1064
	mysqlNoSuchThread   = 1094
	mysqlUserLimit      = 1203
	mysqlUserResources  = 1226
	mysqlNotPrepared    = 1295
	mysqlInterrupted    = 1317
	mysqlAccountLocked  = 3118
	mysqlReadOnly       = 1792
	mysqlDeniedNoPlugin = 1698
	mysqlTooSlow        = 3024 // max_execution_time, MySQL
	mariadbTooSlow      = 1969 // max_statement_time, MariaDB
	mysqlKilled         = 1927
	mysqlMustChange     = 1820
)

// mysqlConnectError says why there is no connection. The driver puts no password
// into its errors.
func mysqlConnectError(err error, where string) *proto.Error {
	var (
		refusal *mysql.MySQLError
		dns     *net.DNSError
		op      *net.OpError
		unknown x509.UnknownAuthorityError
		name    x509.HostnameError
		invalid x509.CertificateInvalidError
		record  tls.RecordHeaderError
		verify  *tls.CertificateVerificationError
	)
	switch {
	case errors.As(err, &refusal):
		code := proto.CodeSourceUnreachable
		switch refusal.Number {
		case mysqlDenied, mysqlDeniedNoPlugin, mysqlAccountLocked, mysqlMustChange:
			code = proto.CodeSourceCredentials
		case mysqlNoDatabase, mysqlNoSchemaAccess:
			code = proto.CodeSourceConfig
		case mysqlTooMany, mysqlUserLimit, mysqlUserResources:
			code = proto.CodeOverloaded
		}
		return &proto.Error{
			Code: code, Err: err,
			Message: fmt.Sprintf("MySQL at %s refused the connection: %s (error %d)", where, clean(refusal.Message), refusal.Number),
		}
	case errors.As(err, &verify), errors.As(err, &unknown), errors.As(err, &name), errors.As(err, &invalid):
		return proto.Errorf(proto.CodeSourceConfig, "TLS with MySQL at %s: %s: check sslmode and sslrootcert", where, last(err))
	case errors.As(err, &record), errors.Is(err, mysql.ErrNoTLS):
		return proto.Errorf(proto.CodeSourceConfig, "MySQL at %s does not speak TLS: check sslmode", where)
	case errors.Is(err, mysql.ErrCleartextPassword), errors.Is(err, mysql.ErrOldPassword), errors.Is(err, mysql.ErrUnknownPlugin):
		return proto.Errorf(proto.CodeSourceCredentials, "MySQL at %s asks for a way to log in that is not supported: use mysql_native_password, caching_sha2_password, sha256_password or ed25519", where)
	case errors.As(err, &dns):
		return proto.Errorf(proto.CodeSourceUnreachable, "MySQL at %s: cannot resolve %s: %s", where, dns.Name, dns.Err)
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &op) && op.Timeout():
		return proto.Errorf(proto.CodeSourceUnreachable, "MySQL at %s did not answer in time", where)
	case errors.As(err, &op) && op.Op == "dial":
		return proto.Errorf(proto.CodeSourceUnreachable, "cannot reach MySQL at %s: %s", where, last(op.Err))
	}
	return proto.Errorf(proto.CodeSourceConfig, "what answers at %s is no MySQL or MariaDB server that we understand: %s", where, last(err))
}

// mysqlNear finds what the server quotes of a text that it does not understand.
var mysqlNear = regexp.MustCompile(`(?s) near '(.*)' at line (\d+)$`)

// mysqlPosition is where, in characters from 1, a text has the error that a message
// is of; 0 if that can't be told.
func mysqlPosition(message, text string) int {
	match := mysqlNear.FindStringSubmatch(message)
	if match == nil {
		return 0
	}
	quoted := match[1]
	if quoted == "" {
		return utf8.RuneCountInString(strings.TrimRight(text, " \t\r\n;")) + 1
	}
	// The quoted piece is what is left of the text, up to 80 bytes of it.
	line, _ := strconv.Atoi(match[2])
	start := 0
	for n := 1; n < line; n++ {
		next := strings.IndexByte(text[start:], '\n')
		if next < 0 {
			return 0
		}
		start += next + 1
	}
	if len(quoted) < 78 {
		if at := strings.LastIndex(text, quoted); at >= start && strings.TrimRight(text[at:], " \t\r\n;") == strings.TrimRight(quoted, " \t\r\n;") {
			return utf8.RuneCountInString(text[:at]) + 1
		}
		return 0
	}
	at := strings.Index(text[start:], quoted)
	if at < 0 || strings.Contains(text[start+at+1:], quoted) {
		return 0
	}
	return utf8.RuneCountInString(text[:start+at]) + 1
}

// mysqlSQLError turns the server's refusal of the statement into ours.
func mysqlSQLError(e *mysql.MySQLError, text *sqltext.Statement) *proto.Error {
	position := 0
	if text != nil && e.Number == mysqlSyntax {
		position = text.Position(mysqlPosition(e.Message, text.Text))
	}
	state := clean(strings.Trim(string(e.SQLState[:]), "\x00"))
	full := fmt.Sprintf("the database refused the statement: %s (error %d, SQLSTATE %s", clean(e.Message), e.Number, state)
	if position > 0 {
		full += fmt.Sprintf(", position %d", position)
	}
	return &proto.Error{Code: proto.CodeSQL, Message: full + ")", SQL: &posternv1.SQLErrorDetail{Sqlstate: state, Position: int32(position)}}
}

// failure turns what the driver said into our words.
func (s *mysqlSession) failure(err error, r *frame.RunRequest, st *statement, text *sqltext.Statement) *proto.Error {
	var refusal *mysql.MySQLError
	if errors.As(err, &refusal) {
		switch reason := st.stopReason(); {
		case refusal.Number == mysqlInterrupted && reason != 0:
			return stopError(reason, r)
		case refusal.Number == mysqlTooSlow, refusal.Number == mariadbTooSlow:
			return timeoutError(r)
		case refusal.Number == mysqlReadOnly && !r.ReadWrite:
			return denied(0, "the statement is refused: the data source is read-only: %s", clean(refusal.Message))
		case refusal.Number == mysqlKilled:
			return s.broken(err)
		}
		return mysqlSQLError(refusal, text)
	}
	return s.broken(err)
}

// broken is for a connection that ended under a statement.
func (s *mysqlSession) broken(err error) *proto.Error {
	s.spent = true
	what := "the server closed the connection"
	var op *net.OpError
	if errors.As(err, &op) {
		what = last(err)
	}
	return proto.Errorf(proto.CodeSourceUnreachable, "the connection to %s was lost: %s", s.name(), what)
}

// isRefusal tells whether an error is the server's of that number.
func isRefusal(err error, number uint16) bool {
	var refusal *mysql.MySQLError
	return errors.As(err, &refusal) && refusal.Number == number
}
