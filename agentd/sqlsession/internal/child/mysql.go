package child

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/go-sql-driver/mysql"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
	"github.com/postern-dev/postern/proto"
)

// MySQLDSN is where a MySQL or MariaDB server is, as a data source's dsn says.
type MySQLDSN struct {
	// Host is a name or address, or the absolute path of a unix socket.
	Host   string
	Port   uint16
	DBName string // may be empty
	User   string
	// SSLMode is disable, prefer, require, verify-ca or verify-full.
	SSLMode string
	// SSLRootCert is a PEM file; empty: the system's certificates.
	SSLRootCert string
}

// defaultMySQLPort is the port of a dsn that names none.
const defaultMySQLPort = 3306

// ParseMySQLDSN reads KEY=VALUE pairs: host, port, dbname, user, sslmode and
// sslrootcert. The error is one line and never holds a password.
func ParseMySQLDSN(dsn string) (MySQLDSN, error) {
	pairs, err := parsePairs(dsn, "host", "port", "dbname", "user", "sslmode", "sslrootcert")
	if err != nil {
		return MySQLDSN{}, err
	}
	d := MySQLDSN{
		Host: pairs["host"], Port: defaultMySQLPort, DBName: pairs["dbname"], User: pairs["user"],
		SSLMode: pairs["sslmode"], SSLRootCert: pairs["sslrootcert"],
	}
	if d.Host == "" {
		return MySQLDSN{}, errors.New("the dsn names no host: add host=, a name, an address or the path of a socket")
	}
	if d.User == "" {
		return MySQLDSN{}, errors.New("the dsn names no user: add user=")
	}
	if text, there := pairs["port"]; there {
		port, err := strconv.ParseUint(text, 10, 16)
		if err != nil || port == 0 {
			return MySQLDSN{}, errors.New("port in the dsn is not between 1 and 65535")
		}
		d.Port = uint16(port)
	}
	switch d.SSLMode {
	case "":
		d.SSLMode = "prefer"
		if d.SSLRootCert != "" {
			d.SSLMode = "verify-full"
		}
	case "disable", "prefer", "require", "verify-ca", "verify-full":
	default:
		return MySQLDSN{}, errors.New("sslmode in the dsn is none of disable, prefer, require, verify-ca, verify-full")
	}
	if d.SSLRootCert != "" && !strings.HasPrefix(d.SSLRootCert, "/") {
		return MySQLDSN{}, errors.New("sslrootcert in the dsn is no absolute path")
	}
	if d.SSLRootCert != "" && !strings.HasPrefix(d.SSLMode, "verify") {
		return MySQLDSN{}, fmt.Errorf("sslrootcert has no effect with sslmode=%s: use sslmode=verify-full", d.SSLMode)
	}
	return d, nil
}

// parsePairs reads KEY=VALUE pairs as libpq does: white space between them, values
// with white space in single quotes, \' and \\ in them.
func parsePairs(text string, keys ...string) (map[string]string, error) {
	const garbled = "the dsn is garbled: write it as KEY=VALUE pairs, with values in single quotes where they have spaces"
	pairs := map[string]string{}
	for rest := strings.TrimSpace(text); rest != ""; rest = strings.TrimSpace(rest) {
		key, after, ok := strings.Cut(rest, "=")
		if !ok {
			return nil, errors.New(garbled)
		}
		key = strings.TrimSpace(key)
		known := false
		for _, k := range keys {
			known = known || k == key
		}
		switch {
		case strings.Contains(strings.ToLower(key), "password"):
			return nil, errors.New("a password in the dsn is not allowed: use password: {file: ...}")
		case !known && (strings.ContainsAny(key, " '\"\\:/@\n") || len(key) > 40):
			return nil, errors.New(garbled) // a piece of something else, perhaps a password
		case !known:
			return nil, fmt.Errorf("%q is not supported in the dsn (supported: %s)", key, strings.Join(keys, ", "))
		}
		if _, twice := pairs[key]; twice {
			return nil, fmt.Errorf("%s is in the dsn twice", key)
		}
		var value strings.Builder
		after = strings.TrimLeft(after, " \t\n")
		quoted := strings.HasPrefix(after, "'")
		i := 0
		if quoted {
			i = 1
		}
		closed := !quoted
		for ; i < len(after); i++ {
			c := after[i]
			if c == '\\' && i+1 < len(after) {
				i++
				value.WriteByte(after[i])
				continue
			}
			if quoted && c == '\'' {
				closed = true
				i++
				break
			}
			if !quoted && (c == ' ' || c == '\t' || c == '\n') {
				break
			}
			value.WriteByte(c)
		}
		if !closed || quoted && i < len(after) && !strings.ContainsRune(" \t\n", rune(after[i])) {
			return nil, errors.New(garbled)
		}
		pairs[key] = value.String()
		rest = after[i:]
	}
	return pairs, nil
}

func (d MySQLDSN) where() string {
	if strings.HasPrefix(d.Host, "/") {
		return d.Host
	}
	return net.JoinHostPort(d.Host, strconv.Itoa(int(d.Port)))
}

// mysqlSession is the process's one connection to MySQL or MariaDB.
type mysqlSession struct {
	config   *mysql.Config
	dsn      MySQLDSN
	sink     *sink
	conn     driver.Conn
	socket   net.Conn // under conn, and under TLS
	id       uint64   // of the connection, for KILL QUERY
	version  string
	account  string
	mariadb  bool
	tls      bool
	verified bool
	local    bool
	// timeout is what the server was last told, in milliseconds.
	timeout int64
	// spent says that a statement may have left something in the connection that
	// only a new one is free of.
	spent bool
	// objects are the views and functions that were there a moment ago; nil: unknown.
	objects *mysqlObjects
	// masking is that of the last statement.
	masking *masking
	// database is the one that names without a database are in; "" is none.
	database string
	// stay is set in a session that stays open.
	stay *mysqlStay
}

// quiet keeps the driver from writing to standard error; what it would say comes
// as an error, too.
type quiet struct{}

func (quiet) Print(...any) {}

func connectMySQL(ctx context.Context, r *frame.ConnectRequest, out *sink, _ pgtree.Parser) (engine, *proto.Error) {
	d, err := ParseMySQLDSN(r.DSN)
	if err != nil {
		return nil, proto.Errorf(proto.CodeSourceConfig, "%w", err)
	}
	if r.User != "" {
		d.User = r.User
	}
	s := &mysqlSession{dsn: d, sink: out}
	c := mysql.NewConfig()
	c.User, c.Passwd, c.DBName = d.User, r.Password, d.DBName
	c.Net, c.Addr = "tcp", d.where()
	if strings.HasPrefix(d.Host, "/") {
		c.Net = "unix"
	}
	c.Collation = "utf8mb4_general_ci"
	c.InterpolateParams = true // for our own questions: statements are prepared
	c.CheckConnLiveness = false
	c.Logger = quiet{}
	c.ConnectionAttributes = "program_name:" + strings.NewReplacer(",", " ", ":", " ").Replace(r.ApplicationName)
	c.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
		if err == nil {
			s.socket = conn
		}
		return conn, err
	}
	if c.Net == "tcp" && d.SSLMode != "disable" {
		if err := d.setTLS(c); err != nil {
			return nil, proto.Errorf(proto.CodeSourceConfig, "TLS with MySQL at %s: %w", d.where(), err)
		}
	}
	s.config = c
	if failure := s.connect(ctx); failure != nil {
		return nil, failure
	}
	return s, nil
}

func (d MySQLDSN) setTLS(c *mysql.Config) error {
	t := &tls.Config{ServerName: d.Host, MinVersion: tls.VersionTLS12, InsecureSkipVerify: true}
	c.TLS = t
	switch d.SSLMode {
	case "prefer":
		c.AllowFallbackToPlaintext = true
		return nil
	case "require":
		return nil
	}
	if d.SSLRootCert != "" {
		pem, err := os.ReadFile(d.SSLRootCert)
		if err != nil {
			return fmt.Errorf("sslrootcert: %s", last(err))
		}
		t.RootCAs = x509.NewCertPool()
		if !t.RootCAs.AppendCertsFromPEM(pem) {
			return errors.New("sslrootcert holds no certificate")
		}
	}
	if d.SSLMode == "verify-full" {
		t.InsecureSkipVerify = false
		return nil
	}
	// verify-ca: the chain, whatever the name.
	t.VerifyConnection = func(state tls.ConnectionState) error {
		options := x509.VerifyOptions{Roots: t.RootCAs, Intermediates: x509.NewCertPool()}
		for _, c := range state.PeerCertificates[1:] {
			options.Intermediates.AddCert(c)
		}
		_, err := state.PeerCertificates[0].Verify(options)
		return err
	}
	return nil
}

// connect opens the connection and sets up what statements rely on.
func (s *mysqlSession) connect(ctx context.Context) *proto.Error {
	connector, err := mysql.NewConnector(s.config)
	if err != nil {
		return proto.Errorf(proto.CodeSourceConfig, "the dsn is garbled: %s", clean(err.Error()))
	}
	conn, err := connector.Connect(ctx)
	if err != nil {
		return mysqlConnectError(err, s.dsn.where())
	}
	s.conn, s.timeout, s.spent, s.database = conn, -1, false, s.dsn.DBName
	if err := s.setUp(ctx); err != nil {
		_ = conn.Close()
		return mysqlConnectError(err, s.dsn.where())
	}
	return nil
}

// droppedModes are what would change how a text is cut into tokens.
var droppedModes = map[string]bool{"ANSI": true, "ANSI_QUOTES": true, "NO_BACKSLASH_ESCAPES": true, "ORACLE": true, "DB2": true, "MAXDB": true, "MSSQL": true, "POSTGRESQL": true}

func (s *mysqlSession) setUp(ctx context.Context) error {
	rows, err := s.ask(ctx, "SELECT CONNECTION_ID(), VERSION(), @@sql_mode, CURRENT_USER(), @@version_comment")
	if err != nil {
		return err
	}
	if len(rows) != 1 || len(rows[0]) != 5 {
		return errors.New("its first answer is none")
	}
	if s.id, err = strconv.ParseUint(rows[0][0], 10, 64); err != nil {
		return errors.New("its connection has no number")
	}
	s.version, s.account = rows[0][1], rows[0][3]
	s.mariadb = strings.Contains(strings.ToLower(rows[0][1]+rows[0][4]), "mariadb")
	var modes []string
	for _, mode := range strings.Split(rows[0][2], ",") {
		if mode != "" && !droppedModes[strings.ToUpper(mode)] {
			modes = append(modes, mode)
		}
	}
	// The time zone makes TIMESTAMP a moment. READ ONLY is what a transaction is
	// that nobody says more of.
	set := fmt.Sprintf("SET SESSION sql_mode = '%s', time_zone = '+00:00', lock_wait_timeout = %d, innodb_lock_wait_timeout = %d",
		strings.Join(modes, ","), maxLockTimeout/time.Second, maxLockTimeout/time.Second)
	for _, statement := range []string{set, "SET SESSION TRANSACTION READ ONLY"} {
		if err := s.tell(ctx, statement); err != nil {
			return err
		}
	}
	s.local = isLocal(s.socket.RemoteAddr())
	s.tls, s.verified = false, false
	if s.config.TLS != nil {
		cipher, err := s.ask(ctx, "SHOW SESSION STATUS LIKE 'Ssl_cipher'")
		if err != nil {
			return err
		}
		s.tls = len(cipher) == 1 && cipher[0][1] != ""
		s.verified = s.tls && strings.HasPrefix(s.dsn.SSLMode, "verify")
	}
	return nil
}

// tell runs a statement of ours by the text protocol.
func (s *mysqlSession) tell(ctx context.Context, statement string, args ...string) error {
	_, err := s.conn.(driver.ExecerContext).ExecContext(ctx, statement, named(args))
	return err
}

// ask runs a question of ours and returns its rows as text; NULL is "". The answer
// must be small.
func (s *mysqlSession) ask(ctx context.Context, question string, args ...string) ([][]string, error) {
	var all [][]string
	err := s.each(ctx, question, args, func(row []string) error {
		all = append(all, row)
		return nil
	})
	return all, err
}

// each is ask for answers of any length.
func (s *mysqlSession) each(ctx context.Context, question string, args []string, take func(row []string) error) error {
	rows, err := s.conn.(driver.QueryerContext).QueryContext(ctx, question, named(args))
	if err != nil {
		return err
	}
	defer func() { _ = rows.Close() }()
	values := make([]driver.Value, len(rows.Columns()))
	for {
		err := rows.Next(values)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		row := make([]string, len(values))
		for i, v := range values {
			switch v := v.(type) {
			case nil:
			case []byte:
				row[i] = string(v)
			default:
				row[i] = fmt.Sprint(v)
			}
		}
		if err := take(row); err != nil {
			return err
		}
	}
}

func named(args []string) []driver.NamedValue {
	values := make([]driver.NamedValue, len(args))
	for i, a := range args {
		values[i] = driver.NamedValue{Ordinal: i + 1, Value: a}
	}
	return values
}

// product is what the server calls itself.
func (s *mysqlSession) product() string {
	if s.mariadb {
		return "MariaDB"
	}
	return "MySQL"
}

// about is engine's.
func (s *mysqlSession) about() frame.ConnectedReply {
	return frame.ConnectedReply{Version: s.version, TLS: s.tls}
}

func (s *mysqlSession) name() string { return s.product() + " at " + s.dsn.where() }

func (s *mysqlSession) close() { _ = s.conn.Close() }

// cancel is engine's: KILL QUERY on a connection of its own.
func (s *mysqlSession) cancel(ctx context.Context) error {
	other := *s.config
	other.DBName, other.DialFunc = "", nil
	connector, err := mysql.NewConnector(&other)
	if err != nil {
		return err
	}
	conn, err := connector.Connect(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	_, err = conn.(driver.ExecerContext).ExecContext(ctx, "KILL QUERY "+strconv.FormatUint(s.id, 10), nil)
	var refusal *mysql.MySQLError
	if errors.As(err, &refusal) && refusal.Number == mysqlNoSuchThread {
		return nil // it is gone, with what it did
	}
	return err
}

// watch is engine's.
func (s *mysqlSession) watch(stop <-chan struct{}) error {
	raw, err := s.socket.(syscall.Conn).SyscallConn()
	if err != nil {
		return err
	}
	done := make(chan struct{})
	over := make(chan struct{})
	go func() {
		defer close(over)
		select {
		case <-stop:
			_ = s.socket.SetReadDeadline(time.Now().Add(-time.Second))
		case <-done:
		}
	}()
	// An idle server says nothing but goodbye.
	said := 0
	var failed error
	err = raw.Read(func(fd uintptr) bool {
		var b [1]byte
		n, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		if err == syscall.EAGAIN || err == syscall.EINTR {
			return false
		}
		said, failed = n, err
		return true
	})
	close(done)
	<-over
	_ = s.socket.SetReadDeadline(time.Time{})
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	if err == nil {
		err = failed
	}
	if err == nil && said > 0 {
		err = errors.New("the server ended the connection")
	}
	if err == nil {
		err = io.EOF
	}
	return err
}

// reset is engine's. What a read-only statement can leave behind is nothing but a
// transaction; after any other, and where the policy lets functions be called that
// are not the server's own, a new connection takes the place of the old one.
func (s *mysqlSession) reset() error {
	ctx, done := context.WithTimeout(context.Background(), resetTimeout)
	defer done()
	if s.stay != nil {
		return s.settled(ctx)
	}
	if s.spent {
		_ = s.conn.Close()
		if failure := s.connect(ctx); failure != nil {
			return failure
		}
		return nil
	}
	for attempt := 0; ; attempt++ {
		err := s.tell(ctx, "ROLLBACK")
		var refusal *mysql.MySQLError
		if err == nil || attempt == 2 || !errors.As(err, &refusal) {
			return err
		}
		// A late cancel may have hit it.
	}
}
