package pgserver

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/postern-dev/postern/e2e/freeport"
)

// Superuser is the name of the server's superuser, and of its first database.
const Superuser = "postgres"

// startTimeout bounds the wait for a server that has been started: a busy
// machine needs seconds, a server that needs more has failed.
const startTimeout = 60 * time.Second

// Options say what kind of server is wanted; the zero value is a plain one.
type Options struct {
	// Settings are appended to postgresql.conf; values are quoted here.
	Settings map[string]string
	// TLS gives the server a self-signed certificate for localhost and
	// 127.0.0.1; its PEM file is Server.CAFile. Plain connections still work.
	TLS bool
	// Dir is the parent of the server's directory; empty means os.TempDir().
	// It must be short (the socket's path has 107 bytes at most) and, when we
	// are root, open to the user postgres.
	Dir string
	// NoCache makes a new cluster with initdb rather than a copy of the one
	// cached in os.TempDir(), and leaves nothing there.
	NoCache bool
}

// Server is one running PostgreSQL.
type Server struct {
	// Password is the superuser's, made anew for each server.
	Password string
	// Host is the directory of the unix socket; it serves as host= in a DSN.
	Host string
	// Port is the TCP port on 127.0.0.1 and the number in the socket's name.
	Port int
	// Dir holds everything of this server; removed by Stop.
	Dir string
	// CAFile is the certificate to trust (PEM) when Options.TLS was set.
	CAFile string

	bin     string
	account *account

	mu   sync.Mutex
	cmd  *exec.Cmd
	done chan struct{} // closed when cmd was waited for
}

// Launch starts a server. ctx bounds the start alone. The caller calls Stop.
func Launch(ctx context.Context, options Options) (*Server, error) {
	bin, err := findBinaries()
	if err != nil {
		return nil, err
	}
	who, err := serverAccount()
	if err != nil {
		return nil, err
	}
	parent := options.Dir
	if parent == "" {
		parent = os.TempDir()
	}
	dir, err := os.MkdirTemp(parent, "postern-pg-")
	if err != nil {
		return nil, err
	}
	s := &Server{Dir: dir, Host: filepath.Join(dir, "s"), bin: bin, account: who}
	if err := s.setUp(ctx, options); err != nil {
		_ = s.Kill()
		_ = os.RemoveAll(dir)
		return nil, fmt.Errorf("start PostgreSQL in %s: %w", dir, err)
	}
	return s, nil
}

func (s *Server) setUp(ctx context.Context, options Options) error {
	for _, dir := range []string{s.Dir, s.Host} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		// Other users (SQL sessions run as such) must reach the socket.
		if err := os.Chmod(dir, 0o755); err != nil {
			return err
		}
		if err := s.account.own(dir); err != nil {
			return err
		}
	}
	oldPassword, err := newCluster(ctx, s.bin, s.account, s.dataDir(), options.NoCache)
	if err != nil {
		return err
	}
	if options.TLS {
		if err := s.writeCertificate(); err != nil {
			return err
		}
	}
	for attempt := 1; ; attempt++ {
		if s.Port, err = freeport.TCP(); err != nil {
			return err
		}
		if err := s.configure(options); err != nil {
			return err
		}
		s.Password = oldPassword
		err := s.start(ctx)
		if err == nil {
			break
		}
		// Somebody else may have taken the port in between.
		if attempt == 3 || !strings.Contains(err.Error(), "Address already in use") {
			return err
		}
	}
	password := randomPassword()
	if err := s.SQL(ctx, "ALTER ROLE "+Superuser+" PASSWORD '"+password+"'"); err != nil {
		return err
	}
	s.Password = password
	return nil
}

func (s *Server) dataDir() string { return filepath.Join(s.Dir, "data") }

// LogFile is the path of the server's log.
func (s *Server) LogFile() string { return filepath.Join(s.Dir, "server.log") }

// DSN names the server by its loopback TCP address, without a password.
func (s *Server) DSN(user, database string) string {
	return fmt.Sprintf("host=127.0.0.1 port=%d user=%s dbname=%s sslmode=disable",
		s.Port, quoteDSN(user), quoteDSN(database))
}

// SocketDSN names the server by its unix socket, without a password.
func (s *Server) SocketDSN(user, database string) string {
	return fmt.Sprintf("host=%s port=%d user=%s dbname=%s",
		quoteDSN(s.Host), s.Port, quoteDSN(user), quoteDSN(database))
}

// Bin is the path of one of PostgreSQL's programs, such as "psql".
func (s *Server) Bin(program string) string { return filepath.Join(s.bin, program) }

// PID is the postmaster's process id, or 0 when the server is down.
func (s *Server) PID() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cmd == nil {
		return 0
	}
	return s.cmd.Process.Pid
}

// Connect opens a connection to a database as the superuser. The caller
// closes it.
func (s *Server) Connect(ctx context.Context, database string) (*pgx.Conn, error) {
	config, err := pgx.ParseConfig(s.SocketDSN(Superuser, database))
	if err != nil {
		return nil, err
	}
	config.Password = s.Password
	return pgx.ConnectConfig(ctx, config)
}

// SQL runs statements in the database postgres as the superuser, each on its
// own.
func (s *Server) SQL(ctx context.Context, statements ...string) error {
	return s.SQLIn(ctx, Superuser, statements...)
}

// SQLIn is SQL in another database.
func (s *Server) SQLIn(ctx context.Context, database string, statements ...string) error {
	conn, err := s.Connect(ctx, database)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	for _, statement := range statements {
		if _, err := conn.Exec(ctx, statement, pgx.QueryExecModeSimpleProtocol); err != nil {
			return fmt.Errorf("%.60s: %w", statement, err)
		}
	}
	return nil
}

// CreateRole makes a role that may log in. attributes are SQL such as
// "SUPERUSER" or "CONNECTION LIMIT 3".
func (s *Server) CreateRole(ctx context.Context, name, password string, attributes ...string) error {
	return s.SQL(ctx, fmt.Sprintf("CREATE ROLE %s LOGIN PASSWORD '%s' %s",
		pgx.Identifier{name}.Sanitize(), strings.ReplaceAll(password, "'", "''"), strings.Join(attributes, " ")))
}

// CreateDatabase makes a database that owner owns; empty means the superuser.
func (s *Server) CreateDatabase(ctx context.Context, name, owner string) error {
	if owner == "" {
		owner = Superuser
	}
	return s.SQL(ctx, fmt.Sprintf("CREATE DATABASE %s OWNER %s",
		pgx.Identifier{name}.Sanitize(), pgx.Identifier{owner}.Sanitize()))
}

func (s *Server) configure(options Options) error {
	settings := map[string]string{
		"listen_addresses":        "127.0.0.1",
		"port":                    strconv.Itoa(s.Port),
		"unix_socket_directories": s.Host,
		"fsync":                   "off",
		// A commit must survive Kill, which is not a power cut: no fsync.
		"synchronous_commit":  "on",
		"full_page_writes":    "off",
		"logging_collector":   "off",
		"password_encryption": "scram-sha-256",
	}
	if options.TLS {
		settings["ssl"] = "on"
	}
	for name, value := range options.Settings {
		settings[name] = value
	}
	names := make([]string, 0, len(settings))
	for name := range settings {
		names = append(names, name)
	}
	sort.Strings(names)
	var text strings.Builder
	for _, name := range names {
		fmt.Fprintf(&text, "%s = '%s'\n", name, strings.ReplaceAll(settings[name], "'", "''"))
	}
	const hba = "local all,replication all scram-sha-256\nhost all,replication all 127.0.0.1/32 scram-sha-256\n"
	if err := s.writeData("postgresql.auto.conf", ""); err != nil {
		return err
	}
	if err := s.writeData("pg_hba.conf", hba); err != nil {
		return err
	}
	return s.writeData("postgresql.conf", text.String())
}

func (s *Server) writeData(name, text string) error {
	path := filepath.Join(s.dataDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		return err
	}
	return s.account.own(path)
}

// start runs the server and waits until it answers.
func (s *Server) start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	log, err := os.OpenFile(s.LogFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	cmd := exec.Command(s.Bin("postgres"), "-D", s.dataDir())
	cmd.Dir = s.Dir
	cmd.Env = []string{"LC_ALL=C.UTF-8", "PATH=/usr/bin:/bin", "TZ=UTC"}
	cmd.Stdout, cmd.Stderr = log, log
	// Should the test process be killed, the server ends with it.
	cmd.SysProcAttr = s.account.attributes(syscall.SIGQUIT)
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
		conn, err := s.Connect(ctx, Superuser)
		if err == nil {
			return conn.Close(ctx)
		}
		select {
		case <-done:
			s.forget()
			return fmt.Errorf("the server ended: %s", s.logTail())
		case <-ctx.Done():
			return fmt.Errorf("the server did not answer: %w: %s", err, s.logTail())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (s *Server) logTail() string {
	text, _ := os.ReadFile(s.LogFile())
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

// Stop shuts the server down ("fast": sessions are ended, nothing is lost)
// and removes its directory. It may be called twice.
func (s *Server) Stop() error {
	err := s.Down()
	return errors.Join(err, os.RemoveAll(s.Dir))
}

// Down shuts the server down and keeps its data; Restart brings it back.
func (s *Server) Down() error {
	cmd, done := s.running()
	if cmd == nil {
		return nil
	}
	_ = cmd.Process.Signal(syscall.SIGINT)
	select {
	case <-done:
		s.forget()
		return nil
	case <-time.After(startTimeout):
		return errors.Join(errors.New("PostgreSQL did not stop in time"), s.Kill())
	}
}

// Kill ends every process of the server with SIGKILL and keeps its data.
func (s *Server) Kill() error {
	cmd, done := s.running()
	if cmd == nil {
		return nil
	}
	// Backends are in process groups of their own.
	_ = cmd.Process.Signal(syscall.SIGSTOP)
	backends := children(cmd.Process.Pid)
	err := cmd.Process.Signal(syscall.SIGKILL)
	<-done
	for _, pid := range backends {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	// A new server refuses to start while one of the old is attached to the
	// shared memory.
	for deadline := time.Now().Add(startTimeout); slices.ContainsFunc(backends, alive) && time.Now().Before(deadline); {
		time.Sleep(5 * time.Millisecond)
	}
	s.removeSharedMemory()
	s.forget()
	return err
}

// Restart stops the server, if it runs, and starts it again on the same port
// with the same data.
func (s *Server) Restart(ctx context.Context) error {
	if err := s.Down(); err != nil {
		return err
	}
	return s.start(ctx)
}

func randomPassword() string {
	var b [16]byte
	_, _ = rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

func quoteDSN(value string) string {
	return "'" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(value) + "'"
}
