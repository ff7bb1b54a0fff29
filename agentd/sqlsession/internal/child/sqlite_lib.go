package child

import (
	"errors"
	"os"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
	"modernc.org/libc"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/filebroker"
)

// This file is the part of SQLite's C interface that we use, on the translation of
// SQLite to Go, without database/sql: the authorizer and the system calls of its file
// layer are ours.

// sqlitePath is what SQLite takes the database's name for. The real one is agentd's
// business.
const sqlitePath = "/database"

// The callbacks of SQLite are plain functions, so what they work with is the process's.
var (
	sqliteFiles *filebroker.Client
	sqliteAsked *sqliteDB
)

// pointer makes a C function pointer of a function that is no closure.
func pointer[T any](f T) uintptr { return *(*uintptr)(unsafe.Pointer(&struct{ f T }{f})) }

// addressed is what an address of SQLite's own memory, which Go does not move, points to.
func addressed(p uintptr) unsafe.Pointer { return *(*unsafe.Pointer)(unsafe.Pointer(&p)) }

// fileOf is the file that a path of SQLite's means.
func fileOf(path uintptr) (filebroker.File, bool) {
	switch strings.TrimPrefix(libc.GoString(path), sqlitePath) {
	case "":
		return filebroker.Database, true
	case "-journal":
		return filebroker.Journal, true
	case "-wal":
		return filebroker.WAL, true
	case "-shm":
		return filebroker.SharedMemory, true
	}
	return 0, false
}

// fail sets errno. Without agentd what is there can't be told from what is not, and a
// journal that is not seen makes data wrong: the process ends.
func fail(tls *libc.TLS, err error) int32 {
	if errors.Is(err, filebroker.ErrGone) {
		os.Exit(exitProtocol)
	}
	code := unix.EIO
	errors.As(err, &code)
	*(*int32)(addressed(libc.X__errno_location(tls))) = int32(code)
	return -1
}

func sqliteOpen(tls *libc.TLS, path uintptr, flags, _ int32) int32 {
	file, ok := fileOf(path)
	if !ok {
		return fail(tls, unix.EACCES)
	}
	fd, err := sqliteFiles.Open(file, int(flags))
	if err != nil {
		return fail(tls, err)
	}
	return int32(fd)
}

func sqliteStat(tls *libc.TLS, path, buffer uintptr) int32 {
	file, ok := fileOf(path)
	if !ok {
		return fail(tls, unix.ENOENT)
	}
	fd, err := sqliteFiles.Stat(file)
	if err != nil {
		return fail(tls, err)
	}
	defer func() { _ = unix.Close(fd) }()
	return libc.Xfstat(tls, int32(fd), buffer)
}

// sqliteLstat is asked for each part of a path, to find symbolic links.
func sqliteLstat(tls *libc.TLS, _, _ uintptr) int32 { return fail(tls, unix.ENOENT) }

func sqliteAccess(tls *libc.TLS, path uintptr, mode int32) int32 {
	file, ok := fileOf(path)
	if !ok {
		return fail(tls, unix.ENOENT)
	}
	flags := unix.O_RDONLY
	if mode&unix.W_OK != 0 {
		flags = unix.O_RDWR
	}
	fd, err := sqliteFiles.Open(file, flags)
	if err != nil {
		return fail(tls, err)
	}
	_ = unix.Close(fd)
	return 0
}

func sqliteUnlink(tls *libc.TLS, path uintptr) int32 {
	file, ok := fileOf(path)
	if !ok {
		return fail(tls, unix.EACCES)
	}
	if err := sqliteFiles.Unlink(file); err != nil {
		return fail(tls, err)
	}
	return 0
}

func sqliteOpenDirectory(_ *libc.TLS, _, out uintptr) int32 {
	fd, err := sqliteFiles.Dir()
	if err != nil {
		return sqlite3.SQLITE_CANTOPEN
	}
	*(*int32)(addressed(out)) = int32(fd)
	return sqlite3.SQLITE_OK
}

// sqliteRefuseCall stands for the calls that nothing of ours needs.
func sqliteRefuseCall(tls *libc.TLS, _ uintptr, _ int32) int32 { return fail(tls, unix.EACCES) }

// sqliteHeap bounds what SQLite allocates, in bytes: a statement that needs more fails.
const sqliteHeap = 512 << 20

// startSQLite sets up the library, once in the process.
func startSQLite(tls *libc.TLS) error {
	// Without counting there is no limit on memory.
	at := tls.Alloc(16)
	defer tls.Free(16)
	if rc := sqlite3.Xsqlite3_config(tls, sqlite3.SQLITE_CONFIG_MEMSTATUS, libc.VaList(at, int32(1))); rc != sqlite3.SQLITE_OK {
		return errors.New("SQLite does not count its memory")
	}
	if rc := sqlite3.Xsqlite3_initialize(tls); rc != sqlite3.SQLITE_OK {
		return errors.New("SQLite does not start")
	}
	sqlite3.Xsqlite3_hard_heap_limit64(tls, sqliteHeap)
	vfs := sqlite3.Xsqlite3_vfs_find(tls, 0)
	if vfs == 0 {
		return errors.New("SQLite has no file layer")
	}
	set := (*(*func(*libc.TLS, uintptr, uintptr, uintptr) int32)(unsafe.Pointer(&struct{ uintptr }{(*sqlite3.Tsqlite3_vfs)(addressed(vfs)).FxSetSystemCall})))
	for name, call := range map[string]uintptr{
		"open": pointer(sqliteOpen), "stat": pointer(sqliteStat), "lstat": pointer(sqliteLstat), "access": pointer(sqliteAccess),
		"unlink": pointer(sqliteUnlink), "openDirectory": pointer(sqliteOpenDirectory), "mkdir": pointer(sqliteRefuseCall),
	} {
		text, err := libc.CString(name)
		if err != nil {
			return err
		}
		rc := set(tls, vfs, text, call)
		libc.Xfree(tls, text)
		if rc != sqlite3.SQLITE_OK {
			return errors.New("SQLite's file layer has no " + name)
		}
	}
	return nil
}

// sqliteDB is an open database. Its methods belong to one goroutine at a time, but for
// interrupt.
type sqliteDB struct {
	tls *libc.TLS
	db  uintptr
	// judge decides on what a statement does while it is compiled; nil: all is ours.
	judge func(action int32, a, b, schema, trigger string) bool
	// waiting is asked while another process holds a lock: go on waiting?
	waiting func() bool
}

// sqliteError is what SQLite says of a call that failed.
type sqliteError struct {
	code    int32 // extended
	message string
	offset  int // in bytes of the statement's text, below 0: unknown
}

func (e *sqliteError) Error() string { return e.message }

func openSQLite(tls *libc.TLS, readWrite bool) (*sqliteDB, error) {
	name, err := libc.CString(sqlitePath)
	if err != nil {
		return nil, err
	}
	defer libc.Xfree(tls, name)
	at := tls.Alloc(8)
	defer tls.Free(8)
	flags := int32(sqlite3.SQLITE_OPEN_READONLY)
	if readWrite {
		flags = sqlite3.SQLITE_OPEN_READWRITE
	}
	rc := sqlite3.Xsqlite3_open_v2(tls, name, at, flags|sqlite3.SQLITE_OPEN_NOMUTEX|sqlite3.SQLITE_OPEN_EXRESCODE|sqlite3.SQLITE_OPEN_PRIVATECACHE, 0)
	d := &sqliteDB{tls: tls, db: *(*uintptr)(addressed(at))}
	if rc != sqlite3.SQLITE_OK {
		failure := d.failure(rc)
		d.close()
		return nil, failure
	}
	for _, option := range []struct{ op, value int32 }{
		{sqlite3.SQLITE_DBCONFIG_DEFENSIVE, 1},
		{sqlite3.SQLITE_DBCONFIG_TRUSTED_SCHEMA, 0},
		{sqlite3.SQLITE_DBCONFIG_ENABLE_LOAD_EXTENSION, 0},
		{sqlite3.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1},
		{sqlite3.SQLITE_DBCONFIG_WRITABLE_SCHEMA, 0},
	} {
		at := tls.Alloc(24)
		rc := sqlite3.Xsqlite3_db_config(tls, d.db, option.op, libc.VaList(at, option.value, uintptr(0)))
		tls.Free(24)
		if rc != sqlite3.SQLITE_OK {
			d.close()
			return nil, errors.New("SQLite can't be set up safely")
		}
	}
	for id, limit := range map[int32]int32{
		sqlite3.SQLITE_LIMIT_ATTACHED: 0, sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0, sqlite3.SQLITE_LIMIT_LENGTH: 256 << 20,
		sqlite3.SQLITE_LIMIT_SQL_LENGTH: 5 << 20, sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 100,
	} {
		sqlite3.Xsqlite3_limit(tls, d.db, id, limit)
	}
	sqliteAsked = d
	sqlite3.Xsqlite3_set_authorizer(tls, d.db, pointer(sqliteAuthorize), 0)
	sqlite3.Xsqlite3_busy_handler(tls, d.db, pointer(sqliteBusy), 0)
	return d, nil
}

func sqliteAuthorize(_ *libc.TLS, _ uintptr, action int32, a, b, schema, trigger uintptr) int32 {
	judge := sqliteAsked.judge
	if judge == nil || judge(action, libc.GoString(a), libc.GoString(b), libc.GoString(schema), libc.GoString(trigger)) {
		return sqlite3.SQLITE_OK
	}
	return sqlite3.SQLITE_DENY
}

// sqliteBusy is called when somebody else holds a lock.
func sqliteBusy(_ *libc.TLS, _ uintptr, count int32) int32 {
	if sqliteAsked.waiting == nil || !sqliteAsked.waiting() {
		return 0
	}
	time.Sleep(min(time.Duration(count+1)*time.Millisecond, 25*time.Millisecond))
	return 1
}

func (d *sqliteDB) failure(rc int32) error {
	e := &sqliteError{code: rc, offset: -1, message: libc.GoString(sqlite3.Xsqlite3_errstr(d.tls, rc))}
	if d.db != 0 {
		e.code = sqlite3.Xsqlite3_extended_errcode(d.tls, d.db)
		e.message = libc.GoString(sqlite3.Xsqlite3_errmsg(d.tls, d.db))
		e.offset = int(sqlite3.Xsqlite3_error_offset(d.tls, d.db))
	}
	return e
}

// close ends the connection. It may be called again.
func (d *sqliteDB) close() {
	if d.db != 0 {
		sqlite3.Xsqlite3_close_v2(d.tls, d.db)
		d.db = 0
	}
}

// interrupt ends what is under way, from any goroutine.
func (d *sqliteDB) interrupt() {
	if d.db == 0 {
		return
	}
	tls := libc.NewTLS()
	defer tls.Close()
	sqlite3.Xsqlite3_interrupt(tls, d.db)
}

// idle tells whether no transaction is open.
func (d *sqliteDB) idle() bool { return sqlite3.Xsqlite3_get_autocommit(d.tls, d.db) != 0 }

// changes is how many rows the last statement that writes has changed.
func (d *sqliteDB) changes() int64 { return sqlite3.Xsqlite3_changes64(d.tls, d.db) }

// sqliteStatement is a compiled statement.
type sqliteStatement struct {
	*sqliteDB
	stmt uintptr
	held []uintptr // memory of bound values
}

// prepare compiles the first statement of text; rest is what follows it. A nil
// statement is one that says nothing.
func (d *sqliteDB) prepare(text string) (s *sqliteStatement, rest string, err error) {
	sql, err := libc.CString(text)
	if err != nil {
		return nil, "", err
	}
	defer libc.Xfree(d.tls, sql)
	at := d.tls.Alloc(16)
	defer d.tls.Free(16)
	if rc := sqlite3.Xsqlite3_prepare_v3(d.tls, d.db, sql, int32(len(text))+1, 0, at, at+8); rc != sqlite3.SQLITE_OK {
		return nil, "", d.failure(rc)
	}
	stmt := *(*uintptr)(addressed(at))
	tail := *(*uintptr)(addressed(at + 8))
	rest = text[min(len(text), int(tail-sql)):]
	if stmt == 0 {
		return nil, rest, nil
	}
	return &sqliteStatement{sqliteDB: d, stmt: stmt}, rest, nil
}

// finalize lets go of the statement, whatever became of it.
func (s *sqliteStatement) finalize() {
	sqlite3.Xsqlite3_finalize(s.tls, s.stmt)
	for _, p := range s.held {
		libc.Xfree(s.tls, p)
	}
}

// reset ends the statement's run.
func (s *sqliteStatement) reset() { sqlite3.Xsqlite3_reset(s.tls, s.stmt) }

func (s *sqliteStatement) readOnly() bool { return sqlite3.Xsqlite3_stmt_readonly(s.tls, s.stmt) != 0 }

func (s *sqliteStatement) explains() bool {
	return sqlite3.Xsqlite3_stmt_isexplain(s.tls, s.stmt) != 0
}

func (s *sqliteStatement) parameters() int {
	return int(sqlite3.Xsqlite3_bind_parameter_count(s.tls, s.stmt))
}

func (s *sqliteStatement) columns() int { return int(sqlite3.Xsqlite3_column_count(s.tls, s.stmt)) }

func (s *sqliteStatement) columnName(i int) string {
	return libc.GoString(sqlite3.Xsqlite3_column_name(s.tls, s.stmt, int32(i)))
}

// declared is the type that the table's definition gives the column; real tells
// whether it is a column of a table at all, and no expression.
func (s *sqliteStatement) declared(i int) (declared string, real bool) {
	origin := sqlite3.Xsqlite3_column_origin_name(s.tls, s.stmt, int32(i))
	return libc.GoString(sqlite3.Xsqlite3_column_decltype(s.tls, s.stmt, int32(i))), origin != 0
}

// bind sets parameter i, from 1.
func (s *sqliteStatement) bind(i int, value any) error {
	rc := int32(sqlite3.SQLITE_OK)
	switch v := value.(type) {
	case nil:
		rc = sqlite3.Xsqlite3_bind_null(s.tls, s.stmt, int32(i))
	case int64:
		rc = sqlite3.Xsqlite3_bind_int64(s.tls, s.stmt, int32(i), v)
	case float64:
		rc = sqlite3.Xsqlite3_bind_double(s.tls, s.stmt, int32(i), v)
	case string:
		p, err := libc.CString(v)
		if err != nil {
			return err
		}
		s.held = append(s.held, p)
		rc = sqlite3.Xsqlite3_bind_text(s.tls, s.stmt, int32(i), p, int32(len(v)), sqlite3.SQLITE_STATIC)
	}
	if rc != sqlite3.SQLITE_OK {
		return s.failure(rc)
	}
	return nil
}

// step runs the statement to its next row; more is false at the end.
func (s *sqliteStatement) step() (more bool, err error) {
	switch rc := sqlite3.Xsqlite3_step(s.tls, s.stmt); rc {
	case sqlite3.SQLITE_ROW:
		return true, nil
	case sqlite3.SQLITE_DONE:
		return false, nil
	default:
		return false, s.failure(rc)
	}
}

// kind is the storage class of a value of the row: SQLITE_INTEGER and so on.
func (s *sqliteStatement) kind(i int) int32 {
	return sqlite3.Xsqlite3_column_type(s.tls, s.stmt, int32(i))
}

func (s *sqliteStatement) integer(i int) int64 {
	return sqlite3.Xsqlite3_column_int64(s.tls, s.stmt, int32(i))
}

func (s *sqliteStatement) real(i int) float64 {
	return sqlite3.Xsqlite3_column_double(s.tls, s.stmt, int32(i))
}

// bytes is a text or blob, valid until the next step.
func (s *sqliteStatement) bytes(i int) []byte {
	var p uintptr
	if s.kind(i) == sqlite3.SQLITE_TEXT {
		p = sqlite3.Xsqlite3_column_text(s.tls, s.stmt, int32(i)) // also of a database in UTF-16
	} else {
		p = sqlite3.Xsqlite3_column_blob(s.tls, s.stmt, int32(i))
	}
	n := int(sqlite3.Xsqlite3_column_bytes(s.tls, s.stmt, int32(i)))
	if p == 0 || n == 0 {
		return []byte{}
	}
	return unsafe.Slice((*byte)(addressed(p)), n)
}

// exec runs a statement of ours and returns its rows as text; NULL is "".
func (d *sqliteDB) exec(text string, args ...string) ([][]string, error) {
	judge := d.judge
	d.judge = nil
	defer func() { d.judge = judge }()
	s, _, err := d.prepare(text)
	if err != nil || s == nil {
		return nil, err
	}
	defer s.finalize()
	for i, a := range args {
		if err := s.bind(i+1, a); err != nil {
			return nil, err
		}
	}
	var rows [][]string
	for {
		more, err := s.step()
		if err != nil || !more {
			return rows, err
		}
		row := make([]string, s.columns())
		for i := range row {
			row[i] = string(s.text(i))
		}
		rows = append(rows, row)
	}
}

// text is a value as SQLite writes it.
func (s *sqliteStatement) text(i int) []byte {
	p := sqlite3.Xsqlite3_column_text(s.tls, s.stmt, int32(i))
	n := int(sqlite3.Xsqlite3_column_bytes(s.tls, s.stmt, int32(i)))
	if p == 0 || n == 0 {
		return nil
	}
	return append([]byte(nil), unsafe.Slice((*byte)(addressed(p)), n)...)
}
