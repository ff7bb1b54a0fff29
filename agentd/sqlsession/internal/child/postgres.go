package child

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
	"github.com/postern-dev/postern/proto"
)

// dsnKeys are the connection parameters that a data source may have. What
// reads files or services of somebody's home, starts replication or sets
// server options is left out.
var dsnKeys = []string{
	"host", "port", "dbname", "user", "sslmode", "sslrootcert", "sslnegotiation", "sslsni", "channel_binding", "require_auth",
	"target_session_attrs", "connect_timeout", "application_name", "search_path", "timezone",
}

// ParseDSN checks a data source's connection string. The error is one line
// and never holds a password, even where the DSN has one.
func ParseDSN(dsn string) (*pgconn.Config, error) {
	config, err := pgconn.ParseConfigWithOptions(dsn, pgconn.ParseConfigOptions{ConnStringAllowedKeys: dsnKeys})
	if err == nil {
		// Without a user pgconn takes the environment's or the process's own,
		// which is neither's business.
		others := slices.DeleteFunc(slices.Clone(dsnKeys), func(key string) bool { return key == "user" })
		if _, err := pgconn.ParseConfigWithOptions(dsn, pgconn.ParseConfigOptions{ConnStringAllowedKeys: others}); err == nil || config.User == "" {
			return nil, errors.New("the dsn names no user: add user=")
		}
		return config, nil
	}
	message := err.Error()
	const mark = `connection string key "`
	if i := strings.Index(message, mark); i >= 0 {
		key, _, _ := strings.Cut(message[i+len(mark):], `"`)
		if key == "password" {
			return nil, errors.New("a password in the dsn is not allowed: use password: {file: ...}")
		}
		return nil, fmt.Errorf("%q is not supported in the dsn (supported: %s)", key, strings.Join(dsnKeys, ", "))
	}
	// The rest of pgconn's text quotes the DSN.
	if i := strings.LastIndex(message, "`: "); i >= 0 {
		return nil, fmt.Errorf("the dsn is garbled: %s", clean(message[i+3:]))
	}
	return nil, errors.New("the dsn is garbled: write it as host=... dbname=... user=..., or as a postgres:// URL")
}

// session is the process's one connection to the database.
type session struct {
	parser  pgtree.Parser
	masking *masking // of the statement before
	judged  judged
	// primed tells that the questions to the catalog are prepared under their names, and
	// that nobody else has had the connection since. The first to ask resets it.
	primed   bool
	wire     *wire
	sink     *sink
	canceler *pgconn.PgConn
	user     string
	network  string
	tls      bool
	verified bool
	local    bool
	version  string
	// stay is set once the session is one that stays: nothing is reset between its
	// statements.
	stay    *interactive
	domains domains
	// forget is what reset runs besides, once: what DISCARD ALL leaves.
	forget    string
	checkPeer string // SET LOCAL client_connection_check_interval where the server has it
}

// connect opens the connection. The error's message fits after the name of the
// data source.
func connect(ctx context.Context, r *frame.ConnectRequest, out *sink) (*session, *proto.Error) {
	config, err := ParseDSN(r.DSN)
	if err != nil {
		return nil, proto.Errorf(proto.CodeSourceConfig, "%w", err)
	}
	config.Password = r.Password
	if r.User != "" {
		config.User = r.User
	}
	params := config.RuntimeParams
	if params["application_name"] == "" {
		params["application_name"] = r.ApplicationName
	}
	// What the text of values and the scanner of statements rely on. These are
	// the session's defaults, which DISCARD ALL returns to.
	params["client_encoding"] = "UTF8"
	params["standard_conforming_strings"] = "on"
	if r.Settings == nil {
		params["DateStyle"] = "ISO"
		params["bytea_output"] = "hex"
	}
	for name, value := range r.Settings {
		for own := range params {
			if strings.EqualFold(own, name) {
				delete(params, own)
			}
		}
		params[name] = value
	}
	where := address(config)
	conn, err := pgconn.ConnectConfig(ctx, config)
	if err != nil {
		return nil, connectError(err, where)
	}
	if err := conn.SyncConn(ctx); err != nil {
		return nil, connectError(err, where)
	}
	hijacked, err := conn.Hijack()
	if err != nil {
		return nil, connectError(err, where)
	}
	canceler, err := pgconn.Construct(hijacked)
	if err != nil {
		return nil, connectError(err, where)
	}
	s := &session{
		wire: newWire(hijacked.Conn, hijacked.ParameterStatuses), sink: out, canceler: canceler, user: config.User, network: where,
		tls: hijacked.TLSConfig != nil, version: hijacked.ParameterStatuses["server_version"],
	}
	s.verified = s.tls && !hijacked.TLSConfig.InsecureSkipVerify
	s.local = isLocal(hijacked.Conn.RemoteAddr())
	if s.majorVersion() >= 14 {
		// A server whose platform can't do it refuses; then it stays off.
		deadline, _ := ctx.Deadline()
		_ = hijacked.Conn.SetDeadline(deadline)
		_, refusal, err := s.wire.simple("SET client_connection_check_interval = '2s'; RESET client_connection_check_interval")
		if err != nil {
			return nil, connectError(err, where)
		}
		if refusal == nil {
			s.checkPeer = "SET LOCAL client_connection_check_interval = '2s';"
			if r.Settings != nil {
				// For the whole session: its statements are the client's own.
				if _, _, err := s.wire.simple("SET client_connection_check_interval = '2s'"); err != nil {
					return nil, connectError(err, where)
				}
			}
		}
		_ = hijacked.Conn.SetDeadline(time.Time{})
	}
	return s, nil
}

func (s *session) majorVersion() int {
	digits := s.version
	for i, c := range digits {
		if c < '0' || c > '9' {
			digits = digits[:i]
			break
		}
	}
	n, _ := strconv.Atoi(digits)
	return n
}

func address(config *pgconn.Config) string {
	addresses := []string{hostPort(config.Host, config.Port)}
	for _, f := range config.Fallbacks {
		a := hostPort(f.Host, f.Port)
		if a != addresses[len(addresses)-1] {
			addresses = append(addresses, a)
		}
	}
	return strings.Join(addresses, ", ")
}

func hostPort(host string, port uint16) string {
	network, address := pgconn.NetworkAddress(host, port)
	if network == "unix" {
		return address
	}
	return net.JoinHostPort(host, strconv.Itoa(int(port)))
}

func isLocal(addr net.Addr) bool {
	switch a := addr.(type) {
	case *net.UnixAddr:
		return true
	case *net.TCPAddr:
		return a.IP.IsLoopback()
	}
	return false
}

// resetTimeout bounds the clean-up between two statements.
const resetTimeout = 10 * time.Second

// reset brings the database session back to what it was after connecting:
// nothing of a statement reaches the next one.
func (s *session) reset() error {
	s.primed = false
	if s.stay != nil {
		return s.settled()
	}
	_ = s.wire.conn.SetDeadline(time.Now().Add(resetTimeout))
	for attempt := 0; s.wire.tx != 'I'; attempt++ {
		if attempt == 3 {
			return fmt.Errorf("the transaction does not end")
		}
		// A late cancel may hit the first ROLLBACK.
		if _, _, err := s.wire.simple("ROLLBACK"); err != nil {
			return err
		}
	}
	if err := s.forgetNow(); err != nil {
		return err
	}
	for attempt := 0; ; attempt++ {
		_, refusal, err := s.wire.simple("DISCARD ALL")
		if err != nil {
			return err
		}
		if refusal == nil {
			break
		}
		if attempt == 2 {
			return fmt.Errorf("DISCARD ALL: %s", clean(refusal.Message))
		}
	}
	if s.wire.tx != 'I' {
		return fmt.Errorf("%w: transaction status %q", errProtocol, s.wire.tx)
	}
	s.wire.notices = s.wire.notices[:0]
	return s.wire.conn.SetDeadline(time.Time{})
}

// forgetNow removes what a statement left outside of its transaction.
func (s *session) forgetNow() error {
	if s.forget == "" {
		return nil
	}
	_, refusal, err := s.wire.simple(s.forget)
	if err != nil {
		return err
	}
	if refusal != nil {
		return fmt.Errorf("%s: %s", s.forget, clean(refusal.Message))
	}
	s.forget = ""
	return nil
}

// about is engine's.
func (s *session) about() frame.ConnectedReply {
	return frame.ConnectedReply{Version: s.version, TLS: s.tls}
}

func (s *session) name() string { return "PostgreSQL at " + s.network }

func (s *session) cancel(ctx context.Context) error { return s.canceler.CancelRequest(ctx) }

func (s *session) close() { _ = s.wire.conn.Close() }

// watch is engine's.
func (s *session) watch(stop <-chan struct{}) error {
	c := s.wire
	for {
		watched := make(chan error, 1)
		go func() {
			c.room(5)
			watched <- c.fill()
		}()
		select {
		case <-stop:
			_ = c.conn.SetReadDeadline(time.Now().Add(-time.Second))
			err := <-watched
			_ = c.conn.SetReadDeadline(time.Time{})
			if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
				return err
			}
			return c.asides()
		case err := <-watched:
			if err == nil {
				err = c.asides()
			}
			if err != nil {
				return err
			}
		}
	}
}

// asides takes the messages of an idle server that are whole in the buffer.
func (c *wire) asides() error {
	for c.w-c.r >= 5 {
		t, size, err := c.header()
		if err != nil {
			return err
		}
		if size > maxMessage {
			return fmt.Errorf("%w: a message of %d bytes while idle", errProtocol, size)
		}
		if c.w-c.r < 5+size {
			c.room(5 + size)
			return nil
		}
		body := c.in[c.r+5 : c.r+5+size]
		c.r += 5 + size
		if t == 'E' {
			e := decodeError(body)
			return fmt.Errorf("%s", clean(e.Message))
		}
		if !c.aside(t, body) {
			return fmt.Errorf("%w: message %q while idle", errProtocol, t)
		}
	}
	c.notices = c.notices[:0]
	return nil
}
