package pgverb

import "strings"

func (r *reader) begin() *Statement {
	if r.next(); strings.EqualFold(r.tokens[0].Text, "start") {
		r.expect("transaction")
	} else {
		r.acceptAny("work", "transaction")
	}
	return &Statement{Kind: Begin, SQL: "BEGIN" + r.modes()}
}

// modes reads the modes of a transaction to the end and writes those to ask for.
func (r *reader) modes() string {
	isolation, access, deferrable := "", "", ""
	for first := true; r.at < len(r.tokens); first = false {
		if !first {
			r.accept(",")
		}
		switch {
		case r.accept("isolation", "level", "serializable"):
			isolation = " ISOLATION LEVEL SERIALIZABLE"
		case r.accept("isolation", "level", "repeatable", "read"):
			isolation = " ISOLATION LEVEL REPEATABLE READ"
		case r.accept("isolation", "level", "read", "committed"):
			isolation = " ISOLATION LEVEL READ COMMITTED"
		case r.accept("isolation", "level", "read", "uncommitted"):
			isolation = " ISOLATION LEVEL READ UNCOMMITTED"
		case r.accept("read", "only"):
			access = " READ ONLY"
		case r.peek(0) == "read" && r.peek(1) == "write":
			if r.readOnly {
				r.refuse("READ WRITE is refused: the data source is read-only")
			}
			r.at += 2
			access = " READ WRITE"
		case r.accept("not", "deferrable"):
			deferrable = " NOT DEFERRABLE"
		case r.accept("deferrable"):
			deferrable = " DEFERRABLE"
		default:
			r.unexpected()
		}
	}
	if r.readOnly {
		access = " READ ONLY"
	}
	return isolation + access + deferrable
}

// chain reads what may follow COMMIT and ROLLBACK.
func (r *reader) chain() {
	r.acceptAny("work", "transaction")
	switch {
	case r.peek(0) == "prepared":
		r.refuse("two-phase commit is not supported")
	case r.accept("and", "no", "chain"):
	case r.peek(0) == "and":
		r.refuse("AND CHAIN is not supported: begin the next transaction with BEGIN")
	}
	r.end()
}

func (r *reader) commit() *Statement {
	r.next()
	r.chain()
	return &Statement{Kind: Commit, SQL: "COMMIT"}
}

func (r *reader) rollback() *Statement {
	aborts := strings.EqualFold(r.next().Text, "abort")
	if !aborts && (r.peek(0) == "to" || (r.peek(0) == "work" || r.peek(0) == "transaction") && r.peek(1) == "to") {
		r.acceptAny("work", "transaction")
		r.expect("to")
		return r.point(RollbackTo, "ROLLBACK TO SAVEPOINT ")
	}
	r.chain()
	return &Statement{Kind: Rollback, SQL: "ROLLBACK"}
}

func (r *reader) savepoint() *Statement {
	r.next()
	name := r.own()
	r.end()
	return &Statement{Kind: Savepoint, SQL: "SAVEPOINT " + quote(name), Name: name}
}

func (r *reader) release() *Statement {
	r.next()
	return r.point(Release, "RELEASE SAVEPOINT ")
}

// point reads [SAVEPOINT] name.
func (r *reader) point(kind Kind, verb string) *Statement {
	if r.peek(0) == "savepoint" && r.at+1 < len(r.tokens) {
		r.at++
	}
	name := r.own()
	r.end()
	return &Statement{Kind: kind, SQL: verb + quote(name), Name: name}
}

func (r *reader) setTransaction() *Statement {
	if r.peek(0) == "snapshot" {
		r.refuse("SET TRANSACTION SNAPSHOT is not supported")
	}
	if r.at == len(r.tokens) {
		r.unexpected()
	}
	return &Statement{Kind: SetTransaction, SQL: "SET TRANSACTION" + r.modes()}
}

func (r *reader) lock() *Statement {
	if r.readOnly {
		r.refuse("LOCK is refused: the data source is read-only")
	}
	for _, t := range r.tokens {
		if t.Text == ";" {
			for r.tokens[r.at].Text != ";" {
				r.at++
			}
			r.unexpected()
		}
	}
	return &Statement{Kind: Lock, SQL: r.text}
}
