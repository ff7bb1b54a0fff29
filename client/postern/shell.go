package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"

	"connectrpc.com/connect"
	"github.com/peterh/liner"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/postern-dev/postern/client"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/rowfmt"
	"github.com/postern-dev/postern/proto/sqlsplit"
)

const (
	// leaveTime bounds the closing of the session at the end.
	leaveTime = 5 * time.Second
	// twice is how soon a second Ctrl-C at an idle prompt leaves.
	twice = time.Second
	// maxIncludes is how deep \i goes.
	maxIncludes = 16
)

// shell is `postern sql -i`: one session, and statements one after the other from
// a terminal or a script.
type shell struct {
	app           *app
	client        *client.Client
	agent, source string
	options       sqlOptions

	interactive bool
	editor      *liner.State // nil without a terminal
	history     *history
	names       *names

	session     string // "" is none
	transaction string // none, open or failed
	lines       *sqlsplit.Splitter
	variables   map[string]*posternv1.Parameter
	format      rowfmt.Format
	expanded    bool
	timing      bool
	pager       bool
	out         *os.File // of \o; nil is stdout
	includes    int

	mu        sync.Mutex // guards what signals reach
	interrupt func()     // cancels the statement under way; nil is none
}

// errQuit ends the shell in order.
var errQuit = errors.New("quit")

// shell runs the interactive session.
func (a *app) shell(ctx context.Context, args []string, o sqlOptions) error {
	agent, source, err := splitSource(args[0])
	if err != nil {
		return err
	}
	if len(args) > 1 {
		return usagef("-i takes no query: type it, or pipe a script to stdin")
	}
	if o.plan.explain || o.plan.analyze || len(o.plan.indexes) > 0 {
		return usagef("with -i a plan is asked for by \\explain STATEMENT")
	}
	if a.tokenFile == "-" {
		return usagef("stdin cannot hold both the token and the statements: name a file with --token-file")
	}
	s := &shell{app: a, agent: agent, source: source, options: o, transaction: "none", variables: make(map[string]*posternv1.Parameter), pager: true}
	if s.format, err = rowfmt.ParseFormat(o.format); err != nil {
		return &usageError{err}
	}
	if s.format.Binary() {
		return usagef("%s is not a format for several statements: choose table, csv, json or ndjson", s.format)
	}
	parameters, err := parseParameters(o.parameters, o.nulls)
	if err != nil {
		return err
	}
	for _, p := range parameters {
		s.variables[p.Name] = p
	}
	if o.file != "" {
		if err := s.redirect(o.file); err != nil {
			return err
		}
	}
	if s.client, err = a.client(); err != nil {
		return err
	}
	defer s.client.Close()
	s.names = newNames(s.client, agent, source)
	defer s.names.close()
	s.interactive = isTerminal(a.stdin) && isTerminal(a.stdout)
	// At a terminal Ctrl-C is for the statement; what asks us to go ends the shell.
	work, leave := context.WithCancel(context.WithoutCancel(ctx))
	defer leave()
	if !s.interactive {
		defer context.AfterFunc(ctx, leave)()
	}
	defer s.leave()
	if err := s.open(work); err != nil {
		return err
	}
	if s.interactive {
		return s.converse(work)
	}
	err = s.read(work, a.stdin, "stdin")
	if errors.Is(err, errQuit) {
		err = nil
	}
	if err == nil && s.transaction != "none" {
		a.info("the transaction was not committed: it is rolled back")
	}
	return err
}

// open opens a session.
func (s *shell) open(ctx context.Context) error {
	r := &posternv1.OpenSQLSessionRequest{Agent: s.agent, Source: s.source}
	if s.options.idle > 0 {
		r.IdleTimeout = durationpb.New(s.options.idle)
	}
	resp, err := s.client.Sessions.OpenSession(ctx, connect.NewRequest(r))
	if err != nil {
		return err
	}
	s.session, s.transaction = resp.Msg.Session.GetId(), "none"
	engine, err := s.engine(ctx)
	if err != nil {
		return err
	}
	// What waits was fed by the rules of before: a source that has another engine now
	// gets its next statement from the beginning.
	if s.lines == nil || s.lines.Engine() != engine {
		s.lines = sqlsplit.New(engine)
	}
	return nil
}

// engine asks which engine the source has, whose rules say where a statement ends.
func (s *shell) engine(ctx context.Context) (sqlsplit.Engine, error) {
	resp, err := s.client.Sources.ListSources(ctx, connect.NewRequest(&posternv1.ListOrganizationSourcesRequest{Agent: s.agent}))
	if err != nil {
		return "", err
	}
	for _, o := range resp.Msg.Sources {
		if o.Source.GetName() != s.source {
			continue
		}
		engine, err := sqlsplit.ParseEngine(o.Source.Engine)
		if err != nil {
			return "", fmt.Errorf("data source %s/%s: %w: update postern", s.agent, s.source, err)
		}
		return engine, nil
	}
	return "", fmt.Errorf("data source %s/%s is not listed yet, and so its engine is not known: try again, or see postern source list", s.agent, s.source)
}

// leave closes the session; what goes wrong is left to its idle timeout.
func (s *shell) leave() {
	if s.out != nil {
		s.out.Close() //nolint:errcheck // what matters was written
	}
	if s.session == "" {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), leaveTime)
	defer cancel()
	s.client.Sessions.CloseSession(ctx, connect.NewRequest(&posternv1.CloseSQLSessionRequest{Agent: s.agent, SessionId: s.session})) //nolint:errcheck // see above
	s.session = ""
}

// converse reads from the terminal.
func (s *shell) converse(ctx context.Context) error {
	s.editor = liner.NewLiner()
	defer s.editor.Close() //nolint:errcheck // the terminal is as it was, or gone
	s.editor.SetCtrlCAborts(true)
	s.editor.SetMultiLineMode(true)
	s.editor.SetTabCompletionStyle(liner.TabPrints)
	s.editor.SetWordCompleter(s.complete)
	path, err := historyPath(s.app.getenv)
	if err != nil {
		path = "" // no home: a history for this once
	}
	s.history = loadHistory(path)
	for _, e := range s.history.entries {
		s.editor.AppendHistory(e)
	}
	defer func() {
		if err := s.history.save(); err != nil {
			s.app.info("postern: %v", err)
		}
	}()
	stop := s.signals()
	defer stop()
	s.app.info("%s/%s, type \\? for help, \\q or Ctrl-D to leave", safe(s.agent), safe(s.source))
	var aborted time.Time
	for {
		line, err := s.editor.Prompt(s.prompt())
		switch {
		case errors.Is(err, liner.ErrPromptAborted):
			if s.lines.Empty() && time.Since(aborted) < twice {
				return nil
			}
			aborted = time.Now()
			if s.lines.Empty() {
				s.app.info("Ctrl-C again, \\q or Ctrl-D to leave")
			}
			s.lines.Reset()
			continue
		case errors.Is(err, io.EOF):
			fmt.Fprintln(s.app.stdout) //nolint:errcheck // the terminal is gone otherwise
			return nil
		case err != nil:
			return fmt.Errorf("read from the terminal: %w", err)
		}
		aborted = time.Time{}
		first := s.lines.Empty()
		err = s.line(ctx, line+"\n", func(text string) {
			for _, e := range s.history.add(text) {
				s.editor.AppendHistory(e)
			}
		}, first)
		if errors.Is(err, errQuit) {
			return nil
		}
		if err != nil {
			s.app.report(ctx, err)
			if errors.Is(err, syscall.EIO) {
				return nil // the terminal is gone
			}
		}
	}
}

// prompt shows where we are, the transaction and what is open in the statement.
func (s *shell) prompt() string {
	mark := map[string]string{"open": "*", "failed": "!"}[s.transaction]
	return safe(s.agent) + "/" + safe(s.source) + mark + s.lines.Mark() + "> "
}

// signals makes Ctrl-C cancel the statement under way, and SIGTERM and SIGHUP leave
// in order. The function ends that.
func (s *shell) signals() (stop func()) {
	came := make(chan os.Signal, 4)
	signal.Notify(came, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-done:
				return
			case sig := <-came:
				s.mu.Lock()
				interrupt := s.interrupt
				s.mu.Unlock()
				if interrupt != nil {
					interrupt()
				}
				if sig != os.Interrupt {
					// The editor waits for a key: nothing else ends it.
					s.editor.Close()     //nolint:errcheck // we leave
					_ = s.history.save() // nobody is left to tell
					s.leave()
					os.Exit(proto.ExitFailed)
				}
			}
		}
	}()
	return func() {
		signal.Stop(came)
		close(done)
		<-ended
	}
}

// read runs a script until its end or its first error.
func (s *shell) read(ctx context.Context, r io.Reader, name string) error {
	in := bufio.NewReaderSize(r, 64<<10)
	for n := 1; ; n++ {
		text, err := readLine(in)
		if err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("read %s: %w", name, err)
		}
		end := errors.Is(err, io.EOF)
		if text != "" {
			if !utf8.ValidString(text) {
				return usagef("%s, line %d is not valid UTF-8: convert it, for example with iconv", name, n)
			}
			if err := s.line(ctx, text, func(string) {}, false); err != nil {
				return err
			}
		}
		if end {
			break
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	// The last statement needs no semicolon.
	if s.lines.Quoted() {
		return usagef("%s ends within quotes", name)
	}
	last := s.lines.Pending()
	s.lines.Reset()
	if last == "" {
		return nil
	}
	return s.statement(ctx, last, 0)
}

// readLine reads a line with its line break, at most as long as a statement may be.
func readLine(in *bufio.Reader) (string, error) {
	var b strings.Builder
	for {
		part, err := in.ReadSlice('\n')
		b.Write(part)
		if b.Len() > maxQuery+1 {
			return "", errors.New("a line has more than 1 MiB")
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return b.String(), err
		}
	}
}

// line takes one line: a command of ours, or a part of statements, which run when
// they are complete. keep is told what belongs into the history.
func (s *shell) line(ctx context.Context, text string, keep func(string), _ bool) error {
	if trimmed := strings.TrimSpace(text); strings.HasPrefix(trimmed, `\`) && s.lines.Open() == 0 {
		keep(strings.TrimRight(text, "\r\n"))
		return s.command(ctx, trimmed)
	}
	before := s.lines.Text()
	statements := s.lines.Feed(text)
	if s.lines.Len() > maxQuery {
		s.lines.Reset()
		return usagef("the statement has more than 1 MiB: load data in another way, or split it")
	}
	if s.lines.Empty() {
		keep(strings.TrimRight(before+text, "\r\n"))
	}
	for _, statement := range statements {
		if err := s.statement(ctx, statement, 0); err != nil {
			return err
		}
	}
	return nil
}

// statement runs one statement in the session, or asks for its plan.
func (s *shell) statement(ctx context.Context, text string, explain posternv1.Explain) error {
	if s.session == "" {
		if err := s.open(ctx); err != nil {
			return err
		}
	}
	dst := &destination{f: s.app.stdout, name: "stdout"}
	var paged *pager
	switch {
	case s.out != nil:
		dst = &destination{f: s.out, name: s.out.Name()}
	case s.interactive && s.pager:
		if paged = s.newPager(); paged != nil {
			dst.w = paged
		}
	}
	run := &sqlRun{
		app: s.app, client: s.client, agent: s.agent, source: s.source, format: s.format, expanded: s.expanded, dst: dst, quiet: !s.interactive,
		statement: &posternv1.RunSQLRequest{Sql: text, MaxRows: s.options.maxRows, SessionId: s.session, Explain: explain},
	}
	if s.options.timeout > 0 {
		run.statement.Timeout = durationpb.New(s.options.timeout)
	}
	for _, name := range sqlsplit.Placeholders(s.lines.Engine(), text) {
		if p := s.variables[name]; p != nil {
			run.statement.Parameters = append(run.statement.Parameters, p)
		}
	}
	start := time.Now()
	err := s.interruptible(ctx, run.do)
	took := time.Since(start)
	if paged != nil {
		if perr := paged.close(); err == nil && perr != nil {
			err = dst.failed(perr)
		} else if paged.left {
			err = nil // whoever leaves the pager has seen enough
		}
	}
	if paged != nil && paged.left {
		s.ask()
	}
	s.after(run, err)
	if s.timing && err == nil {
		s.app.info("Time: %s", roughly(took))
	}
	return err
}

// interruptible runs f so that Ctrl-C ends its context.
func (s *shell) interruptible(ctx context.Context, f func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s.mu.Lock()
	s.interrupt = cancel
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.interrupt = nil
		s.mu.Unlock()
	}()
	return f(ctx)
}

// after takes note of what became of the session.
func (s *shell) after(run *sqlRun, err error) {
	state := run.outcome.GetTransaction()
	var e *proto.Error
	switch {
	case state == "none", state == "open", state == "failed":
		s.transaction = state
	case state == "ended", errors.As(err, &e) && e.Code == proto.CodeNotFound && strings.Contains(e.Message, "session"):
		s.session, s.transaction = "", "none"
		if s.interactive {
			s.app.info("the session has ended with all that was in it: the next statement gets a new one")
		}
	case err != nil:
		s.ask()
	}
}

// ask finds out what the transaction is, after a statement whose end was not told.
func (s *shell) ask() {
	ctx, cancel := context.WithTimeout(context.Background(), cancelTime)
	defer cancel()
	for {
		resp, err := s.client.Sessions.ListSessions(ctx, connect.NewRequest(&posternv1.ListSQLSessionsRequest{Agent: s.agent}))
		if err != nil {
			return // offline: as it was, for all we know
		}
		found := false
		for _, open := range resp.Msg.Sessions {
			if open.Id == s.session {
				found = true
				s.transaction = open.Transaction
				if open.QueryId == "" {
					return
				}
			}
		}
		if !found {
			return // the next statement says so
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(50 * time.Millisecond):
		}
	}
}
