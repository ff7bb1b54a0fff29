package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/kernelstream"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Arg is agentd's first argument in a shim's process; the second is the kernel's
// directory.
const Arg = "kernel-shim"

// readyFD is where a new shim says "ready", or why it could not start, to who started
// it.
const readyFD = 3

// maxLog is from which size on a shim begins its log anew, in bytes.
const maxLog = 1 << 20

// Main is a shim's process: it runs until the kernel is stopped. It returns an exit
// code.
func Main(args []string, criu CRIU) int {
	if len(args) != 1 {
		fmt.Fprintln(os.Stderr, "agentd kernel-shim is started by agentd")
		return proto.ExitUsage
	}
	// Who started it may go; a terminal's signals are not for it.
	signal.Ignore(unix.SIGHUP, unix.SIGINT, unix.SIGPIPE)
	debug.SetGCPercent(50)
	dir := args[0]
	out := io.Writer(os.Stderr)
	path := filepath.Join(dir, logFile)
	flags := os.O_WRONLY | os.O_CREATE | os.O_APPEND
	if info, err := os.Stat(path); err == nil && info.Size() > maxLog {
		flags |= os.O_TRUNC
	}
	if f, err := os.OpenFile(path, flags, 0o600); err == nil {
		out = f
	}
	logger := slog.New(slog.NewTextHandler(out, nil))
	ready := os.NewFile(readyFD, "ready")
	say := func(text string) {
		_, _ = io.WriteString(ready, text) // who asked may have gone
		_ = ready.Close()
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, unix.SIGTERM)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		<-stop
		cancel()
	}()
	secrets, err := readSecrets(os.Stdin)
	var s *Shim
	if err == nil {
		s, err = openWith(ctx, dir, logger, criu, secrets)
	}
	if err != nil {
		logger.Error("shim not started", "err", err)
		say(oneLine(err.Error()))
		return proto.ExitFailed
	}
	defer s.Close()
	if err := s.Serve(ctx, func() { say("ready") }); err != nil {
		logger.Error("shim ended", "err", err)
		say(oneLine(err.Error()))
		return proto.ExitFailed
	}
	return proto.ExitDone
}

// readSecrets reads what SpawnWith wrote, and puts /dev/null in its place.
func readSecrets(f *os.File) (Secrets, error) {
	var all Secrets
	text, err := io.ReadAll(io.LimitReader(f, maxSpec))
	if err != nil {
		return all, fmt.Errorf("read the kernel's secrets: %w", err)
	}
	defer clear(text)
	null, err := os.Open(os.DevNull)
	if err != nil {
		return all, err
	}
	defer null.Close() //nolint:errcheck // there is a copy
	if err := unix.Dup3(int(null.Fd()), int(f.Fd()), 0); err != nil {
		return all, err
	}
	if len(text) == 0 {
		return all, nil
	}
	if err := json.Unmarshal(text, &all); err != nil {
		return all, errors.New("the kernel's secrets can't be read")
	}
	return all, nil
}

// Serve answers at the socket until the kernel is stopped or ctx ends. ready is called
// when it answers.
func (s *Shim) Serve(ctx context.Context, ready func()) error {
	l, err := listen(s.dir)
	if err != nil {
		return fmt.Errorf("shim's socket: %w", err)
	}
	p, err := openPlace(s.dir)
	if err != nil {
		_ = l.Close()
		return fmt.Errorf("shim's socket: %w", err)
	}
	defer p.dir.Close() //nolint:errcheck // it was looked at
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+kernelstream.Path, s.serveChannels)
	mux.HandleFunc("GET /v1/kernel", func(w http.ResponseWriter, _ *http.Request) {
		k, _ := s.Kernel()
		writeKernel(w, k)
	})
	mux.HandleFunc("GET /v1/watch", s.serveWatch)
	mux.HandleFunc("GET /v1/detail", func(w http.ResponseWriter, _ *http.Request) { writeAnswer(w, s.Detail()) })
	for path, do := range map[string]func(*http.Request) error{
		"/v1/interrupt": func(*http.Request) error { return s.Interrupt() },
		"/v1/restart":   func(r *http.Request) error { return s.Restart(r.Context()) },
		"/v1/reread":    func(*http.Request) error { return s.Reread() },
		"/v1/stop":      func(r *http.Request) error { return s.Stop(r.Context()) },
		"/v1/resume":    func(*http.Request) error { return s.Resume() },
	} {
		mux.HandleFunc("POST "+path, func(w http.ResponseWriter, r *http.Request) {
			// What was begun is finished, whoever hangs up.
			r = r.WithContext(context.WithoutCancel(r.Context()))
			if err := do(r); err != nil {
				s.logger.Warn("request failed", "path", r.URL.Path, "err", err)
				proto.WriteHTTPError(w, public(err))
				return
			}
			k, _ := s.Kernel()
			writeKernel(w, k)
		})
	}
	mux.HandleFunc("POST /v1/quiesce", func(w http.ResponseWriter, r *http.Request) {
		wait, err := time.ParseDuration(r.URL.Query().Get("wait"))
		if err != nil {
			wait = 0
		}
		q, err := s.Quiesce(r.Context(), wait)
		if err != nil {
			proto.WriteHTTPError(w, public(err))
			return
		}
		writeAnswer(w, q)
	})
	s.serveCheckpoints(mux)
	s.serveMoves(mux)
	s.serveSecrets(mux)
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, ErrorLog: slog.NewLogLogger(s.logger.Handler(), slog.LevelDebug)}
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	ready()
	looking, stopLooking := context.WithCancel(ctx)
	lost := make(chan error, 1)
	var looks sync.WaitGroup
	defer looks.Wait()
	defer stopLooking()
	looks.Go(func() {
		if err := s.keepPlace(looking, p); err != nil {
			lost <- err
		}
	})
	select {
	case err = <-served:
	case err = <-lost:
	case <-ctx.Done():
	case <-s.finished:
		// The one who asked is told, and clients get the last words.
		shut, cancel := context.WithTimeout(context.Background(), 2*lastWords)
		s.cancel(errStopped)
		_ = server.Shutdown(shut)
		cancel()
	}
	_ = server.Close()
	if errors.Is(err, http.ErrServerClosed) {
		err = nil
	}
	return err
}

// public is an error for agentd: the text of every error is for the same host's root.
func public(err error) error {
	var told *proto.Error
	if errors.As(err, &told) {
		return err
	}
	return proto.Errorf(proto.CodeInternal, "%v", err)
}

func writeKernel(w http.ResponseWriter, k *posternv1.Kernel) {
	text, err := protojson.Marshal(k)
	if err != nil {
		proto.WriteHTTPError(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(text) // agentd may have gone
}

func writeAnswer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) //nolint:errchkjson // agentd may have gone
}

// watchPause is the least time between two lines of serveWatch.
const watchPause = 50 * time.Millisecond

// serveWatch tells of the kernel, one JSON line for each change, until the shim ends.
func (s *Shim) serveWatch(w http.ResponseWriter, r *http.Request) {
	defer s.watchedBy()()
	w.Header().Set("Content-Type", "application/json")
	out := http.NewResponseController(w)
	for {
		k, changed := s.Kernel()
		text, err := protojson.Marshal(k)
		if err != nil {
			return
		}
		if _, err := w.Write(append(text, '\n')); err != nil {
			return
		}
		if err := out.Flush(); err != nil {
			return
		}
		pause := time.NewTimer(watchPause)
		select {
		case <-pause.C:
		case <-r.Context().Done():
			pause.Stop()
			return
		}
		select {
		case <-changed:
		case <-r.Context().Done():
			return
		case <-s.ctx.Done():
			return
		}
	}
}

// Detail is what a shim says of itself.
type Detail struct {
	PID      int    `json:"pid"`
	InitPID  int    `json:"init_pid,omitempty"`
	Software string `json:"software"`
	// Requests await a reply, Queued messages wait for the kernel.
	Requests int `json:"requests"`
	Queued   int `json:"queued"`
	// JournalBytes is what the journal takes on the disk.
	JournalBytes int64 `json:"journal_bytes"`
	// Dropped are messages of the kernel that were no messages, or for nobody.
	Dropped uint64 `json:"dropped"`
	// Heartbeat is when the kernel's heartbeat last answered.
	Heartbeat time.Time `json:"heartbeat,omitzero"`
	Quiesced  bool      `json:"quiesced"`
	// Missing are limits that this host can't enforce.
	Missing []string `json:"missing,omitempty"`
}

// Detail says what goes on.
func (s *Shim) Detail() Detail {
	d := Detail{PID: os.Getpid(), Software: proto.Software(), JournalBytes: s.journal.Bytes()}
	for _, q := range s.queues {
		d.Queued += q.len()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	d.Requests, d.Dropped, d.Quiesced = len(s.requests), s.drops, s.quiet
	if s.box != nil {
		d.InitPID, d.Missing = s.box.PID(), s.box.Missing()
	}
	if l := s.link; l != nil {
		if at := l.beat.Load(); at > 0 {
			d.Heartbeat = time.Unix(0, at)
		}
	}
	return d
}
