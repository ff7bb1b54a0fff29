package child

import (
	"context"
	"errors"
	"fmt"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgcatalog"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgplan"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgproxy"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
	"github.com/postern-dev/postern/proto"
)

// metadata decides on a statement of a client of PostgreSQL's protocol on a source that
// shows metadata only, as execution.describe does: it is parsed and described. What reads
// the catalog alone may run, and so may what reads no relation and calls nothing but
// what looks at its arguments: it can tell no row.
func (j *wireJudge) metadata(ctx context.Context, server pgproxy.Asker, text string, tree *pgtree.Tree) (pgproxy.Verdict, *pgproxy.Refusal) {
	refuse := func(offset int, format string, args ...any) (pgproxy.Verdict, *pgproxy.Refusal) {
		return pgproxy.Verdict{}, metadataRefusal(characters(text, offset), "the statement is refused: "+format, args...)
	}
	calls, err := pgplan.Read(tree)
	var refusal *pgplan.Refusal
	switch {
	case errors.As(err, &refusal):
		return refuse(refusal.Offset, "%s", refusal.Message)
	case err != nil:
		return refuse(-1, "it is not understood")
	case calls.Kind == pgplan.Index:
		return refuse(-1, "CREATE INDEX: the data source tells metadata only")
	}
	catalog := pgcatalog.Judge(tree)
	if catalog.Reason != "" {
		return refuse(catalog.Offset, "%s", catalog.Reason)
	}
	if refusal := j.learnDomains(ctx, server); refusal != nil {
		return pgproxy.Verdict{}, refusal
	}
	v := pgproxy.Verdict{Reads: true}
	if j.domains.acting != "" {
		v.Bracket = metadataRefusal(0, "the statement is refused: %s", j.domains.reason())
		if calls.Composite >= 0 {
			return refuse(calls.Composite, "%s", j.domains.reason())
		}
	}
	v.DescribeOnly = metadataRefusal(0, "the statement is refused: the data source shows metadata only: it can be parsed and described, not run")
	if calls.Writes || calls.Kind != pgplan.Select || !catalog.Catalog && !catalog.None || !onlyReads(tree.Stmts[0].GetStmt().ProtoReflect(), true) {
		return v, nil
	}
	theirs := j.mayRun(ctx, server, text, tree, calls, catalog)
	switch {
	case theirs == nil:
		v.DescribeOnly = nil
	case theirs.Code != 0 || catalog.Catalog:
		return pgproxy.Verdict{}, theirs
	default:
		v.DescribeOnly = theirs
	}
	return v, nil
}

func metadataRefusal(position int, format string, args ...any) *pgproxy.Refusal {
	return &pgproxy.Refusal{SQLState: "42501", Message: clean(fmt.Sprintf(format, args...)), Position: position}
}

// meaningQuestion asks what names mean: $1 and $2 are schemas ("" where the search
// path decides) and names. A row: number, whether it came with the server, schema.
const meaningQuestion = `SELECT a.i, c.oid OPERATOR(pg_catalog.<) 16384::pg_catalog.oid, n.nspname
 FROM ROWS FROM (pg_catalog.unnest($1::pg_catalog.text[]), pg_catalog.unnest($2::pg_catalog.text[])) WITH ORDINALITY a (s, n, i)
 JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) pg_catalog.to_regclass(CASE WHEN a.s OPERATOR(pg_catalog.=) '' THEN pg_catalog.quote_ident(a.n)
  ELSE pg_catalog.concat(pg_catalog.quote_ident(a.s), '.', pg_catalog.quote_ident(a.n)) END)::pg_catalog.oid
 JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace`

// wholeRowQuestion asks for a function of a whole row that x.f may mean; $1 are the fs.
const wholeRowQuestion = `SELECT pg_catalog.min(p.proname::pg_catalog.text) FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_type t ON t.oid OPERATOR(pg_catalog.=) p.proargtypes[0]
 WHERE p.proname OPERATOR(pg_catalog.=) ANY ($1::pg_catalog.name[]) AND ` + takesRow + ``

// mayRun says why a statement of the catalog, or of nothing at all, must not run.
func (j *wireJudge) mayRun(ctx context.Context, server pgproxy.Asker, text string, tree *pgtree.Tree, calls *pgplan.Statement, catalog pgcatalog.Verdict) *pgproxy.Refusal {
	ask := func(sql string, parameters ...string) ([][]string, *pgproxy.Refusal) {
		rows, err := server.Ask(ctx, sql, parameters...)
		var theirs *pgproxy.Refusal
		switch {
		case errors.As(err, &theirs):
			if theirs.Code == 0 {
				theirs.Code = proto.CodeSQL
			}
			return nil, theirs
		case err != nil:
			return nil, &pgproxy.Refusal{SQLState: "57014", Message: "the statement is refused: the catalog could not be asked", Code: proto.CodeUnavailable}
		}
		return rows, nil
	}
	if len(catalog.Relations) > 0 {
		schemas, names := make([]string, len(catalog.Relations)), make([]string, len(catalog.Relations))
		for i, r := range catalog.Relations {
			schemas[i], names[i] = r.Schema, r.Name
		}
		rows, refusal := ask(meaningQuestion, string(arrayOf(schemas)), string(arrayOf(names)))
		if refusal != nil {
			return refusal
		}
		meant := make(map[string][]string)
		for _, row := range rows {
			if len(row) == 3 {
				meant[row[0]] = row
			}
		}
		for i, r := range catalog.Relations {
			row := meant[fmt.Sprint(i+1)]
			schema := r.Schema
			if schema == "" {
				schema = "pg_catalog"
			}
			switch {
			case row == nil: // WITH's own, or the server says that there is none
			case row[1] != "t", !r.Own && row[2] != schema:
				return metadataRefusal(0, "the statement is refused: %s, which looks like the catalog's, is another relation", clean(r.Name))
			}
		}
	}
	if len(calls.Fields) > 0 {
		rows, refusal := ask(wholeRowQuestion, string(arrayOf(fieldNames(calls.Fields))))
		switch {
		case refusal != nil:
			return refusal
		case len(rows) != 1 || len(rows[0]) != 1:
			return metadataRefusal(0, "the statement is refused: the server's answer about functions is not understood")
		case rows[0][0] != "":
			return metadataRefusal(0, "the statement is refused: .%s may be a call with a whole row: give the column another name", clean(rows[0][0]))
		}
	}
	rows, refusal := ask(fmt.Sprintf(namedCandidatesQuery, nameArray(calls.Functions), nameArray(calls.Operators), nameArray(calls.Fields)))
	if refusal != nil {
		return refusal
	}
	if len(rows) >= maxCandidates {
		return metadataRefusal(0, "the statement is refused: it names too many functions")
	}
	reason, offset, ok := refuseCalls(rows, calls, "the statement", j.guard.Functions, pgcatalog.Told)
	if !ok {
		return metadataRefusal(0, "the statement is refused: the server's answer about functions is not understood")
	}
	if reason != "" {
		return metadataRefusal(characters(text, offset), "%s", reason)
	}
	_, refusal = j.guarded(ctx, server, text, tree)
	return refusal
}

func fieldNames(names []pgplan.Name) []string {
	var list []string
	for _, n := range names {
		list = append(list, n.Name)
	}
	return list
}

// learnDomains asks for what is known of the database's domains, if that is old.
func (j *wireJudge) learnDomains(ctx context.Context, server pgproxy.Asker) *pgproxy.Refusal {
	if !j.domains.old() {
		return nil
	}
	rows, err := server.Ask(ctx, domainsQuery)
	var theirs *pgproxy.Refusal
	switch {
	case errors.As(err, &theirs):
		return theirs
	case err != nil, !j.domains.learn(rows, j.guard.Functions):
		return &pgproxy.Refusal{SQLState: "57014", Message: "the statement is refused: the catalog's answer about domains is not understood", Code: proto.CodeUnavailable}
	}
	return nil
}

// spare is pgcatalog.Spare for a statement that is refused without.
func spare(text string, tree *pgtree.Tree) (judged, sent string) {
	if v := pgcatalog.Judge(tree); !v.Catalog && !v.None {
		return "", ""
	}
	return pgcatalog.Spare(text, tree)
}

// discreetWords is what is told of an error of the server's on such a source.
func discreetWords(body []byte) *pgproxy.Refusal {
	e := discreetError(decodeError(body))
	return &pgproxy.Refusal{SQLState: clean(e.Code), Message: clean(e.Message), Hint: clean(e.Hint), Position: int(e.Position), Code: proto.CodeSQL}
}
