package mysqlguard

import (
	"fmt"
	"strings"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/sqltext"
)

// VerbKind is what a Verb does.
type VerbKind uint8

// The kinds.
const (
	Begin         VerbKind = iota // BEGIN, START TRANSACTION
	Commit                        // COMMIT
	Rollback                      // ROLLBACK
	Savepoint                     // SAVEPOINT
	Release                       // RELEASE SAVEPOINT
	RollbackTo                    // ROLLBACK TO
	NextIsolation                 // SET TRANSACTION: of the next transaction alone
	Set                           // SET of settings, perhaps of variables as well
	Use                           // USE: the database Name from now on
)

// Verb is a statement that only a session that stays open can run: it was read word by
// word, and SQL is what the server gets in its place.
type Verb struct {
	Kind VerbKind
	// SQL is in our words; empty if nothing is for the server.
	SQL string
	// Writes tells of Begin that the transaction is not READ ONLY.
	Writes bool
	// Name is the database of Use.
	Name string
	// Queries are the expressions that user variables are set to, each to be judged as
	// a query of its own. SQL has them in parentheses, in the same order, and with their
	// placeholders.
	Queries []string
	// Millis is what the statement's time limit was set to (max_statement_time,
	// max_execution_time), if Timed: the process keeps it, and it only narrows the
	// policy's. 0 is none.
	Millis int64
	Timed  bool
}

// Word is the verb's in an outcome.
func (v *Verb) Word() string {
	return map[VerbKind]string{
		Begin: "BEGIN", Commit: "COMMIT", Rollback: "ROLLBACK", Savepoint: "SAVEPOINT", Release: "RELEASE", RollbackTo: "ROLLBACK",
		NextIsolation: "SET", Set: "SET", Use: "USE",
	}[v.Kind]
}

// ParseVerb reads a statement of a session; nil is one of another kind, to be judged like
// any. readOnly is a source's that may not write: its transactions are READ ONLY whatever
// the text says, and what asks for more is refused.
func ParseVerb(text string, readOnly bool) (*Verb, *Refusal) {
	switch strings.ToLower(sqltext.FirstWord(sqltext.MySQL, text)) {
	case "begin", "start", "commit", "rollback", "savepoint", "release", "set", "use":
	default:
		return nil, nil
	}
	tokens, refusal := scan(text)
	if refusal != nil {
		return nil, refusal
	}
	p := &verbParser{showParser: showParser{tokens: withoutEnd(tokens)}, text: text, readOnly: readOnly}
	v := p.parse()
	if p.refusal != nil {
		return nil, p.refusal
	}
	if v == nil || p.at != len(p.tokens) {
		return nil, p.unknown("a session takes BEGIN, START TRANSACTION, COMMIT, ROLLBACK, SAVEPOINT, RELEASE SAVEPOINT, SET and USE in their plain forms")
	}
	return v, nil
}

type verbParser struct {
	showParser
	text     string
	readOnly bool
	refusal  *Refusal
}

// unknown is a refusal from the token at hand on.
func (p *verbParser) unknown(allows string) *Refusal {
	t := p.tokens[min(p.at, len(p.tokens)-1)]
	return &Refusal{fmt.Sprintf("the statement is refused from %s on: %s", shown(t), allows), t.Position}
}

func (p *verbParser) refuse(at int, format string, args ...any) {
	if p.refusal == nil {
		p.refusal = &Refusal{fmt.Sprintf(format, args...), p.tokens[min(at, len(p.tokens)-1)].Position}
	}
}

func (p *verbParser) parse() *Verb {
	switch p.word("begin", "start", "commit", "rollback", "savepoint", "release", "set", "use") {
	case "begin":
		p.word("work")
		return &Verb{Kind: Begin, SQL: p.start(false, ""), Writes: !p.readOnly}
	case "start":
		return p.startTransaction()
	case "commit":
		p.word("work")
		return &Verb{Kind: Commit, SQL: "COMMIT"}
	case "rollback":
		p.word("work")
		if p.word("to") == "" {
			return &Verb{Kind: Rollback, SQL: "ROLLBACK"}
		}
		p.word("savepoint")
		if name := p.name(); name != "" {
			return &Verb{Kind: RollbackTo, SQL: "ROLLBACK TO SAVEPOINT " + ident(name)}
		}
	case "savepoint":
		if name := p.name(); name != "" {
			return &Verb{Kind: Savepoint, SQL: "SAVEPOINT " + ident(name)}
		}
	case "release":
		if p.word("savepoint") == "" {
			return nil
		}
		if name := p.name(); name != "" {
			return &Verb{Kind: Release, SQL: "RELEASE SAVEPOINT " + ident(name)}
		}
	case "use":
		if name := p.name(); name != "" {
			return &Verb{Kind: Use, SQL: "USE " + ident(name), Name: name}
		}
	case "set":
		return p.set()
	}
	return nil
}

// start is a transaction's beginning in our words.
func (p *verbParser) start(snapshot bool, access string) string {
	sql := "START TRANSACTION "
	if snapshot {
		sql += "WITH CONSISTENT SNAPSHOT, "
	}
	if p.readOnly || access == "read only" {
		return sql + "READ ONLY"
	}
	return sql + "READ WRITE"
}

func (p *verbParser) startTransaction() *Verb {
	if p.word("transaction") == "" {
		return nil
	}
	snapshot, access := false, ""
	for first := true; p.at < len(p.tokens); first = false {
		if !first && !p.symbol(",") {
			return nil
		}
		at := p.at
		switch p.word("with", "read") {
		case "with":
			if p.word("consistent") == "" || p.word("snapshot") == "" || snapshot {
				return nil
			}
			snapshot = true
		case "read":
			if access != "" {
				return nil
			}
			access = "read " + p.word("only", "write")
			if access == "read write" && p.readOnly {
				p.refuse(at, "READ WRITE is refused: the data source is read-only")
			}
			if access == "read " {
				return nil
			}
		default:
			return nil
		}
	}
	return &Verb{Kind: Begin, SQL: p.start(snapshot, access), Writes: !p.readOnly && access != "read only"}
}

// isolation passes ISOLATION LEVEL and its name.
func (p *verbParser) isolation() string {
	if p.word("isolation") == "" || p.word("level") == "" {
		return ""
	}
	switch p.word("repeatable", "read", "serializable") {
	case "repeatable":
		if p.word("read") != "" {
			return "REPEATABLE READ"
		}
	case "read":
		if level := p.word("committed", "uncommitted"); level != "" {
			return "READ " + strings.ToUpper(level)
		}
	case "serializable":
		p.lockless(p.at - 1)
		return "SERIALIZABLE"
	}
	return ""
}

// lockless refuses the level SERIALIZABLE on a read-only source: in its transactions
// every SELECT locks what it reads, as FOR SHARE does.
func (p *verbParser) lockless(at int) {
	if p.readOnly {
		p.refuse(at, "SERIALIZABLE is refused: the data source is read-only, and every SELECT would lock what it reads")
	}
}

// set reads SET: TRANSACTION, or a list of settings and variables.
func (p *verbParser) set() *Verb {
	begin := p.at
	scope := p.word("session", "local")
	if p.word("transaction") != "" {
		if p.word("read") != "" {
			p.refuse(p.at-1, "READ ONLY and READ WRITE are for START TRANSACTION alone")
			return nil
		}
		level := p.isolation()
		switch {
		case level == "":
			return nil
		case scope != "":
			return &Verb{Kind: Set, SQL: "SET SESSION TRANSACTION ISOLATION LEVEL " + level}
		}
		return &Verb{Kind: NextIsolation, SQL: "SET TRANSACTION ISOLATION LEVEL " + level}
	}
	p.at = begin
	v := &Verb{Kind: Set}
	var parts []string
	for {
		part := ""
		if p.variable() {
			part = p.setVariable(v)
		} else {
			part = p.setSetting(v)
		}
		if p.refusal != nil {
			return nil
		}
		if part != "" {
			parts = append(parts, part)
		}
		if !p.symbol(",") {
			break
		}
	}
	if len(parts) > 0 {
		v.SQL = "SET " + strings.Join(parts, ", ")
	}
	return v
}

// variable tells whether @name comes, and not @@name.
func (p *verbParser) variable() bool {
	next := func(n int) string {
		if p.at+n < len(p.tokens) && p.tokens[p.at+n].Kind == sqltext.KindSymbol {
			return p.tokens[p.at+n].Text
		}
		return ""
	}
	return next(0) == "@" && next(1) != "@"
}

// assign passes = or :=.
func (p *verbParser) assign() bool { return p.symbol("=") || p.symbol(":=") }

// setVariable reads @name = EXPRESSION, up to a comma outside of parentheses.
func (p *verbParser) setVariable(v *Verb) string {
	p.at++
	if p.at == len(p.tokens) || !p.tokens[p.at].Joined || p.tokens[p.at].Kind != sqltext.KindWord && p.tokens[p.at].Kind != sqltext.KindIdentifier {
		p.refuse(p.at, "the name of a variable is letters and digits behind @, or in backticks")
		return ""
	}
	name := p.tokens[p.at].Text
	p.at++
	if !p.assign() {
		p.refusal = p.unknown("= and a value belong there")
		return ""
	}
	first, depth := p.at, 0
	for ; p.at < len(p.tokens); p.at++ {
		t := p.tokens[p.at]
		if t.Kind != sqltext.KindSymbol {
			continue
		}
		if t.Text == "(" {
			depth++
		}
		if t.Text == ")" {
			depth--
		}
		if depth < 0 || t.Text == ";" {
			p.refuse(p.at, "the parentheses do not match")
			return ""
		}
		if t.Text == "," && depth == 0 {
			break
		}
	}
	if depth != 0 || first == p.at {
		p.refuse(p.at, "the value of a variable is not complete")
		return ""
	}
	query := p.slice(first, p.at)
	v.Queries = append(v.Queries, query)
	return "@" + ident(name) + " = (" + query + "\n)"
}

// slice is the text from token a to before token b.
func (p *verbParser) slice(a, b int) string {
	runes := []rune(p.text)
	end := len(runes)
	if b < len(p.tokens) {
		end = p.tokens[b].Position - 1
	} else {
		// Semicolons at the end were left out of the tokens.
		for t := range sqltext.MySQL.Pieces(p.text) {
			if t.Position > p.tokens[len(p.tokens)-1].Position && t.Kind == sqltext.KindSymbol && t.Text == ";" {
				end = t.Position - 1
				break
			}
		}
	}
	return string(runes[p.tokens[a].Position-1 : end])
}

// setSetting reads [SESSION|LOCAL|@@session.|@@local.|@@] NAME = VALUE.
func (p *verbParser) setSetting(v *Verb) string {
	begin := p.at
	if p.symbol("@") {
		if !p.symbol("@") {
			p.refusal = p.unknown("that is no name of a setting")
			return ""
		}
		if p.word("session", "local") != "" && !p.symbol(".") {
			p.refusal = p.unknown("that is no name of a setting")
			return ""
		}
	} else {
		p.word("session", "local")
	}
	if p.at == len(p.tokens) || p.tokens[p.at].Kind != sqltext.KindWord {
		p.refusal = p.unknown("that is no name of a setting")
		return ""
	}
	name := strings.ToLower(p.tokens[p.at].Text)
	p.at++
	s, known := settings[name]
	switch {
	case known && s.writes && p.readOnly, !known && settingReasons[name] == "":
		p.refuse(begin, "%s can't be set in a session here", clip(name))
		return ""
	case !known:
		p.refuse(begin, "%s can't be set in a session: %s", clip(name), settingReasons[name])
		return ""
	case !p.assign():
		p.refusal = p.unknown("= and a value belong there")
		return ""
	}
	at := p.at
	value, ok := s.read(p)
	if strings.EqualFold(value, "'serializable'") {
		p.lockless(at)
	}
	if !ok {
		p.refuse(at, "that is no value that %s can have in a session: %s", name, s.takes)
		return ""
	}
	if s.millis != 0 {
		// The process sets it for each statement.
		n, _ := decimal(value)
		v.Millis, v.Timed = int64(n*s.millis), true
		return ""
	}
	return "SESSION " + name + " = " + value
}
