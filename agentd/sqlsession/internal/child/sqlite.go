package child

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
	"modernc.org/libc"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/postern-dev/postern/agentd/confine"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/filebroker"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/sqltext"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// ParseSQLiteDSN reads path=/srv/data/app.db, the only key there is.
func ParseSQLiteDSN(dsn string) (path string, err error) {
	pairs, err := parsePairs(dsn, "path")
	if err != nil {
		return "", err
	}
	if pairs["path"] == "" {
		return "", errors.New("the dsn names no file: write path=/srv/data/app.db")
	}
	return pairs["path"], filebroker.CheckPath(pairs["path"])
}

// openFiles uses what the process was given: for this engine it leads to who opens the
// database's files.
func openFiles() error {
	given, ok := beside.(syscall.Conn)
	if !ok {
		return errors.New("agentd has given no way to them")
	}
	raw, err := given.SyscallConn()
	if err != nil {
		return err
	}
	var problem error
	err = raw.Control(func(fd uintptr) {
		var own int
		if own, problem = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 5); problem == nil {
			problem = unix.SetNonblock(own, false)
		}
		if problem == nil {
			sqliteFiles, problem = filebroker.NewClient(own)
		}
	})
	return errors.Join(err, problem)
}

// sqliteSession is the process's one connection to a SQLite database.
type sqliteSession struct {
	sink      *sink
	path      string
	readWrite bool
	db        *sqliteDB
	version   string
	inode     uint64
	// running is the statement under way.
	running atomic.Pointer[statement]
	// interrupting keeps db from being closed under an interrupt.
	interrupting sync.Mutex
	// masking is that of the last statement.
	masking *masking
	// stay is set in a session that stays open; broken ends it.
	stay   *sqliteStay
	broken bool
}

func connectSQLite(_ context.Context, r *frame.ConnectRequest, out *sink, _ pgtree.Parser) (engine, *proto.Error) {
	path, err := ParseSQLiteDSN(r.DSN)
	if err != nil {
		return nil, proto.Errorf(proto.CodeSourceConfig, "%w", err)
	}
	if err := openFiles(); err != nil {
		return nil, proto.Errorf(proto.CodeInternal, "the files of the database can't be asked for: %w", err)
	}
	// Its files are written, the others' descriptors are agentd's to give.
	if err := allowWriting(); err != nil {
		return nil, proto.Errorf(proto.CodeInternal, "%w", err)
	}
	s := &sqliteSession{sink: out, path: path, readWrite: r.ReadWrite}
	tls := libc.NewTLS()
	if err := startSQLite(tls); err != nil {
		return nil, proto.Errorf(proto.CodeInternal, "%w", err)
	}
	s.version = libc.GoString(sqlite3.Xsqlite3_libversion(tls))
	// All that it does from now on it does with what it is given.
	if err := confine.ForbidAll(); err != nil {
		return nil, proto.Errorf(proto.CodeInternal, "%w", err)
	}
	if s.inode, err = sqliteInode(); err != nil {
		return nil, s.openError(err)
	}
	if s.db, err = openSQLite(tls, r.ReadWrite); err != nil {
		return nil, s.openError(err)
	}
	s.db.waiting = func() bool {
		st := s.running.Load()
		return st != nil && !st.isStopped() && time.Since(st.started) < maxLockTimeout
	}
	st := newStatement(s.cancel)
	s.running.Store(st)
	defer s.running.Store(nil)
	for _, pragma := range []string{"PRAGMA temp_store = MEMORY", "PRAGMA cell_size_check = ON", "PRAGMA trusted_schema = OFF", "PRAGMA foreign_keys = ON", "SELECT COUNT(*) FROM sqlite_schema"} {
		if _, err := s.db.exec(pragma); err != nil {
			failure := s.openError(err)
			s.db.close()
			return nil, failure
		}
	}
	if !r.ReadWrite {
		if _, err := s.db.exec("PRAGMA query_only = ON"); err != nil {
			return nil, s.openError(err)
		}
	}
	return s, nil
}

// sqliteInode tells one file from another of the same name.
func sqliteInode() (uint64, error) {
	fd, err := sqliteFiles.Stat(filebroker.Database)
	if err != nil {
		return 0, err
	}
	defer func() { _ = unix.Close(fd) }()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, err
	}
	return st.Ino, nil
}

// openError says why the database can't be used.
func (s *sqliteSession) openError(err error) *proto.Error {
	var code unix.Errno
	if errors.As(err, &code) {
		what := "agentd can't open it: " + code.Error()
		if code == unix.ENOENT {
			what = "there is no such file"
		}
		return proto.Errorf(proto.CodeSourceUnreachable, "the SQLite database %s: %s", s.path, what)
	}
	var e *sqliteError
	if !errors.As(err, &e) {
		return proto.Errorf(proto.CodeSourceUnreachable, "the SQLite database %s: %s", s.path, clean(err.Error()))
	}
	switch e.code & 0xff {
	case sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT:
		return proto.Errorf(proto.CodeSourceConfig, "%s is no SQLite database, or a damaged one: %s", s.path, clean(e.message))
	case sqlite3.SQLITE_BUSY:
		return proto.Errorf(proto.CodeOverloaded, "the SQLite database %s is locked by another process: try again later", s.path)
	}
	return proto.Errorf(proto.CodeSourceUnreachable, "the SQLite database %s can't be opened: %s", s.path, s.explain(e))
}

// explain is SQLite's message, with what to do where that is known.
func (s *sqliteSession) explain(e *sqliteError) string {
	switch e.code {
	case sqlite3.SQLITE_READONLY_ROLLBACK, sqlite3.SQLITE_READONLY_RECOVERY:
		return "a program that wrote to it broke off in the middle: open it once with one that may write"
	case sqlite3.SQLITE_NOMEM:
		return fmt.Sprintf("the statement needs more than %d MiB of memory", sqliteHeap>>20)
	}
	return clean(e.message)
}

func (s *sqliteSession) about() frame.ConnectedReply { return frame.ConnectedReply{Version: s.version} }

func (s *sqliteSession) name() string { return "the SQLite database " + s.path }

func (s *sqliteSession) close() {
	s.interrupting.Lock()
	defer s.interrupting.Unlock()
	s.db.close()
}

func (s *sqliteSession) cancel(context.Context) error {
	s.interrupting.Lock()
	defer s.interrupting.Unlock()
	s.db.interrupt()
	return nil
}

// watch is engine's: there is no connection that could end.
func (s *sqliteSession) watch(stop <-chan struct{}) error {
	<-stop
	return nil
}

func (s *sqliteSession) reset() error {
	s.db.judge = nil
	if s.broken {
		return errors.New("what is open in the session is not certain")
	}
	if s.stay != nil {
		return nil // settled already
	}
	return s.rollBack()
}

// rollBack ends a transaction of ours, if one is open.
func (s *sqliteSession) rollBack() error {
	if !s.db.idle() {
		if _, err := s.db.exec("ROLLBACK"); err != nil && !s.db.idle() {
			return err
		}
	}
	return nil
}

// run is engine's.
func (s *sqliteSession) run(r *frame.RunRequest, st *statement) (done frame.DoneReply, lost bool) {
	s.running.Store(st)
	defer s.running.Store(nil)
	timer := time.AfterFunc(time.Duration(r.TimeoutMillis)*time.Millisecond, func() { st.stop(frame.TimedOut) })
	defer timer.Stop()
	if inode, err := sqliteInode(); err != nil || inode != s.inode {
		// The file was replaced: a new process opens the new one.
		if err == nil {
			err = errors.New("the file was replaced")
		}
		return frame.DoneReply{Error: frame.FromError(s.openError(err))}, true
	}
	x := &sqliteExecution{sqliteSession: s, request: r, st: st, guard: &sqliteGuard{policy: &r.Guard, readWrite: r.ReadWrite, session: r.Session}}
	masking, failure := masksOf(&s.masking, &r.Guard)
	if failure == nil {
		x.guard.readings = newReadings(masking, &r.Guard)
		failure = x.execute()
	}
	s.db.judge = nil
	if !x.explicit && !x.begins {
		// Other programs wait for the lock: it goes before the answer does.
		if err := s.rollBack(); err != nil {
			s.broken = r.Session
			if failure == nil {
				failure = x.failure(err)
			}
		}
	}
	if r.Session {
		x.settle(failure)
		x.done.Transaction = s.transaction()
	}
	masking.scrubReply(&x.done, failure)
	x.done.Error = frame.FromError(failure)
	return x.done, false
}

// sqliteExecution is one statement on its way.
type sqliteExecution struct {
	*sqliteSession
	request *frame.RunRequest
	st      *statement
	text    *sqltext.Statement
	guard   *sqliteGuard
	done    frame.DoneReply
	// What follows is for sessions that stay: see interact. explicit tells that a
	// transaction of the user's is open, begins and ends that the statement begins or
	// ends it, begun that it is on its way.
	explicit, begins, ends, begun bool
}

func (x *sqliteExecution) execute() *proto.Error {
	r := x.request
	metadata := r.Guard.Mode == modeMetadata
	if failure := x.unenforced(); failure != nil {
		return failure
	}
	if r.Explain != "" || len(r.Indexes) > 0 {
		if failure := x.planRefused(); failure != nil {
			return failure
		}
	}
	values := make([]sqltext.Value, len(r.Parameters))
	for i, p := range r.Parameters {
		values[i] = sqltext.Value{Name: p.Name, Text: p.Value, Type: p.Type}
	}
	dialect := *sqltext.SQLite
	dialect.Loose = metadata
	var err error
	if x.text, err = dialect.Bind(r.SQL, values); err != nil {
		return proto.Errorf(proto.CodeInvalid, "%w", err)
	}
	if strings.ContainsRune(x.text.Text, 0) || !utf8.ValidString(x.text.Text) {
		return denied(0, "the statement holds a NUL character, or is not valid UTF-8")
	}
	arguments, failure := argumentValues(x.text.Args)
	if failure != nil {
		return failure
	}
	if r.Session {
		if metadata {
			return denied(0, "the data source is in mode metadata, in which no statement runs: sessions make no sense")
		}
		if done, failure := x.interact(len(arguments)); done {
			return failure
		}
	}
	if keyword := strings.ToLower(sqltext.FirstWord(&dialect, r.SQL)); keyword == "explain" {
		return explainRefused()
	}
	x.db.judge = x.guard.judge
	s, failure := x.prepare(len(arguments))
	if failure != nil {
		return failure
	}
	defer s.finalize()
	if r.Explain != "" {
		return x.plan(s)
	}
	if metadata {
		return x.describe(s)
	}
	if x.guard.readings != nil {
		if failure := x.writesMasked(s); failure != nil {
			return failure
		}
		x.guard.readings.running = true
	}
	begin := "BEGIN"
	if !s.readOnly() {
		begin = "BEGIN IMMEDIATE"
	}
	if !x.explicit {
		if _, err := x.db.exec(begin); err != nil {
			return x.failure(err)
		}
	}
	for i, a := range arguments {
		if err := s.bind(i+1, a.Value); err != nil {
			return x.failure(err)
		}
	}
	if x.st.isStopped() {
		return stopError(x.st.stopReason(), r)
	}
	if err := x.sink.send(frame.Begun, nil); err != nil {
		return proto.Errorf(proto.CodeInternal, "%w", err)
	}
	x.begun = true
	c := &sqliteCursor{s: s}
	if err := c.first(); err != nil {
		return x.failure(err)
	}
	if failure := x.hide(c); failure != nil {
		return failure
	}
	x.masking.look(c.fields)
	f := newFeed(x.sink, r, x.st, c.fields, c)
	err = f.run()
	switch reason := x.st.stopReason(); {
	case f.value != nil:
		failure = proto.Errorf(proto.CodeInvalid, "%w", f.value)
	case err != nil:
		failure = x.failure(err)
	case reason != 0:
		failure = stopError(reason, r)
	}
	changed := x.db.changes()
	s.reset()
	if failure == nil && r.ReadWrite {
		if err := x.commit(); err != nil {
			failure = x.failure(err)
		} else if s.columns() == 0 {
			x.done.Tag = strings.ToUpper(sqltext.FirstWord(&dialect, r.SQL))
			if slices.Contains([]string{"INSERT", "UPDATE", "DELETE", "REPLACE", "WITH"}, x.done.Tag) {
				x.done.Tag += fmt.Sprintf(" %d", changed)
			}
		}
	}
	x.done.Rows, failure = f.end(failure)
	return failure
}

// commit ends a transaction of ours.
func (x *sqliteExecution) commit() error {
	if x.explicit {
		return nil
	}
	_, err := x.db.exec("COMMIT")
	return err
}

func (x *sqliteExecution) unenforced() *proto.Error {
	g, what := &x.request.Guard, ""
	switch {
	case g.Mode != "" && g.Mode != modeMetadata && g.Mode != "read-only" && g.Mode != "read-write":
		what = "a mode that is not understood"
	case x.request.ReadWrite && !x.readWrite:
		what = "mode read-only"
	case !slices.Contains([]string{"", "off", plansStructure, plansFull}, g.Plans):
		what = "plans: " + g.Plans + ", which is not supported for SQLite"
	default:
		return checkColumnMasks(g, "SQLite")
	}
	return denied(0, "the statement is refused: the data source's policy has %s", what)
}

// prepare compiles the statement, and refuses what the policy does not allow.
func (x *sqliteExecution) prepare(arguments int) (*sqliteStatement, *proto.Error) {
	s, rest, err := x.db.prepare(x.text.Text)
	if err != nil {
		return nil, x.failure(err)
	}
	if s == nil {
		if strings.TrimLeft(rest, " \t\r\n;") != "" && sqltext.FirstWord(sqltext.SQLite, rest) != "" {
			return nil, denied(0, "the text has more than one statement: send them one by one")
		}
		return nil, proto.Errorf(proto.CodeInvalid, "the statement is empty")
	}
	refuse := func(failure *proto.Error) (*sqliteStatement, *proto.Error) {
		s.finalize()
		return nil, failure
	}
	switch more := sqltext.FirstWord(sqltext.SQLite, rest); {
	case more != "" || strings.ContainsFunc(sqliteWithoutComments(rest), func(c rune) bool { return !strings.ContainsRune(" \t\r\n\f;", c) }):
		return refuse(denied(0, "the text has more than one statement: send them one by one"))
	case s.explains():
		return refuse(explainRefused())
	case !s.readOnly() && !x.request.ReadWrite:
		return refuse(denied(0, "the statement is refused: the data source is read-only"))
	case s.parameters() != arguments:
		return refuse(proto.Errorf(proto.CodeInvalid, "the statement has %d parameters, and %d values are given", s.parameters(), arguments))
	}
	return s, nil
}

// sqliteWithoutComments is what of a text is no comment.
func sqliteWithoutComments(text string) string {
	var out strings.Builder
	for p := range sqltext.SQLite.Pieces(text) {
		if p.Kind != sqltext.KindComment {
			out.WriteString(p.Text)
		}
	}
	return out.String()
}

// describe answers on a source in mode metadata: the statement was compiled, and is not
// run.
func (x *sqliteExecution) describe(s *sqliteStatement) *proto.Error {
	if x.st.isStopped() {
		return stopError(x.st.stopReason(), x.request)
	}
	if err := x.sink.send(frame.Begun, nil); err != nil {
		return proto.Errorf(proto.CodeInternal, "%w", err)
	}
	c := &sqliteCursor{s: s, ended: true}
	c.describe()
	for _, a := range x.text.Args {
		x.done.Parameters = append(x.done.Parameters, frame.ParameterInfo{Name: a.Name})
	}
	f := newFeed(x.sink, x.request, x.st, c.fields, c)
	x.done.Tag = describeTag
	_, failure := f.end(nil)
	return failure
}

// failure turns what SQLite said into our words.
func (x *sqliteExecution) failure(err error) *proto.Error {
	var e *sqliteError
	if !errors.As(err, &e) {
		return proto.Errorf(proto.CodeInternal, "%w", err)
	}
	metadata := x.request.Guard.Mode == modeMetadata
	switch e.code & 0xff {
	case sqlite3.SQLITE_AUTH:
		reason := x.guard.reason
		if reason == "" {
			reason = "the statement is refused"
		}
		return denied(0, "%s", reason)
	case sqlite3.SQLITE_INTERRUPT:
		if reason := x.st.stopReason(); reason != 0 {
			return stopError(reason, x.request)
		}
	case sqlite3.SQLITE_READONLY:
		if !x.request.ReadWrite && e.code == sqlite3.SQLITE_READONLY {
			return denied(0, "the statement is refused: the data source is read-only")
		}
	case sqlite3.SQLITE_BUSY:
		if reason := x.st.stopReason(); reason != 0 {
			return stopError(reason, x.request)
		}
		return proto.Errorf(proto.CodeOverloaded, "the database is locked by another process: try again later")
	case sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB:
		return x.openError(err)
	}
	position := 0
	if x.text != nil && e.offset >= 0 && e.offset <= len(x.text.Text) {
		position = x.text.Position(utf8.RuneCountInString(x.text.Text[:e.offset]) + 1)
	}
	message := x.explain(e)
	if x.begun && x.guard.readings != nil && len(x.guard.readings.columns) > 0 && (e.code&0xff != sqlite3.SQLITE_CONSTRAINT || e.code == sqlite3.SQLITE_CONSTRAINT_TRIGGER) && e.code != sqlite3.SQLITE_NOMEM {
		message, position = "the reason is not told, as it may hold a masked value", 0
	}
	if metadata {
		message = clean(e.message) // of the text alone: nothing was run
	}
	full := fmt.Sprintf("the database refused the statement: %s (SQLite code %d", message, e.code)
	if position > 0 {
		full += fmt.Sprintf(", position %d", position)
	}
	return &proto.Error{Code: proto.CodeSQL, Message: full + ")", SQL: &posternv1.SQLErrorDetail{Sqlstate: "HY000", Position: int32(position)}}
}

// check is engine's.
func (s *sqliteSession) check() (checks []frame.CheckResult, ok bool) {
	checks = append(checks,
		frame.CheckResult{Name: "reachable", Result: resultOK, Message: "agentd opens " + s.path},
		frame.CheckResult{Name: "version", Result: resultOK, Message: "SQLite " + s.version},
	)
	readOnly := frame.CheckResult{Name: "read-only", Result: resultOK, Message: "the file is open for reading alone"}
	if s.readWrite {
		readOnly.Message = "the source may write: statements that only read run in a transaction that is rolled back"
	}
	checks = append(checks, readOnly)
	c := frame.CheckResult{Name: "file", Result: resultOK}
	mode, err := s.db.exec("PRAGMA journal_mode")
	if err == nil {
		_, err = s.db.exec("SELECT COUNT(*) FROM sqlite_schema")
	}
	switch {
	case err != nil:
		c.Result, c.Message, c.Remedy = resultFailed, "the database can't be read: "+clean(err.Error()), "look at the file with a program that may write"
	case len(mode) == 1:
		c.Message = "the database can be read, its journal mode is " + clean(mode[0][0])
	}
	return append(checks, c), err == nil
}
