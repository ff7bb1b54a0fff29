package child

import (
	"slices"
	"strings"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/sqltext"
	"github.com/postern-dev/postern/proto"
)

// sqliteStay is what a session that stays open has beside SQLite's own state.
type sqliteStay struct {
	// failed says why the transaction is over although the user has not ended it: until
	// ROLLBACK nothing runs.
	failed string
}

// sqliteVerb is a statement of a session, read word by word; sql is what SQLite gets in
// its place.
type sqliteVerb struct {
	word, sql string
	begins    bool // a transaction
	ends      bool // it
}

// sqliteVerbOf reads BEGIN, COMMIT, END, ROLLBACK, SAVEPOINT and RELEASE; nil is another
// statement.
func sqliteVerbOf(text string, readWrite bool) (*sqliteVerb, *proto.Error) {
	switch strings.ToLower(sqltext.FirstWord(sqltext.SQLite, text)) {
	case "begin", "commit", "end", "rollback", "savepoint", "release":
	default:
		return nil, nil
	}
	var tokens []sqltext.Piece
	for t := range sqltext.SQLite.Pieces(text) {
		if t.Open {
			return nil, denied(t.Position, "a quote or comment is not closed")
		}
		if t.Kind != sqltext.KindComment {
			tokens = append(tokens, t)
		}
	}
	for n := len(tokens); n > 0 && tokens[n-1].Text == ";"; n-- {
		tokens = tokens[:n-1]
	}
	at := 0
	word := func(words ...string) string {
		if at < len(tokens) && tokens[at].Kind == sqltext.KindWord && slices.Contains(words, strings.ToLower(tokens[at].Text)) {
			at++
			return strings.ToLower(tokens[at-1].Text)
		}
		return ""
	}
	name := func() string {
		if at == len(tokens) || tokens[at].Kind != sqltext.KindWord && tokens[at].Kind != sqltext.KindIdentifier {
			return ""
		}
		at++
		return `"` + strings.ReplaceAll(tokens[at-1].Text, `"`, `""`) + `"`
	}
	v := &sqliteVerb{}
	switch word("begin", "commit", "end", "rollback", "savepoint", "release") {
	case "begin":
		how := strings.ToUpper(word("deferred", "immediate", "exclusive"))
		word("transaction")
		if !readWrite && (how == "IMMEDIATE" || how == "EXCLUSIVE") {
			return nil, denied(tokens[1].Position, "BEGIN %s is refused: the data source is read-only", how)
		}
		*v = sqliteVerb{word: "BEGIN", sql: strings.TrimSpace("BEGIN " + how), begins: true}
	case "commit", "end":
		word("transaction")
		*v = sqliteVerb{word: "COMMIT", sql: "COMMIT", ends: true}
	case "rollback":
		word("transaction")
		*v = sqliteVerb{word: "ROLLBACK", sql: "ROLLBACK", ends: true}
		if word("to") != "" {
			if at+1 < len(tokens) {
				word("savepoint")
			}
			*v = sqliteVerb{word: "ROLLBACK", sql: "ROLLBACK TO " + name()}
		}
	case "savepoint":
		*v = sqliteVerb{word: "SAVEPOINT", sql: "SAVEPOINT " + name()}
	case "release":
		if at+1 < len(tokens) {
			word("savepoint")
		}
		*v = sqliteVerb{word: "RELEASE", sql: "RELEASE " + name()}
	}
	if v.sql == "" || at != len(tokens) || strings.HasSuffix(v.sql, " ") {
		return nil, denied(tokens[min(at, len(tokens)-1)].Position, "the statement is refused: a session takes BEGIN, COMMIT, ROLLBACK, SAVEPOINT and RELEASE in their plain forms")
	}
	return v, nil
}

// sqliteSettings are pragmas that a session may set to on or off: none reaches beyond the
// connection, or makes anything that the policy refuses possible. The value tells whether
// the source must be one that may write.
var sqliteSettings = map[string]bool{
	"case_sensitive_like": false, "reverse_unordered_selects": false, "automatic_index": false, "recursive_triggers": true, "defer_foreign_keys": true,
}

// sessionPragma tells whether the pragma is a setting of a session's that may be set so.
func (g *sqliteGuard) sessionPragma(name, value string) bool {
	writes, is := sqliteSettings[name]
	return g.session && is && (g.readWrite || !writes) && slices.Contains([]string{"", "0", "1", "on", "off", "true", "false", "yes", "no"}, strings.ToLower(value))
}

// interact does what only a session that stays does. done tells that the statement is
// over.
func (x *sqliteExecution) interact(arguments int) (done bool, failure *proto.Error) {
	if x.stay == nil {
		x.stay = &sqliteStay{}
	}
	x.explicit = !x.db.idle()
	stay, r := x.stay, x.request
	if r.Expire {
		if x.explicit {
			if _, err := x.db.exec("ROLLBACK"); err != nil && !x.db.idle() {
				return true, x.failure(err)
			}
			stay.failed = idleTransaction
		}
		return true, nil
	}
	verb, failure := sqliteVerbOf(x.text.Text, r.ReadWrite)
	switch {
	case failure != nil:
		return true, failure
	case stay.failed != "" && verb != nil && verb.ends:
		stay.failed = ""
		return true, x.answer("ROLLBACK")
	case stay.failed != "":
		return true, failedTransaction(stay.failed)
	case r.Explain != "" && x.explicit:
		return true, planInTransaction()
	case verb == nil || r.Explain != "":
		return false, nil
	case arguments > 0:
		return true, proto.Errorf(proto.CodeInvalid, "%s takes no parameters", verb.word)
	case verb.begins && x.explicit:
		return true, sqlRefusal(stateActiveTransaction, "a transaction is open already: say COMMIT or ROLLBACK first")
	case verb.ends && !x.explicit:
		return true, x.answer(verb.word) // as on the other engines
	case !verb.begins && !x.explicit:
		return true, needsTransaction(verb.word)
	case x.st.isStopped():
		return true, stopError(x.st.stopReason(), r)
	}
	if err := x.sink.send(frame.Begun, nil); err != nil {
		return true, proto.Errorf(proto.CodeInternal, "%w", err)
	}
	x.begins, x.ends = verb.begins, verb.ends
	if _, err := x.db.exec(verb.sql); err != nil {
		return true, x.failure(err)
	}
	return true, x.answer(verb.word)
}

// answer begins a result without columns.
func (x *sqliteExecution) answer(tag string) *proto.Error {
	x.done.Tag = tag
	_, failure := newFeed(x.sink, x.request, x.st, nil, nil).end(nil)
	return failure
}

// settle brings the transaction to where the statement's end leaves it.
func (x *sqliteExecution) settle(failure *proto.Error) {
	stay := x.stay
	switch {
	case stay == nil || !x.explicit || x.ends || failure == nil || stay.failed != "":
	case x.db.idle():
		stay.failed = "SQLite has rolled the transaction back: say ROLLBACK, then begin again"
	case x.begun && endedByUs(failure):
		// What of it took effect is not what the user was told.
		stay.failed = "the transaction was rolled back, as a statement in it was ended by a limit, a timeout or a cancel: say ROLLBACK, then begin again"
		if _, err := x.db.exec("ROLLBACK"); err != nil && !x.db.idle() {
			x.broken = true
		}
	}
}

// transaction is the status for the user: I none, T open, E failed.
func (s *sqliteSession) transaction() string {
	switch {
	case s.stay != nil && s.stay.failed != "":
		return "E"
	case !s.db.idle():
		return "T"
	}
	return "I"
}
