package child

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"

	"github.com/go-sql-driver/mysql"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/mysqlguard"
	"github.com/postern-dev/postern/proto"
)

// mysqlStay is what a session that stays open has beside the server's own state.
type mysqlStay struct {
	// failed says why the transaction is over although the user has not ended it: until
	// ROLLBACK nothing runs, as it would run outside of what it was meant for.
	failed string
	// isolation is what SET TRANSACTION said of the next transaction, as SQL.
	isolation string
	// writes tells that the transaction was begun READ WRITE.
	writes bool
	// timeout is the user's own limit in milliseconds; 0 is none.
	timeout int64
	// unsure tells that the last statement failed or was cancelled: another cancel may
	// be on its way.
	unsure bool
}

const (
	stateActiveTransaction = "25001"
	idleTransaction        = "the transaction was rolled back, as it was idle for too long: say ROLLBACK, then begin again"
)

// Flags of the driver's status, which the server sends with every answer but errors.
const (
	mysqlInTransaction         = 1 << 0
	mysqlInReadOnlyTransaction = 1 << 13
)

// status is what the server said last of the connection's transaction.
func (s *mysqlSession) status() uint64 {
	v := reflect.ValueOf(s.conn)
	if v.Kind() != reflect.Pointer || v.Elem().Kind() != reflect.Struct {
		return 0
	}
	// A driver that keeps it elsewhere is found out when a session is opened: see remain.
	f := v.Elem().FieldByName("status")
	if !f.IsValid() || !f.CanUint() {
		return 0
	}
	return f.Uint()
}

// inTransaction tells whether a transaction is open: one of the user's, between
// statements.
func (s *mysqlSession) inTransaction() bool { return s.status()&mysqlInTransaction != 0 }

// remain makes the session one that stays. It makes sure, once, that what the server says
// of transactions is heard: all else rests on it.
func (s *mysqlSession) remain(ctx context.Context) error {
	if s.stay != nil {
		return nil
	}
	if err := s.tell(ctx, "START TRANSACTION READ ONLY"); err != nil {
		return err
	}
	begun := s.status()
	if err := s.tell(ctx, "ROLLBACK"); err != nil {
		return err
	}
	if begun&mysqlInTransaction == 0 || begun&mysqlInReadOnlyTransaction == 0 || s.inTransaction() {
		return errors.New("the server does not tell of its transactions as MySQL and MariaDB do: sessions that stay open are not supported with it")
	}
	s.stay = &mysqlStay{}
	return nil
}

// interact does what only a session that stays does. done tells that the statement is
// over; else it goes on as any other, perhaps as x.verb.
func (x *mysqlExecution) interact(ctx context.Context, arguments int) (done bool, failure *proto.Error, lost bool) {
	if err := x.remain(ctx); err != nil {
		if isBroken(err) {
			return true, x.broken(err), true
		}
		return true, proto.Errorf(proto.CodeSourceConfig, "%s", clean(err.Error())), false
	}
	stay, r := x.stay, x.request
	if r.Expire {
		if x.inTransaction() {
			if err := x.insist(ctx, "ROLLBACK"); err != nil {
				return true, x.failure(err, r, x.st, nil), false
			}
			stay.failed = idleTransaction
		}
		return true, nil, false
	}
	if stay.timeout > 0 {
		r.TimeoutMillis = min(r.TimeoutMillis, stay.timeout)
	}
	verb, refusal := mysqlguard.ParseVerb(x.text.Text, !r.ReadWrite)
	if refusal != nil {
		return true, x.denial(refusal), false
	}
	ends := verb != nil && (verb.Kind == mysqlguard.Commit || verb.Kind == mysqlguard.Rollback)
	switch {
	case stay.failed != "" && ends:
		stay.failed = ""
		return true, x.answer(verb, "ROLLBACK"), false
	case stay.failed != "":
		return true, failedTransaction(stay.failed), false
	case r.Explain != "" && x.explicit:
		return true, planInTransaction(), false
	case verb == nil || r.Explain != "":
		return false, nil, false
	case len(verb.Queries) > 0:
		x.verb = verb
		return false, nil, false
	case arguments > 0:
		return true, proto.Errorf(proto.CodeInvalid, "%s takes no parameters", verb.Word()), false
	}
	return true, x.command(ctx, verb), false
}

// command runs a verb without a query in it.
func (x *mysqlExecution) command(ctx context.Context, verb *mysqlguard.Verb) *proto.Error {
	stay := x.stay
	open := x.inTransaction()
	before := ""
	switch verb.Kind {
	case mysqlguard.Begin:
		if open {
			return sqlRefusal(stateActiveTransaction, "a transaction is open already: say COMMIT or ROLLBACK first")
		}
		before, stay.isolation = stay.isolation, ""
	case mysqlguard.NextIsolation:
		if open {
			return sqlRefusal(stateActiveTransaction, "SET TRANSACTION is of the next transaction, and one is open: say COMMIT or ROLLBACK first")
		}
		stay.isolation = verb.SQL
		return x.answer(verb, "")
	case mysqlguard.Savepoint, mysqlguard.Release, mysqlguard.RollbackTo:
		if !open {
			return needsTransaction(verb.Word())
		}
	}
	if x.st.isStopped() {
		return stopError(x.st.stopReason(), x.request)
	}
	if err := x.sink.send(frame.Begun, nil); err != nil {
		return proto.Errorf(proto.CodeInternal, "%w", err)
	}
	mode := ""
	if verb.Kind == mysqlguard.Begin && x.request.ReadWrite {
		// DDL ends the transaction and goes by the session's mode.
		mode = "SET SESSION TRANSACTION READ WRITE"
	}
	x.ends = verb.Kind == mysqlguard.Commit || verb.Kind == mysqlguard.Rollback
	for _, sql := range []string{mode, before, verb.SQL} {
		if sql == "" {
			continue
		}
		err := x.tell(ctx, sql)
		var refusal *mysql.MySQLError
		if err != nil && !errors.As(err, &refusal) && verb.Kind == mysqlguard.Commit {
			x.spent = true
			return proto.Errorf(proto.CodeSourceUnreachable, "the connection to %s was lost during COMMIT: whether the transaction took effect is unknown", x.name())
		}
		if err != nil {
			return x.failure(err, x.request, x.st, nil)
		}
	}
	if verb.Kind == mysqlguard.Begin {
		stay.writes = verb.Writes
	}
	if verb.Timed {
		stay.timeout = verb.Millis
	}
	if verb.Kind == mysqlguard.Use {
		x.database = verb.Name
	}
	return x.answer(verb, "")
}

// answer begins a result without columns. tag is the verb's own word if it is empty.
func (x *mysqlExecution) answer(verb *mysqlguard.Verb, tag string) *proto.Error {
	if x.done.Tag = tag; tag == "" {
		x.done.Tag = verb.Word()
	}
	_, failure := newFeed(x.sink, x.request, x.st, nil, nil).end(nil)
	return failure
}

// holds makes sure that a transaction which the user began is still as it was begun.
func (x *mysqlExecution) holds() *proto.Error {
	if x.stay.writes || x.status()&mysqlInReadOnlyTransaction != 0 {
		return nil
	}
	return denied(0, "the statement is refused: the server no longer holds the transaction read-only")
}

// insist tells the server something that a late cancel must not keep it from.
func (s *mysqlSession) insist(ctx context.Context, statement string) error {
	for attempt := 0; ; attempt++ {
		err := s.tell(ctx, statement)
		if err == nil || attempt == 3 || !isRefusal(err, mysqlInterrupted) {
			return err
		}
	}
}

// settle brings the transaction to where the statement's end leaves it. explicit tells
// that one of the user's was open when the statement began.
func (x *mysqlExecution) settle(failure *proto.Error, explicit bool) *proto.Error {
	ctx, done := context.WithTimeout(context.Background(), resetTimeout)
	defer done()
	stay := x.stay
	if stay == nil || x.spent {
		return failure
	}
	stay.unsure = failure != nil || x.st.isStopped()
	if err := x.settleNow(ctx, failure, explicit); err != nil {
		x.spent = true // the session ends
		if failure == nil {
			failure = x.failure(err, x.request, x.st, nil)
		}
	}
	return failure
}

func (x *mysqlExecution) settleNow(ctx context.Context, failure *proto.Error, explicit bool) error {
	stay := x.stay
	if failure != nil {
		// An error does not tell of the transaction; this does.
		if err := x.insist(ctx, "DO 0"); err != nil {
			return err
		}
	}
	if err := x.keepSettings(ctx, explicit); err != nil {
		return err
	}
	open := x.inTransaction()
	switch {
	case !explicit && x.began && open:
		return x.insist(ctx, "ROLLBACK") // ours
	case !explicit || stay.failed != "" || x.ends:
	case failure != nil && open && x.begun && endedByUs(failure):
		// What of it took effect is not what the user was told.
		stay.failed = "the transaction was rolled back, as a statement in it was ended by a limit, a timeout or a cancel: say ROLLBACK, then begin again"
		return x.insist(ctx, "ROLLBACK")
	case failure != nil && !open:
		stay.failed = "the server has rolled the transaction back: say ROLLBACK, then begin again"
	case failure == nil && !open:
		x.done.Notices = append(x.done.Notices, frame.Notice{Severity: "NOTE", Message: "the statement has committed the transaction, as " + x.product() + " does for statements of its kind"})
	}
	return nil
}

// keepSettings sets back what statements rely on, if a procedure or function changed it,
// and says so.
func (x *mysqlExecution) keepSettings(ctx context.Context, explicit bool) error {
	if !x.begun || !x.request.ReadWrite && len(x.request.Guard.Functions) == 0 {
		return nil
	}
	var rows [][]string
	err := errors.New("")
	for attempt := 0; attempt < 3 && err != nil; attempt++ {
		rows, err = x.ask(ctx, "SELECT @@sql_mode, @@time_zone, @@character_set_client, @@character_set_connection, @@character_set_results, @@autocommit, DATABASE()")
		if err != nil && !isRefusal(err, mysqlInterrupted) {
			return err
		}
	}
	if err != nil || len(rows) != 1 {
		return errors.Join(err, errors.New("the server does not tell its settings"))
	}
	now := rows[0]
	x.database = now[6]
	var kept []string
	for _, mode := range strings.Split(now[0], ",") {
		if mode != "" && !droppedModes[strings.ToUpper(mode)] {
			kept = append(kept, mode)
		}
	}
	var back []string
	if modes := strings.Join(kept, ","); modes != now[0] {
		back = append(back, fmt.Sprintf("SET SESSION sql_mode = '%s'", modes))
	}
	if now[1] != "+00:00" {
		back = append(back, "SET SESSION time_zone = '+00:00'")
	}
	if now[2] != "utf8mb4" || now[3] != "utf8mb4" || now[4] != "utf8mb4" {
		back = append(back, "SET NAMES utf8mb4")
	}
	if now[5] != "1" {
		// That commits: what is open now is not what the user began.
		back = append(back, "ROLLBACK", "SET SESSION autocommit = 1")
		if explicit {
			x.stay.failed = "the transaction was rolled back, as a procedure turned autocommit off: say ROLLBACK, then begin again"
		}
	}
	for _, sql := range back {
		if err := x.insist(ctx, sql); err != nil {
			return err
		}
	}
	if len(back) > 0 {
		x.done.Notices = append(x.done.Notices, frame.Notice{Severity: "WARNING", Message: "settings that statements rely on (sql_mode, time_zone, the character set, autocommit) were changed and are set back"})
	}
	return nil
}

// transaction is the status for the user: I none, T open, E failed.
func (s *mysqlSession) transaction() string {
	switch {
	case s.stay != nil && s.stay.failed != "":
		return "E"
	case s.inTransaction():
		return "T"
	}
	return "I"
}

// settled is reset for a session that stays: nothing but what a late cancel could still
// do is taken away.
func (s *mysqlSession) settled(ctx context.Context) error {
	if s.spent {
		return errors.New("the connection is lost, or what is open in it is not certain")
	}
	if !s.stay.unsure {
		return nil
	}
	s.stay.unsure = false
	return s.insist(ctx, "DO 0")
}

// endedByUs tells of a statement that was under way whether it is a limit, a cancel or
// the like that ended it, and not the database or the policy, which undo it whole.
func endedByUs(failure *proto.Error) bool {
	return failure.Code != proto.CodeSQL && failure.Code != proto.CodePolicyDenied
}
