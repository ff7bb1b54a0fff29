package child

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgguard"
)

const (
	// maxAnswer bounds the rows of an answer of the catalog. A statement that
	// needs more is refused.
	maxAnswer = 20_000
	// resolveTimeout bounds a question.
	resolveTimeout = "5s"
)

// The questions take arrays of schemas ("" is none) and of names. Every function and
// operator in them is qualified: the session's search_path is not trusted, only asked for.
const (
	// inPath: the object is one that the name in a (s, n) may mean.
	inPath = `CASE WHEN a.s OPERATOR(pg_catalog.=) '' THEN ns.nspname OPERATOR(pg_catalog.=) ANY (pg_catalog.current_schemas(true))
  WHEN a.s OPERATOR(pg_catalog.=) 'pg_temp' THEN ns.oid OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema()
  ELSE ns.nspname OPERATOR(pg_catalog.=) a.s::pg_catalog.name END`

	// isExtension: the function p belongs to an extension.
	isExtension = `EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_proc'::pg_catalog.regclass
  AND d.objid OPERATOR(pg_catalog.=) p.oid AND d.deptype OPERATOR(pg_catalog.=) 'e')`

	// calledQuestion: the candidates of each name. A row: number of the name, oid,
	// schema, name, volatility, kind, extension,
	// takes one argument, takes a row first.
	calledQuestion = `SELECT a.i, p.oid, ns.nspname, p.proname, p.provolatile, p.prokind, p.oid OPERATOR(pg_catalog.>=) 16384 AND ` + isExtension + `,
  p.pronargs OPERATOR(pg_catalog.>=) 1 AND p.pronargs OPERATOR(pg_catalog.-) p.pronargdefaults OPERATOR(pg_catalog.<=) 1,
  EXISTS (SELECT FROM pg_catalog.pg_type t WHERE t.oid OPERATOR(pg_catalog.=) p.proargtypes[0]
   AND (t.typtype OPERATOR(pg_catalog.=) ANY ('{c,p}') OR t.typtype OPERATOR(pg_catalog.=) 'd'))
 FROM ROWS FROM (pg_catalog.unnest($1::pg_catalog.text[]), pg_catalog.unnest($2::pg_catalog.text[])) WITH ORDINALITY a (s, n, i)
 JOIN pg_catalog.pg_proc p ON p.proname OPERATOR(pg_catalog.=) a.n::pg_catalog.name
 JOIN pg_catalog.pg_namespace ns ON ns.oid OPERATOR(pg_catalog.=) p.pronamespace
 WHERE ` + inPath

	// idPattern finds what a stored expression or query calls and reads.
	idPattern = `':(funcid|aggfnoid|winfnoid|tsmhandler|opno|eqop|sortop|relid|resulttype) ([1-9][0-9]*)'`

	// plainQuestion: whether there can be anything behind relations ($1, $2), operators
	// ($3, $4) and types ($5, $6) at all: mostly there is not, and behindQuestion takes
	// milliseconds to plan. Rows as those of behindQuestion, r and s, with "more" at the end
	// where that must be asked; and o for something else of which it must.
	plainQuestion = `SELECT 'r', a.i::pg_catalog.text, c.oid::pg_catalog.text, ns.nspname::pg_catalog.text, c.relname::pg_catalog.text, c.relkind::pg_catalog.text,
  CASE WHEN c.oid OPERATOR(pg_catalog.>=) 16384 AND (c.relkind OPERATOR(pg_catalog.<>) ALL ('{r,m,S}') OR c.relrowsecurity OR c.relhassubclass OR c.relhasrules
   OR c.relhastriggers AND EXISTS (SELECT FROM pg_catalog.pg_trigger t WHERE t.tgrelid OPERATOR(pg_catalog.=) c.oid AND NOT t.tgisinternal)
   OR EXISTS (SELECT FROM pg_catalog.pg_attrdef d WHERE d.adrelid OPERATOR(pg_catalog.=) c.oid AND d.adbin::pg_catalog.text OPERATOR(pg_catalog.~) ':funcid [1-9][0-9]{4}')
   OR EXISTS (SELECT FROM pg_catalog.pg_attribute b WHERE b.attrelid OPERATOR(pg_catalog.=) c.oid AND b.atttypid OPERATOR(pg_catalog.>=) 16384)
   OR EXISTS (SELECT FROM pg_catalog.pg_cast k WHERE k.castsource OPERATOR(pg_catalog.=) c.reltype OR k.casttarget OPERATOR(pg_catalog.=) c.reltype)) THEN 'more' ELSE '' END
 FROM ROWS FROM (pg_catalog.unnest($1::pg_catalog.text[]), pg_catalog.unnest($2::pg_catalog.text[])) WITH ORDINALITY a (s, n, i)
 JOIN pg_catalog.pg_class c ON c.relname OPERATOR(pg_catalog.=) a.n::pg_catalog.name
 JOIN pg_catalog.pg_namespace ns ON ns.oid OPERATOR(pg_catalog.=) c.relnamespace
 WHERE ` + inPath + ` AND (a.s OPERATOR(pg_catalog.<>) '' OR pg_catalog.pg_table_is_visible(c.oid))
 UNION ALL SELECT 's', '', '', coalesce(pg_catalog.current_schema(), ''), '', '', ''
 UNION ALL SELECT 'o', '', '', '', '', '', 'more' WHERE EXISTS (SELECT FROM ROWS FROM (pg_catalog.unnest($3::pg_catalog.text[]), pg_catalog.unnest($4::pg_catalog.text[])) a (s, n)
   JOIN pg_catalog.pg_operator o ON o.oprname OPERATOR(pg_catalog.=) a.n::pg_catalog.name WHERE o.oid OPERATOR(pg_catalog.>=) 16384)
  OR EXISTS (SELECT FROM ROWS FROM (pg_catalog.unnest($5::pg_catalog.text[]), pg_catalog.unnest($6::pg_catalog.text[])) a (s, n)
   JOIN pg_catalog.pg_type t ON t.typname OPERATOR(pg_catalog.=) a.n::pg_catalog.name WHERE t.oid OPERATOR(pg_catalog.>=) 16384)
  OR EXISTS (SELECT FROM pg_catalog.pg_cast k WHERE k.castfunc OPERATOR(pg_catalog.>=) 16384 AND k.castsource OPERATOR(pg_catalog.<) 16384 AND k.casttarget OPERATOR(pg_catalog.<) 16384)`

	// beyondTable says why writing to relation n may write elsewhere; '' if it does not.
	beyondTable = `CASE WHEN n.relkind OPERATOR(pg_catalog.=) 'v' THEN 'a view' WHEN n.relkind OPERATOR(pg_catalog.=) 'f' THEN 'a table of another server'
   WHEN EXISTS (SELECT FROM pg_catalog.pg_rewrite w WHERE w.ev_class OPERATOR(pg_catalog.=) n.oid AND w.ev_type OPERATOR(pg_catalog.<>) '1') THEN 'a table with a rule'
   WHEN EXISTS (SELECT FROM pg_catalog.pg_trigger t WHERE t.tgrelid OPERATOR(pg_catalog.=) n.oid AND NOT t.tgisinternal) THEN 'a table with a trigger'
   WHEN EXISTS (SELECT FROM pg_catalog.pg_attrdef d WHERE d.adrelid OPERATOR(pg_catalog.=) n.oid AND d.adbin::pg_catalog.text OPERATOR(pg_catalog.~) ':funcid [1-9][0-9]{4}') THEN 'a table with a default that calls a function of the database''s own'
   ELSE '' END`

	// behindQuestion: what relations, operators and types call without saying so.
	// $1, $2 are relations, $3, $4 operators, $5, $6 types, $7 whether columns count as
	// types that are named, $9 the names of all types that are, $8 functions of PostgreSQL's own that are of interest. Rows
	// are either r, number of the name, oid, schema, name, relkind;
	// or h, number of the name, oid, schema, name, volatility, kind, extension, via,
	// what was asked for (r, o, t, or - for nothing in particular);
	// or s, the current schema.
	behindQuestion = `WITH RECURSIVE
 named AS (SELECT a.i, c.oid, ns.nspname, c.relname, c.relkind
  FROM ROWS FROM (pg_catalog.unnest($1::pg_catalog.text[]), pg_catalog.unnest($2::pg_catalog.text[])) WITH ORDINALITY a (s, n, i)
  JOIN pg_catalog.pg_class c ON c.relname OPERATOR(pg_catalog.=) a.n::pg_catalog.name
  JOIN pg_catalog.pg_namespace ns ON ns.oid OPERATOR(pg_catalog.=) c.relnamespace
  WHERE ` + inPath + ` AND (a.s OPERATOR(pg_catalog.<>) '' OR pg_catalog.pg_table_is_visible(c.oid))),
 reached AS (SELECT i, oid FROM named WHERE oid OPERATOR(pg_catalog.>=) 16384
  UNION SELECT r.i, x.oid FROM reached r, LATERAL (
   SELECT h.inhrelid AS oid FROM pg_catalog.pg_inherits h WHERE h.inhparent OPERATOR(pg_catalog.=) r.oid
   UNION ALL SELECT m[2]::pg_catalog.oid FROM pg_catalog.pg_class k, pg_catalog.pg_rewrite w, pg_catalog.regexp_matches(w.ev_action::pg_catalog.text, ` + idPattern + `, 'g') m
    WHERE w.ev_class OPERATOR(pg_catalog.=) r.oid AND w.ev_type OPERATOR(pg_catalog.=) '1' AND k.oid OPERATOR(pg_catalog.=) r.oid AND k.relkind OPERATOR(pg_catalog.=) 'v' AND m[1] OPERATOR(pg_catalog.=) 'relid'
   UNION ALL SELECT m[2]::pg_catalog.oid FROM pg_catalog.pg_policy y, pg_catalog.regexp_matches(y.polqual::pg_catalog.text, ` + idPattern + `, 'g') m
    WHERE y.polrelid OPERATOR(pg_catalog.=) r.oid AND m[1] OPERATOR(pg_catalog.=) 'relid'
  ) x WHERE x.oid OPERATOR(pg_catalog.>=) 16384),
 found AS (SELECT r.i, c.oid, c.relkind, c.relrowsecurity, c.reltype, pg_catalog.concat(ns.nspname, '.', c.relname) AS name
  FROM reached r JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) r.oid JOIN pg_catalog.pg_namespace ns ON ns.oid OPERATOR(pg_catalog.=) c.relnamespace),
 stored AS (SELECT f.i, pg_catalog.concat('the view ', f.name) AS via, w.ev_action::pg_catalog.text AS body
   FROM found f JOIN pg_catalog.pg_rewrite w ON w.ev_class OPERATOR(pg_catalog.=) f.oid WHERE w.ev_type OPERATOR(pg_catalog.=) '1' AND f.relkind OPERATOR(pg_catalog.=) 'v'
  UNION ALL SELECT f.i, pg_catalog.concat('row security of ', f.name), y.polqual::pg_catalog.text
   FROM found f JOIN pg_catalog.pg_policy y ON y.polrelid OPERATOR(pg_catalog.=) f.oid WHERE f.relrowsecurity AND y.polqual IS NOT NULL),
 ids AS (SELECT DISTINCT t.i, t.via, m[1] AS what, m[2]::pg_catalog.oid AS id FROM stored t, pg_catalog.regexp_matches(t.body, ` + idPattern + `, 'g') m),
 types AS (
  SELECT 't' AS asked, a.i, t.oid, true AS made
   FROM ROWS FROM (pg_catalog.unnest($5::pg_catalog.text[]), pg_catalog.unnest($6::pg_catalog.text[])) WITH ORDINALITY a (s, n, i)
   JOIN pg_catalog.pg_type t ON t.typname OPERATOR(pg_catalog.=) a.n::pg_catalog.name
   JOIN pg_catalog.pg_namespace ns ON ns.oid OPERATOR(pg_catalog.=) t.typnamespace
   WHERE t.oid OPERATOR(pg_catalog.>=) 16384 AND ` + inPath + `
  UNION SELECT 'r', f.i, b.atttypid, $7::pg_catalog.bool FROM found f JOIN pg_catalog.pg_attribute b ON b.attrelid OPERATOR(pg_catalog.=) f.oid
   WHERE b.attnum OPERATOR(pg_catalog.>) 0 AND NOT b.attisdropped AND b.atttypid OPERATOR(pg_catalog.>=) 16384
  UNION SELECT 'r', f.i, f.reltype, $7::pg_catalog.bool FROM found f WHERE f.reltype OPERATOR(pg_catalog.>=) 16384
  UNION SELECT 'r', d.i, d.id, true FROM ids d WHERE d.what OPERATOR(pg_catalog.=) 'resulttype' AND d.id OPERATOR(pg_catalog.>=) 16384
  UNION SELECT t.asked, t.i, x.oid, t.made FROM types t, LATERAL (
   SELECT e.typelem AS oid FROM pg_catalog.pg_type e WHERE e.oid OPERATOR(pg_catalog.=) t.oid
   UNION ALL SELECT e.typbasetype FROM pg_catalog.pg_type e WHERE e.oid OPERATOR(pg_catalog.=) t.oid
   UNION ALL SELECT b.atttypid FROM pg_catalog.pg_type e JOIN pg_catalog.pg_attribute b ON b.attrelid OPERATOR(pg_catalog.=) e.typrelid
    WHERE e.oid OPERATOR(pg_catalog.=) t.oid AND e.typrelid OPERATOR(pg_catalog.<>) 0 AND b.attnum OPERATOR(pg_catalog.>) 0 AND NOT b.attisdropped
   UNION ALL SELECT g.rngsubtype FROM pg_catalog.pg_range g WHERE g.rngtypid OPERATOR(pg_catalog.=) t.oid
  ) x WHERE x.oid OPERATOR(pg_catalog.>=) 16384),
 called AS (
  SELECT 'r' AS asked, d.i, d.via, d.id FROM ids d WHERE d.what OPERATOR(pg_catalog.=) ANY ('{funcid,aggfnoid,winfnoid,tsmhandler}')
  UNION SELECT 'r', d.i, pg_catalog.concat(d.via, ' (operator ', o.oprname, ')'), o.oprcode::pg_catalog.oid FROM ids d JOIN pg_catalog.pg_operator o ON o.oid OPERATOR(pg_catalog.=) d.id
   WHERE d.what OPERATOR(pg_catalog.=) ANY ('{opno,eqop,sortop}') AND d.id OPERATOR(pg_catalog.>=) 16384
  UNION SELECT 'r', f.i, pg_catalog.concat('the foreign table ', f.name), w.fdwhandler FROM found f
   JOIN pg_catalog.pg_foreign_table x ON x.ftrelid OPERATOR(pg_catalog.=) f.oid
   JOIN pg_catalog.pg_foreign_server v ON v.oid OPERATOR(pg_catalog.=) x.ftserver
   JOIN pg_catalog.pg_foreign_data_wrapper w ON w.oid OPERATOR(pg_catalog.=) v.srvfdw
  UNION SELECT 'o', a.i, pg_catalog.concat('the operator ', o.oprname), o.oprcode::pg_catalog.oid
   FROM ROWS FROM (pg_catalog.unnest($3::pg_catalog.text[]), pg_catalog.unnest($4::pg_catalog.text[])) WITH ORDINALITY a (s, n, i)
   JOIN pg_catalog.pg_operator o ON o.oprname OPERATOR(pg_catalog.=) a.n::pg_catalog.name
   JOIN pg_catalog.pg_namespace ns ON ns.oid OPERATOR(pg_catalog.=) o.oprnamespace
   WHERE o.oid OPERATOR(pg_catalog.>=) 16384 AND ` + inPath + `
  UNION SELECT t.asked, t.i, pg_catalog.concat('the type ', pg_catalog.format_type(t.oid, NULL)), f.id FROM types t JOIN pg_catalog.pg_type e ON e.oid OPERATOR(pg_catalog.=) t.oid,
   LATERAL pg_catalog.unnest(ARRAY[e.typinput, e.typoutput, e.typreceive, e.typsend, e.typmodin, e.typmodout]::pg_catalog.oid[]) f (id) WHERE f.id OPERATOR(pg_catalog.>=) 16384
  UNION SELECT t.asked, t.i, pg_catalog.concat('a check of the domain ', pg_catalog.format_type(t.oid, NULL)),
    CASE WHEN m[1] OPERATOR(pg_catalog.=) 'opno' THEN (SELECT o.oprcode FROM pg_catalog.pg_operator o WHERE o.oid OPERATOR(pg_catalog.=) m[2]::pg_catalog.oid)::pg_catalog.oid ELSE m[2]::pg_catalog.oid END
   FROM types t JOIN pg_catalog.pg_constraint k ON k.contypid OPERATOR(pg_catalog.=) t.oid, pg_catalog.regexp_matches(k.conbin::pg_catalog.text, ':(funcid|opno) ([1-9][0-9]*)', 'g') m WHERE t.made
  UNION SELECT t.asked, t.i, pg_catalog.concat('a cast of the type ', pg_catalog.format_type(t.oid, NULL)), k.castfunc
   FROM types t JOIN pg_catalog.pg_cast k ON k.castsource OPERATOR(pg_catalog.=) t.oid OR k.casttarget OPERATOR(pg_catalog.=) t.oid WHERE k.castfunc OPERATOR(pg_catalog.>=) 16384
   AND (k.castcontext OPERATOR(pg_catalog.=) 'i' OR k.casttarget OPERATOR(pg_catalog.=) ANY ('{114,3802}') OR EXISTS (SELECT FROM pg_catalog.pg_type g
    WHERE g.oid OPERATOR(pg_catalog.=) k.casttarget AND g.typname OPERATOR(pg_catalog.=) ANY ($9::pg_catalog.name[])))
  UNION SELECT t.asked, t.i, pg_catalog.concat('comparing the type ', pg_catalog.format_type(t.oid, NULL)), s.amproc::pg_catalog.oid
   FROM types t JOIN pg_catalog.pg_opclass k ON k.opcintype OPERATOR(pg_catalog.=) t.oid JOIN pg_catalog.pg_amproc s ON s.amprocfamily OPERATOR(pg_catalog.=) k.opcfamily
   WHERE s.amproc::pg_catalog.oid OPERATOR(pg_catalog.>=) 16384
  UNION SELECT t.asked, t.i, pg_catalog.concat('comparing the type ', pg_catalog.format_type(t.oid, NULL)), o.oprcode::pg_catalog.oid
   FROM types t JOIN pg_catalog.pg_opclass k ON k.opcintype OPERATOR(pg_catalog.=) t.oid JOIN pg_catalog.pg_amop s ON s.amopfamily OPERATOR(pg_catalog.=) k.opcfamily
   JOIN pg_catalog.pg_operator o ON o.oid OPERATOR(pg_catalog.=) s.amopopr WHERE o.oprcode::pg_catalog.oid OPERATOR(pg_catalog.>=) 16384
  UNION SELECT '-', 0, 'a cast between types of PostgreSQL itself', k.castfunc FROM pg_catalog.pg_cast k
   WHERE k.castfunc OPERATOR(pg_catalog.>=) 16384 AND k.castsource OPERATOR(pg_catalog.<) 16384 AND k.casttarget OPERATOR(pg_catalog.<) 16384)
 SELECT 'r', n.i::pg_catalog.text, n.oid::pg_catalog.text, n.nspname::pg_catalog.text, n.relname::pg_catalog.text, n.relkind::pg_catalog.text,
  ` + beyondTable + `, '', '', '' FROM named n
 UNION ALL SELECT 's', '', '', coalesce(pg_catalog.current_schema(), ''), '', '', '', '', '', ''
 UNION ALL SELECT 'h', k.i::pg_catalog.text, p.oid::pg_catalog.text, ns.nspname::pg_catalog.text, p.proname::pg_catalog.text, p.provolatile::pg_catalog.text, p.prokind::pg_catalog.text,
   (p.oid OPERATOR(pg_catalog.>=) 16384 AND ` + isExtension + `)::pg_catalog.text, k.via, k.asked
  FROM called k JOIN pg_catalog.pg_proc p ON p.oid OPERATOR(pg_catalog.=) k.id JOIN pg_catalog.pg_namespace ns ON ns.oid OPERATOR(pg_catalog.=) p.pronamespace
  WHERE p.oid OPERATOR(pg_catalog.>=) 16384 OR p.provolatile OPERATOR(pg_catalog.=) 'v' OR p.proname OPERATOR(pg_catalog.=) ANY ($8::pg_catalog.name[])`
)

// question is one of ours to the catalog; row takes a row of its answer.
type question struct {
	name       string // of the prepared statement, if it may be one
	query      string
	parameters [][]byte
	columns    int
	row        func(*pgguard.Catalog, []string)
}

// questions are what q needs to be asked first, two at most. When more is set by
// their answers, behindOf must be asked, too.
func questions(q pgguard.Question) (all []question, more *bool) {
	more = new(bool)
	if len(q.Functions) > 0 {
		schemas, names := arrays(q.Functions)
		all = append(all, question{calledName, calledQuestion, [][]byte{schemas, names}, 9, func(catalog *pgguard.Catalog, v []string) {
			if name, ok := nth(q.Functions, v[0]); ok {
				p := proc(v[1:])
				p.One = v[7] == "t"
				p.Row = p.One && v[8] == "t"
				catalog.Functions[name] = append(catalog.Functions[name], p)
			}
		}})
	}
	if len(q.Relations)+len(q.Operators)+len(q.Types) > 0 {
		all = append(all, question{plainName, plainQuestion, behindOf(q).parameters[:6], 7, func(catalog *pgguard.Catalog, v []string) {
			*more = *more || v[6] == "more"
			if v[0] != "o" {
				behind(catalog, q, v)
			}
		}})
	}
	return all, more
}

// behindOf is the question for what is behind names.
func behindOf(q pgguard.Question) question {
	rs, rn := arrays(q.Relations)
	os, on := arrays(q.Operators)
	ts, tn := arrays(q.Types)
	deep := []byte("f")
	if q.Deep {
		deep = []byte("t")
	}
	parameters := [][]byte{rs, rn, os, on, ts, tn, deep, arrayOf(pgguard.Outside()), arrayOf(q.Casts)}
	return question{"", behindQuestion, parameters, 10, func(catalog *pgguard.Catalog, v []string) { behind(catalog, q, v) }}
}

func newCatalog() *pgguard.Catalog {
	return &pgguard.Catalog{Functions: make(map[pgguard.Name][]pgguard.Proc), Relations: make(map[pgguard.Name]pgguard.RelationFacts)}
}

// ask asks the catalog over the session's own connection, in a read-only
// transaction where none is open. One round trip, two where something may be behind
// the names.
func (s *session) ask(q pgguard.Question) (*pgguard.Catalog, error) {
	catalog := newCatalog()
	all, more := questions(q)
	how := unprepared
	if s.primed && s.wire.tx == 'I' {
		how = primed
	}
	s.primed = false
	err := s.askAll(catalog, all, how)
	if err == nil && *more {
		err = s.askAll(catalog, []question{behindOf(q)}, unprepared)
	}
	if err != nil {
		return nil, err
	}
	return catalog, nil
}

// How questions are asked: each planned anew; so that they are prepared and their
// plans are kept; or as they were prepared.
const (
	unprepared = iota
	priming
	primed
)

// The names of prepared questions. The server's DISCARD ALL, which follows every
// statement, removes them: no statement of a user's ever runs while they count.
const (
	calledName = "postern_called"
	plainName  = "postern_plain"
)

// askAll asks questions in one round trip. The connection must be idle unless how is
// unprepared.
func (s *session) askAll(catalog *pgguard.Catalog, all []question, how int) error {
	c := s.wire
	own := c.tx == 'I'
	var err error
	send := func(messages ...pgproto3.FrontendMessage) {
		if err == nil {
			err = c.send(messages...)
		}
	}
	if own {
		begin := "BEGIN READ ONLY;SET LOCAL jit = off;SET LOCAL statement_timeout = '" + resolveTimeout + "'"
		if how != unprepared && s.majorVersion() >= 12 {
			// The plan is made once. It is as good: the numbers of names are small.
			begin += ";SET LOCAL plan_cache_mode = force_generic_plan"
		}
		send(&pgproto3.Query{String: begin})
	} else {
		// To compile the plan would take seconds. The user's transaction gets back what it
		// had, also when the question fails.
		send(&pgproto3.Query{String: "SAVEPOINT postern_question;SET LOCAL jit = off"})
	}
	for _, one := range all {
		name := ""
		if how != unprepared {
			name = one.name
		}
		if how != primed {
			send(&pgproto3.Parse{Name: name, Query: one.query})
		}
		send(&pgproto3.Bind{PreparedStatement: name, Parameters: one.parameters}, &pgproto3.Execute{}, &pgproto3.Sync{})
	}
	if own {
		send(&pgproto3.Query{String: "ROLLBACK"})
	} else {
		send(&pgproto3.Query{String: "ROLLBACK TO SAVEPOINT postern_question;RELEASE SAVEPOINT postern_question"})
	}
	if err == nil {
		err = c.flush()
	}
	var first *pgproto3.ErrorResponse
	read := func(one *question) {
		if err != nil {
			return
		}
		rows := 0
		var refusal *pgproto3.ErrorResponse
		refusal, err = c.untilReady(func(t byte, body []byte) error {
			if t != 'D' || one == nil {
				return nil
			}
			if rows++; rows > maxAnswer {
				return nil
			}
			var data pgproto3.DataRow
			if err := data.Decode(body); err != nil || len(data.Values) != one.columns {
				return fmt.Errorf("%w: a row of the catalog", errProtocol)
			}
			values := make([]string, one.columns)
			for i, v := range data.Values {
				values[i] = string(v)
			}
			one.row(catalog, values)
			return nil
		})
		if first == nil {
			first = refusal
		}
		if rows > maxAnswer && err == nil && first == nil {
			first = &pgproto3.ErrorResponse{Severity: "ERROR", Code: "54000", Message: "the statement names too many things to look them all up"}
		}
	}
	read(nil)
	for i := range all {
		read(&all[i])
	}
	read(nil)
	switch {
	case err != nil:
		return &lostError{err}
	case first != nil:
		return &askError{first}
	}
	return nil
}

// behind reads a row of behindQuestion.
func behind(catalog *pgguard.Catalog, q pgguard.Question, v []string) {
	switch v[0] {
	case "s":
		catalog.CurrentSchema = v[3]
	case "r":
		if name, ok := nth(q.Relations, v[1]); ok {
			oid, _ := strconv.ParseUint(v[2], 10, 32)
			catalog.Relations[name] = pgguard.RelationFacts{OID: uint32(oid), Schema: v[3], Name: v[4], Kind: v[5][0], Beyond: clean(v[6])}
		}
	case "h":
		h := pgguard.Hidden{Proc: proc(v[2:]), Via: clean(v[8])}
		h.Extension = v[7] == "true"
		switch v[9] {
		case "r":
			h.From, _ = nth(q.Relations, v[1])
		case "o":
			h.From, _ = nth(q.Operators, v[1])
		case "t":
			h.From, _ = nth(q.Types, v[1])
		}
		catalog.Hidden = append(catalog.Hidden, h)
	}
}

// proc reads oid, schema, name, volatility, kind, extension.
func proc(v []string) pgguard.Proc {
	oid, err := strconv.ParseUint(v[0], 10, 32)
	if err != nil {
		oid = 1<<32 - 1 // nobody's: not PostgreSQL's own
	}
	p := pgguard.Proc{OID: uint32(oid), Schema: v[1], Name: v[2], Volatility: 'v', Extension: v[5] == "t"}
	if v[3] != "" {
		p.Volatility = v[3][0]
	}
	if v[4] != "" {
		p.Kind = v[4][0]
	}
	return p
}

func nth(names []pgguard.Name, number string) (pgguard.Name, bool) {
	n, err := strconv.Atoi(number)
	if err != nil || n < 1 || n > len(names) {
		return pgguard.Name{}, false
	}
	return names[n-1], true
}

// arrays are the schemas and the names as values of text[].
func arrays(names []pgguard.Name) (schemas, own []byte) {
	a, b := make([]string, len(names)), make([]string, len(names))
	for i, n := range names {
		a[i], b[i] = n.Schema, n.Name
	}
	return arrayOf(a), arrayOf(b)
}

func arrayOf(texts []string) []byte {
	var b strings.Builder
	b.WriteByte('{')
	for i, text := range texts {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteByte('"')
		b.WriteString(quoteElement.Replace(text))
		b.WriteByte('"')
	}
	b.WriteByte('}')
	return []byte(b.String())
}

var quoteElement = strings.NewReplacer(`\`, `\\`, `"`, `\"`)

// askError is the server's refusal of a question of ours.
type askError struct{ refusal *pgproto3.ErrorResponse }

func (e *askError) Error() string { return clean(e.refusal.Message) }

// lostError is a connection that ended under a question of ours.
type lostError struct{ err error }

func (e *lostError) Error() string { return e.err.Error() }
func (e *lostError) Unwrap() error { return e.err }
