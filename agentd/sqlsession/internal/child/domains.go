package child

import (
	"fmt"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgplan"
	"github.com/postern-dev/postern/proto"
)

// domainsLife is how long what was found out about the database's domains counts.
const domainsLife = 5 * time.Second

// domains is what is known of the database's domains.
type domains struct {
	asked time.Time
	// acting is a domain whose check may do or tell something, and by what
	// function; "" if there is none.
	acting, function string
}

// domainsQuery finds the functions in the checks of domains.
const domainsQuery = `SELECT DISTINCT pg_catalog.format_type(k.contypid, NULL), n.nspname, p.proname, p.oid OPERATOR(pg_catalog.<) 16384::pg_catalog.oid, p.provolatile, COALESCE(e.extname, '')
FROM pg_catalog.pg_constraint k, LATERAL pg_catalog.regexp_matches(k.conbin::pg_catalog.text, ':(?:funcid|opfuncid|aggfnoid|winfnoid) ([0-9]+)', 'g') m(m)
JOIN pg_catalog.pg_proc p ON p.oid OPERATOR(pg_catalog.=) m.m[1]::pg_catalog.oid JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) p.pronamespace
LEFT JOIN pg_catalog.pg_depend d ON d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_proc'::pg_catalog.regclass::pg_catalog.oid AND d.objid OPERATOR(pg_catalog.=) p.oid AND d.deptype OPERATOR(pg_catalog.=) 'e'
LEFT JOIN pg_catalog.pg_extension e ON e.oid OPERATOR(pg_catalog.=) d.refobjid
WHERE k.contypid OPERATOR(pg_catalog.<>) 0::pg_catalog.oid ORDER BY 1, 2, 3 LIMIT 10000`

// runsNoCheck refuses a statement that may make the server run the check of a
// domain while it parses it, if the database has any whose check is not known to
// look at its value alone. The server reads a literal as a value of its type when
// it parses, and for an array, a row or a range of a domain that runs the check.
// Such literals begin with a bracket.
func (x *execution) runsNoCheck(s *pgplan.Statement) *proto.Error {
	position := 0
	switch {
	case s.Composite >= 0:
		position = x.position(s.Composite)
	default:
		bracket := false
		for _, a := range x.text.Args {
			bracket = bracket || a.Text != nil && pgplan.Composite(*a.Text)
		}
		if !bracket {
			return nil
		}
	}
	d := &x.session.domains
	if d.old() {
		if failure := x.askDomains(d); failure != nil {
			return failure
		}
	}
	if d.acting == "" {
		return nil
	}
	return denied(position, "the statement is refused: %s", d.reason())
}

func (d *domains) old() bool { return d.asked.IsZero() || time.Since(d.asked) > domainsLife }

// reason is why a literal that begins with a bracket is refused.
func (d *domains) reason() string {
	return fmt.Sprintf("a literal begins with a bracket, and if it is one of the domain %s in an array or a row PostgreSQL runs %s when it reads the statement: name that in functions of the data source's policy if it may be run, or give the literal another form",
		d.acting, d.function)
}

func (x *execution) askDomains(d *domains) *proto.Error {
	rows, refusal, err := x.wire.simple(domainsQuery)
	switch {
	case err != nil:
		return x.broken(err)
	case refusal != nil:
		return x.tell(refusal, 0)
	}
	if !d.learn(rows, x.request.Guard.Functions) {
		return proto.Errorf(proto.CodeInternal, "the server's answer about domains is not understood")
	}
	return nil
}

// learn reads the answer to domainsQuery; false: it is not understood.
func (d *domains) learn(rows [][]string, functions []string) bool {
	found := domains{asked: time.Now()}
	for _, row := range rows {
		if len(row) != 6 {
			return false
		}
		c := pgplan.Candidate{Schema: row[1], Name: row[2], BuiltIn: row[3] == "t", Volatility: row[4], Extension: row[5]}
		if !c.Plannable(functions) {
			found.acting, found.function = clean(row[0]), clean(c.Schema+"."+c.Name)
			break
		}
	}
	if len(rows) >= 10000 && found.acting == "" {
		found.acting, found.function = "?", "one of too many functions"
	}
	*d = found
	return true
}
