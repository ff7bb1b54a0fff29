package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// socketName is the socket's name in the runtime directory.
const socketName = "agentd.sock"

// maxPath is the longest path that a unix socket may have.
const maxPath = len(unix.RawSockaddrUnix{}.Path) - 1

// ErrNotRunning is returned when no agentd answers at the socket.
var ErrNotRunning = errors.New("agentd is not running")

// Path is the socket's in this runtime directory.
func Path(runtimeDir string) string { return filepath.Join(runtimeDir, socketName) }

// Config is what a Server needs.
type Config struct {
	Status func() Status
	// Check looks at one data source; it may take as long as ctx.
	Check func(ctx context.Context, source string) []Check
	// Candidate looks at a data source that is not saved.
	Candidate func(ctx context.Context, c Candidate) CandidateAnswer
	// Level sets the level of the log until the configuration is read again, and returns the
	// one in force; empty text asks alone.
	Level func(level string) (string, error)
	// Keys lists the host's keys for checkpoints, after it made a new one if that is asked for.
	Keys func(ctx context.Context, o KeyOrder) ([]Key, error)
	// Mount does what a command that mounts or unmounts a workspace on this host asks for.
	Mount func(ctx context.Context, m Mount) MountAnswer
}

// MaxCandidate bounds the text of a candidate, in bytes.
const MaxCandidate = 1 << 20

// Candidate is a data source of a configuration that is not in force.
type Candidate struct {
	// File is what Text was read from, for messages.
	File string `json:"file"`
	Text string `json:"text"`
	// Source is its name; "" is the only one of the file.
	Source string `json:"source"`
	// Offer asks for a one-time token.
	Offer bool `json:"offer"`
}

// CandidateAnswer is what was found out; Error is set when nothing could be.
type CandidateAnswer struct {
	Source string  `json:"source"`
	Checks []Check `json:"checks"`
	// Token lets who has it check the source from the control plane, once.
	Token   string    `json:"token,omitempty"`
	Expires time.Time `json:"expires,omitzero"`
	Error   string    `json:"error,omitempty"`
}

// Server answers at the socket.
type Server struct {
	path string
	http *http.Server
	wg   sync.WaitGroup
}

// Listen makes the runtime directory and the socket and answers until Close.
// The caller makes sure that there is one agentd per runtime directory: a socket
// that is there is one that a killed agentd left, and is replaced.
func Listen(runtimeDir string, cfg Config) (*Server, error) {
	path := Path(runtimeDir)
	if len(path) > maxPath {
		return nil, fmt.Errorf("the path of the status socket is longer than %d bytes: choose a shorter --runtime (%s)", maxPath, path)
	}
	if err := os.MkdirAll(runtimeDir, 0o700); err != nil {
		return nil, fmt.Errorf("runtime directory: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("status socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("status socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) { write(w, cfg.Status()) })
	mux.HandleFunc("GET /check", func(w http.ResponseWriter, r *http.Request) {
		write(w, cfg.Check(r.Context(), r.URL.Query().Get("source")))
	})
	mux.HandleFunc("POST /candidate", func(w http.ResponseWriter, r *http.Request) {
		var c Candidate
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 7*MaxCandidate)).Decode(&c); err != nil || len(c.Text) > MaxCandidate {
			http.Error(w, "not a candidate", http.StatusBadRequest)
			return
		}
		write(w, cfg.Candidate(r.Context(), c))
	})
	mux.HandleFunc("POST /log-level", func(w http.ResponseWriter, r *http.Request) {
		var l levelQuestion
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 4<<10)).Decode(&l); err != nil {
			http.Error(w, "not a level", http.StatusBadRequest)
			return
		}
		level, err := cfg.Level(l.Level)
		if err != nil {
			write(w, levelAnswer{Error: err.Error()})
			return
		}
		write(w, levelAnswer{Level: level})
	})
	mux.HandleFunc("POST /key", handleKeys(cfg.Keys))
	mux.HandleFunc("POST /mount", func(w http.ResponseWriter, r *http.Request) {
		var m Mount
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 64<<10)).Decode(&m); err != nil {
			http.Error(w, "not a mount", http.StatusBadRequest)
			return
		}
		write(w, cfg.Mount(r.Context(), m))
	})
	s := &Server{path: path, http: &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: 5 * time.Second}}
	s.wg.Go(func() {
		s.http.Serve(ownUser{l}) //nolint:errcheck // it ends with Close
	})
	return s, nil
}

func write(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v) //nolint:errcheck // the command has gone
}

// Close stops answering and removes the socket.
func (s *Server) Close() error {
	err := s.http.Close()
	s.wg.Wait()
	if rerr := os.Remove(s.path); rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
		err = errors.Join(err, rerr)
	}
	return err
}

// ownUser accepts connections of root and of agentd's own user alone, should the
// file's mode ever be changed.
type ownUser struct{ net.Listener }

// Accept implements net.Listener.
func (l ownUser) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if uid, err := peerUser(conn); err == nil && (uid == 0 || int(uid) == os.Geteuid()) {
			return conn, nil
		}
		conn.Close() //nolint:errcheck // it is not wanted
	}
}

func peerUser(conn net.Conn) (uint32, error) {
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) {
		cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if cerr != nil {
		return 0, cerr
	}
	return cred.Uid, nil
}

// maxAnswer bounds what a command reads of agentd, in bytes.
const maxAnswer = 16 << 20

// Ask asks the agentd of this runtime directory for its status. ErrNotRunning
// says that there is none.
func Ask(ctx context.Context, runtimeDir string) (Status, error) {
	var s Status
	return s, ask(ctx, runtimeDir, http.MethodGet, "/status", nil, &s)
}

// AskCheck has the agentd of this runtime directory check a data source.
func AskCheck(ctx context.Context, runtimeDir, source string) ([]Check, error) {
	var checks []Check
	return checks, ask(ctx, runtimeDir, http.MethodGet, "/check?source="+url.QueryEscape(source), nil, &checks)
}

// AskCandidate has the agentd of this runtime directory check a data source
// that is not saved.
func AskCandidate(ctx context.Context, runtimeDir string, c Candidate) (CandidateAnswer, error) {
	body, err := json.Marshal(c)
	if err != nil {
		return CandidateAnswer{}, err
	}
	var a CandidateAnswer
	return a, ask(ctx, runtimeDir, http.MethodPost, "/candidate", body, &a)
}

type levelQuestion struct {
	Level string `json:"level"`
}

type levelAnswer struct {
	Level string `json:"level"`
	Error string `json:"error,omitempty"`
}

// AskLevel sets the level of the log of the agentd of this runtime directory, and returns the one in force;
// an empty level asks alone.
func AskLevel(ctx context.Context, runtimeDir, level string) (string, error) {
	body, err := json.Marshal(levelQuestion{level})
	if err != nil {
		return "", err
	}
	var a levelAnswer
	if err := ask(ctx, runtimeDir, http.MethodPost, "/log-level", body, &a); err != nil {
		return "", err
	}
	if a.Error != "" {
		return "", errors.New(a.Error)
	}
	return a.Level, nil
}

// AskMount has the agentd of this runtime directory prepare or end a mount.
func AskMount(ctx context.Context, runtimeDir string, m Mount) (MountAnswer, error) {
	body, err := json.Marshal(m)
	if err != nil {
		return MountAnswer{}, err
	}
	var a MountAnswer
	return a, ask(ctx, runtimeDir, http.MethodPost, "/mount", body, &a)
}

func ask(ctx context.Context, runtimeDir, method, path string, question []byte, answer any) error {
	socket := Path(runtimeDir)
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "unix", socket)
		},
	}
	r, err := http.NewRequestWithContext(ctx, method, "http://agentd"+path, bytes.NewReader(question))
	if err != nil {
		return err
	}
	response, err := (&http.Client{Transport: transport}).Do(r)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ECONNREFUSED):
		return ErrNotRunning
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("status socket %s may be used by root alone: use sudo", socket)
	case err != nil:
		return fmt.Errorf("ask agentd at %s: %w", socket, err)
	}
	defer response.Body.Close() //nolint:errcheck // it is read to its end
	body, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer))
	if err != nil {
		return fmt.Errorf("ask agentd at %s: %w", socket, err)
	}
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("agentd at %s answered %s: is it another version?", socket, response.Status)
	}
	if err := json.Unmarshal(body, answer); err != nil {
		return fmt.Errorf("agentd at %s answered what this command does not understand: is it another version? (%w)", socket, err)
	}
	return nil
}
