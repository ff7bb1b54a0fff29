package mariadbserver

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"database/sql"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/go-sql-driver/mysql"

	"github.com/postern-dev/postern/e2e/freeport"
)

// Superuser is the name of the account that may do everything.
const Superuser = "root"

// startTimeout bounds the wait for a server that has been started.
const startTimeout = 60 * time.Second

// Options say what kind of server is wanted; the zero value is a plain one.
type Options struct {
	// Settings are appended to the server's arguments as --name=value.
	Settings map[string]string
	// TLS gives the server a self-signed certificate for localhost and 127.0.0.1; its
	// PEM file is Server.CAFile. Plain connections still work.
	TLS bool
	// MySQL is where packaging/dev/mysql.sh put MySQL, to be run instead; empty: MariaDB.
	MySQL string
}

// Server is one running MariaDB.
type Server struct {
	// Password is the superuser's.
	Password string
	// Socket is the path of the unix socket.
	Socket string
	// Port is the TCP port on 127.0.0.1.
	Port int
	// Dir holds everything of this server; removed by Stop.
	Dir string
	// CAFile is the certificate to trust (PEM) when Options.TLS was set.
	CAFile string

	options  Options
	uid, gid int // -1: ourselves

	mu   sync.Mutex
	cmd  *exec.Cmd
	done chan struct{} // closed when cmd was waited for
}

// Launch starts a server. ctx bounds the start alone. The caller calls Stop.
func Launch(ctx context.Context, options Options) (*Server, error) {
	if _, err := options.daemon(); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "postern-my-")
	if err != nil {
		return nil, err
	}
	s := &Server{Dir: dir, Socket: filepath.Join(dir, "s"), Password: rand.Text(), options: options, uid: -1, gid: -1}
	if err := s.setUp(ctx); err != nil {
		_ = s.Kill()
		_ = os.RemoveAll(dir)
		return nil, fmt.Errorf("start MariaDB in %s: %w", dir, err)
	}
	return s, nil
}

// daemon is the path of the server.
func (o Options) daemon() (string, error) {
	if o.MySQL == "" {
		return find("mariadbd")
	}
	path := filepath.Join(o.MySQL, "bin", "mysqld")
	if !isFile(path) {
		return "", fmt.Errorf("no %s: run packaging/dev/mysql.sh %s", path, o.MySQL)
	}
	return path, nil
}

// find is the path of one of MariaDB's programs.
func find(program string) (string, error) {
	for _, dir := range []string{"/usr/sbin", "/usr/bin", "/usr/local/bin"} {
		if path := filepath.Join(dir, program); isFile(path) {
			return path, nil
		}
	}
	return "", fmt.Errorf("no %s on this machine: install the Debian package mariadb-server", program)
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

func (s *Server) setUp(ctx context.Context) error {
	// Other users (SQL sessions run as such) must reach the socket.
	if err := os.Chmod(s.Dir, 0o755); err != nil {
		return err
	}
	if os.Geteuid() == 0 {
		u, err := user.Lookup("mysql")
		if err != nil {
			return errors.New("no user mysql on this machine: install the Debian package mariadb-server")
		}
		s.uid, _ = strconv.Atoi(u.Uid)
		s.gid, _ = strconv.Atoi(u.Gid)
		if err := os.Chown(s.Dir, s.uid, s.gid); err != nil {
			return err
		}
	}
	if err := s.install(); err != nil {
		return err
	}
	if s.options.TLS {
		if err := s.writeCertificate(); err != nil {
			return err
		}
	}
	for attempt := 1; ; attempt++ {
		port, err := freeport.TCP()
		if err != nil {
			return err
		}
		s.Port = port
		password := s.Password
		s.Password = ""
		err = s.start(ctx)
		s.Password = password
		if err == nil {
			break
		}
		// Somebody else may have taken the port in between.
		if attempt == 3 || !strings.Contains(err.Error(), "already in use") {
			return err
		}
	}
	password := s.Password
	s.Password = ""
	err := s.SQL(ctx, "ALTER USER '"+Superuser+"'@'localhost' IDENTIFIED BY '"+password+"'")
	s.Password = password
	return err
}

// install makes the server's data directory.
func (s *Server) install() error {
	program, err := find("mariadb-install-db")
	args := []string{
		"--no-defaults", "--datadir=" + s.dataDir(), "--auth-root-authentication-method=normal", "--skip-test-db",
		"--innodb-buffer-pool-size=8M", "--innodb-log-file-size=4M", "--innodb-flush-log-at-trx-commit=0",
	}
	if s.options.MySQL != "" {
		program, err = s.options.daemon()
		args = []string{"--no-defaults", "--initialize-insecure", "--datadir=" + s.dataDir(), "--lc-messages-dir=" + s.messages(), "--innodb-flush-method=nosync"}
	}
	if err != nil {
		return err
	}
	if out, err := s.command(program, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", filepath.Base(program), err, tail(out))
	}
	return nil
}

// messages is where MySQL's messages are.
func (s *Server) messages() string { return filepath.Join(s.options.MySQL, "share", "mysql") }

// command is one that runs as the server's user and ends with us.
func (s *Server) command(path string, args ...string) *exec.Cmd {
	cmd := exec.Command(path, args...)
	cmd.Dir = s.Dir
	cmd.Env = []string{"LC_ALL=C.UTF-8", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "TZ=UTC"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if s.uid >= 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(s.uid), Gid: uint32(s.gid)}
	}
	return cmd
}

func (s *Server) dataDir() string { return filepath.Join(s.Dir, "data") }

// LogFile is the path of the server's log.
func (s *Server) LogFile() string { return filepath.Join(s.Dir, "server.log") }

// DSN names the server by its loopback TCP address, as a data source does.
func (s *Server) DSN(user, database string) string {
	return fmt.Sprintf("host=127.0.0.1 port=%d user=%s dbname=%s sslmode=disable", s.Port, user, database)
}

// SocketDSN names the server by its unix socket, as a data source does.
func (s *Server) SocketDSN(user, database string) string {
	return fmt.Sprintf("host=%s user=%s dbname=%s", s.Socket, user, database)
}

// PID is the server's process id, or 0 when it is down.
func (s *Server) PID() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cmd == nil {
		return 0
	}
	return s.cmd.Process.Pid
}

// Open returns a pool of connections to a database as the superuser. The caller
// closes it.
func (s *Server) Open(database string) (*sql.DB, error) {
	c := mysql.NewConfig()
	c.User, c.Passwd, c.Net, c.Addr, c.DBName = Superuser, s.Password, "unix", s.Socket, database
	c.MultiStatements = true
	c.Logger = quiet{}
	connector, err := mysql.NewConnector(c)
	if err != nil {
		return nil, err
	}
	return sql.OpenDB(connector), nil
}

type quiet struct{}

func (quiet) Print(...any) {}

// SQL runs statements as the superuser, each on its own.
func (s *Server) SQL(ctx context.Context, statements ...string) error {
	return s.SQLIn(ctx, "", statements...)
}

// SQLIn is SQL in a database.
func (s *Server) SQLIn(ctx context.Context, database string, statements ...string) error {
	db, err := s.Open(database)
	if err != nil {
		return err
	}
	defer func() { _ = db.Close() }()
	for _, statement := range statements {
		if _, err := db.ExecContext(ctx, statement); err != nil {
			return fmt.Errorf("%.60s: %w", statement, err)
		}
	}
	return nil
}

// CreateUser makes an account that may log in from anywhere, with what grants say,
// such as "SELECT, SHOW VIEW ON shop.*".
func (s *Server) CreateUser(ctx context.Context, name, password string, grants ...string) error {
	account := "'" + name + "'@'%'"
	statements := []string{"CREATE USER " + account + " IDENTIFIED BY '" + strings.ReplaceAll(password, "'", "''") + "'"}
	for _, g := range grants {
		statements = append(statements, "GRANT "+g+" TO "+account)
	}
	return s.SQL(ctx, statements...)
}

// start runs the server and waits until it answers.
func (s *Server) start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	path, err := s.options.daemon()
	if err != nil {
		return err
	}
	args := []string{
		"--no-defaults", "--datadir=" + s.dataDir(), "--socket=" + s.Socket, "--port=" + strconv.Itoa(s.Port), "--bind-address=127.0.0.1",
		"--skip-name-resolve=0", "--pid-file=" + filepath.Join(s.Dir, "pid"), "--character-set-server=utf8mb4", "--max-allowed-packet=512M",
		"--innodb-buffer-pool-size=32M", "--innodb-flush-log-at-trx-commit=0", "--innodb-flush-method=nosync",
		"--skip-log-bin", "--secure-file-priv=", "--default-time-zone=+00:00", "--local-infile=1",
	}
	if s.options.MySQL != "" {
		args = append(args, "--innodb-redo-log-capacity=32M", "--mysqlx=OFF", "--lc-messages-dir="+s.messages(),
			"--plugin-dir="+filepath.Join(s.options.MySQL, "lib", "mysql", "plugin"), "--log-error-verbosity=2")
	} else {
		args = append(args, "--innodb-log-file-size=16M")
	}
	if s.options.TLS {
		args = append(args, "--ssl-cert="+s.CAFile, "--ssl-key="+filepath.Join(s.Dir, "key.pem"))
	}
	for name, value := range s.options.Settings {
		args = append(args, "--"+name+"="+value)
	}
	log, err := os.OpenFile(s.LogFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	cmd := s.command(path, args...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return err
	}
	done := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(done)
	}()
	s.mu.Lock()
	s.cmd, s.done = cmd, done
	s.mu.Unlock()
	for {
		err := s.SQL(ctx, "SELECT 1")
		if err == nil {
			return nil
		}
		select {
		case <-done:
			s.forget()
			return fmt.Errorf("the server ended: %s", s.logTail())
		case <-ctx.Done():
			return fmt.Errorf("the server did not answer: %w: %s", err, s.logTail())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (s *Server) logTail() string {
	text, _ := os.ReadFile(s.LogFile())
	return tail(text)
}

func tail(text []byte) string {
	if len(text) > 2000 {
		text = text[len(text)-2000:]
	}
	return strings.TrimSpace(string(text))
}

func (s *Server) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cmd, s.done = nil, nil
}

func (s *Server) running() (*exec.Cmd, chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cmd, s.done
}

// Stop shuts the server down and removes its directory. It may be called twice.
func (s *Server) Stop() error {
	return errors.Join(s.Down(), os.RemoveAll(s.Dir))
}

// Down shuts the server down and keeps its data; Restart brings it back.
func (s *Server) Down() error {
	cmd, done := s.running()
	if cmd == nil {
		return nil
	}
	_ = cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-done:
		s.forget()
		return nil
	case <-time.After(startTimeout):
		return errors.Join(errors.New("MariaDB did not stop in time"), s.Kill())
	}
}

// Kill ends the server with SIGKILL and keeps its data.
func (s *Server) Kill() error {
	cmd, done := s.running()
	if cmd == nil {
		return nil
	}
	err := cmd.Process.Signal(syscall.SIGKILL)
	<-done
	s.forget()
	return err
}

// Restart stops the server, if it runs, and starts it again on the same port with the
// same data.
func (s *Server) Restart(ctx context.Context) error {
	if err := s.Down(); err != nil {
		return err
	}
	return s.start(ctx)
}

func (s *Server) writeCertificate() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	s.CAFile = filepath.Join(s.Dir, "cert.pem")
	keyFile := filepath.Join(s.Dir, "key.pem")
	if err := os.WriteFile(s.CAFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), 0o644); err != nil {
		return err
	}
	if err := os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600); err != nil {
		return err
	}
	return os.Chown(keyFile, s.uid, s.gid)
}

// TB is the part of testing.TB that Start needs.
type TB interface {
	Helper()
	Cleanup(func())
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// Start launches a server that lives as long as the test. At most one Options is
// looked at.
func Start(t TB, options ...Options) *Server {
	t.Helper()
	var o Options
	if len(options) > 0 {
		o = options[0]
	}
	s, err := Launch(context.Background(), o)
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Errorf("stop MariaDB: %v", err)
		}
	})
	return s
}
