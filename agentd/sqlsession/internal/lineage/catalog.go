package lineage

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
)

// maxRows bounds the catalog's answer.
const maxRows = 50_000

// SQLCatalog asks PostgreSQL's catalogs. Query runs SQL texts of our own by the
// simple protocol, in the transaction of the statement, and returns the rows of
// all of them as text, NULL as "".
type SQLCatalog struct {
	Query func(sql string) ([][]string, error)
	// OneByOne gives Query one statement at a time.
	OneByOne bool
}

var _ Catalog = SQLCatalog{}

// Look implements Catalog in one round trip, or one for each statement.
func (c SQLCatalog) Look(_ context.Context, relations, functions []Name, operators []string) (Found, error) {
	found := Found{Relations: map[Name]*Relation{}, Functions: map[Name][]Function{}}
	var statements []string
	if len(relations) > 0 {
		statements = append(statements, relationsSQL(relations), columnsSQL(relations))
	}
	if len(functions) > 0 {
		statements = append(statements, functionsSQL(functions))
	}
	if len(operators) > 0 {
		statements = append(statements, operatorsSQL(operators))
	}
	if !c.OneByOne {
		statements = []string{strings.Join(statements, ";\n")}
	}
	var rows [][]string
	for _, sql := range statements {
		more, err := c.Query(sql)
		if err != nil {
			return Found{}, err
		}
		rows = append(rows, more...)
	}
	if len(rows) > maxRows {
		return Found{}, &Refusal{Reason: "the statement names more of the catalog than can be followed: its masked columns can't be told"}
	}
	byOID := map[string]*Relation{}
	for _, row := range rows {
		if err := c.row(row, &found, byOID, relations, functions); err != nil {
			return Found{}, err
		}
	}
	return found, nil
}

func (SQLCatalog) row(row []string, found *Found, byOID map[string]*Relation, relations, functions []Name) error {
	bad := fmt.Errorf("the catalog's answer is not understood: %d columns", len(row))
	if len(row) == 0 {
		return bad
	}
	index := func(s string, n int) (int, error) {
		i, err := strconv.Atoi(s)
		if err != nil || i < 0 || i >= n {
			return 0, bad
		}
		return i, nil
	}
	switch {
	case row[0] == "r" && len(row) == 8:
		i, err := index(row[1], len(relations))
		if err != nil {
			return err
		}
		r := byOID[row[2]]
		if r == nil {
			oid, err := strconv.ParseUint(row[2], 10, 32)
			if err != nil || len(row[5]) != 1 {
				return bad
			}
			r = &Relation{OID: uint32(oid), Schema: row[3], Name: row[4], Kind: row[5][0], Definition: row[6]}
			var family [][2]string
			if err := json.Unmarshal([]byte(row[7]), &family); err != nil {
				return bad
			}
			for _, f := range family {
				r.Family = append(r.Family, Name{f[0], f[1]})
			}
			byOID[row[2]] = r
		}
		found.Relations[relations[i]] = r
	case row[0] == "c" && len(row) == 5:
		r := byOID[row[1]]
		n, err := strconv.ParseInt(row[2], 10, 16)
		if r == nil || err != nil {
			return bad
		}
		r.Columns = append(r.Columns, Column{Name: row[3], Number: int16(n), Generated: row[4]})
	case row[0] == "f" && len(row) == 10:
		i, err := index(row[1], len(functions))
		if err != nil {
			return err
		}
		f, err := function(row[2:])
		if err != nil {
			return err
		}
		found.Functions[functions[i]] = append(found.Functions[functions[i]], f)
	case row[0] == "o" && len(row) == 10:
		f, err := function(row[2:])
		if err != nil {
			return err
		}
		found.Operators = append(found.Operators, Operator{Name: row[1], Function: f})
	default:
		return bad
	}
	return nil
}

func function(row []string) (Function, error) {
	oid, err := strconv.ParseUint(row[0], 10, 32)
	f := Function{OID: uint32(oid), Schema: row[1], Name: row[2], Extension: row[3], Set: row[4] == "t", Volatile: row[5] == "t", Composite: row[7] == "t"}
	if err == nil && row[6] != "" {
		err = json.Unmarshal([]byte(row[6]), &f.Out)
	}
	if err != nil {
		return f, fmt.Errorf("the catalog's answer is not understood: a function")
	}
	return f, nil
}

// literal quotes a text for SQL whatever standard_conforming_strings is.
func literal(s string) string {
	s = strings.ReplaceAll(s, "'", "''")
	if strings.Contains(s, `\`) {
		return " E'" + strings.ReplaceAll(s, `\`, `\\`) + "'"
	}
	return "'" + s + "'"
}

func identifier(s string) string { return `"` + strings.ReplaceAll(s, `"`, `""`) + `"` }

// In all of these every name is qualified: the statement's search_path is not
// trusted.

// namesSQL are names as rows v (i, q), q as to_regclass takes it.
func namesSQL(relations []Name) string {
	var values []string
	for i, n := range relations {
		name := identifier(n.Name)
		if n.Schema != "" {
			name = identifier(n.Schema) + "." + name
		}
		values = append(values, fmt.Sprintf("(%d,%s)", i, literal(name)))
	}
	return "(VALUES " + strings.Join(values, ",") + ") v (i, q)"
}

// relationsSQL asks for relations as the server resolves their names.
func relationsSQL(relations []Name) string {
	return `SELECT 'r', v.i, c.oid, n.nspname, c.relname, c.relkind,
 CASE WHEN c.relkind OPERATOR(pg_catalog.=) ANY ('{v,m}'::pg_catalog."char"[]) AND c.oid OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid THEN pg_catalog.pg_get_viewdef(c.oid) ELSE '' END,
 CASE WHEN c.relkind OPERATOR(pg_catalog.=) ANY ('{r,p,f}'::pg_catalog."char"[]) THEN (
  WITH RECURSIVE up (oid) AS (
    SELECT h.inhparent FROM pg_catalog.pg_inherits h WHERE h.inhrelid OPERATOR(pg_catalog.=) c.oid
    UNION SELECT h.inhparent FROM up JOIN pg_catalog.pg_inherits h ON h.inhrelid OPERATOR(pg_catalog.=) up.oid
  ), down (oid) AS (
    SELECT h.inhrelid FROM pg_catalog.pg_inherits h WHERE h.inhparent OPERATOR(pg_catalog.=) c.oid
    UNION SELECT h.inhrelid FROM down JOIN pg_catalog.pg_inherits h ON h.inhparent OPERATOR(pg_catalog.=) down.oid
  )
  SELECT coalesce(pg_catalog.json_agg(pg_catalog.json_build_array(fn.nspname, fc.relname)), '[]'::pg_catalog.json)
  FROM (SELECT oid FROM up UNION SELECT oid FROM down) k
  JOIN pg_catalog.pg_class fc ON fc.oid OPERATOR(pg_catalog.=) k.oid
  JOIN pg_catalog.pg_namespace fn ON fn.oid OPERATOR(pg_catalog.=) fc.relnamespace
 ) ELSE '[]'::pg_catalog.json END
 FROM ` + namesSQL(relations) + `
 JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) pg_catalog.to_regclass(v.q)::pg_catalog.oid
 JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace`
}

// columnsSQL asks for their columns, after relationsSQL.
func columnsSQL(relations []Name) string {
	return `SELECT 'c', c.oid, a.attnum, a.attname,
 CASE WHEN a.attgenerated OPERATOR(pg_catalog.<>) ''::pg_catalog."char" THEN pg_catalog.pg_get_expr(d.adbin, d.adrelid) ELSE '' END
 FROM (SELECT DISTINCT pg_catalog.to_regclass(v.q)::pg_catalog.oid AS oid FROM ` + namesSQL(relations) + `) c
 JOIN pg_catalog.pg_attribute a ON a.attrelid OPERATOR(pg_catalog.=) c.oid AND a.attnum OPERATOR(pg_catalog.>) 0::pg_catalog.int2 AND NOT a.attisdropped
 LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid OPERATOR(pg_catalog.=) a.attrelid AND d.adnum OPERATOR(pg_catalog.=) a.attnum
 ORDER BY c.oid USING OPERATOR(pg_catalog.<), a.attnum USING OPERATOR(pg_catalog.<)`
}

// functionColumnsSQL are the columns that function reads, of pg_proc p in
// pg_namespace n.
const functionColumnsSQL = `p.oid, n.nspname, p.proname,
 (SELECT x.extname FROM pg_catalog.pg_depend d JOIN pg_catalog.pg_extension x ON x.oid OPERATOR(pg_catalog.=) d.refobjid
  WHERE d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_proc'::pg_catalog.regclass::pg_catalog.oid AND d.objid OPERATOR(pg_catalog.=) p.oid
   AND d.refclassid OPERATOR(pg_catalog.=) 'pg_catalog.pg_extension'::pg_catalog.regclass::pg_catalog.oid
   AND d.deptype OPERATOR(pg_catalog.=) 'e'::pg_catalog."char" LIMIT 1),
 p.proretset,
 p.provolatile OPERATOR(pg_catalog.=) 'v'::pg_catalog."char",
 (SELECT pg_catalog.json_agg(coalesce(p.proargnames[u.place], '') ORDER BY u.place USING OPERATOR(pg_catalog.<))
  FROM pg_catalog.unnest(p.proargmodes) WITH ORDINALITY u (mode, place) WHERE u.mode OPERATOR(pg_catalog.=) ANY ('{o,b,t}'::pg_catalog."char"[])),
 t.typtype OPERATOR(pg_catalog.=) 'c'::pg_catalog."char" OR t.typname OPERATOR(pg_catalog.=) ANY ('{anyelement,anycompatible,record}'::pg_catalog.name[]) AND p.proargmodes IS NULL
  AND p.proname OPERATOR(pg_catalog.<>) 'unnest'::pg_catalog.name`

func functionsSQL(functions []Name) string {
	var values []string
	for i, n := range functions {
		values = append(values, fmt.Sprintf("(%d,%s::pg_catalog.name,%s::pg_catalog.name)", i, literal(n.Schema), literal(n.Name)))
	}
	return `SELECT 'f', v.i, ` + functionColumnsSQL + `
 FROM (VALUES ` + strings.Join(values, ",") + `) v (i, s, f)
 JOIN pg_catalog.pg_proc p ON p.proname OPERATOR(pg_catalog.=) v.f
 JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) p.pronamespace
 JOIN pg_catalog.pg_type t ON t.oid OPERATOR(pg_catalog.=) p.prorettype
 WHERE CASE WHEN v.s OPERATOR(pg_catalog.=) ''::pg_catalog.name THEN n.nspname OPERATOR(pg_catalog.=) ANY (pg_catalog.current_schemas(true)) ELSE n.nspname OPERATOR(pg_catalog.=) v.s END`
}

// operatorsSQL asks for operators that are not PostgreSQL's own, wherever they
// are: OPERATOR(schema.name) reaches them all.
func operatorsSQL(operators []string) string {
	var values []string
	for _, o := range operators {
		values = append(values, "("+literal(o)+"::pg_catalog.name)")
	}
	return `SELECT 'o', o.oprname, ` + functionColumnsSQL + `
 FROM (VALUES ` + strings.Join(values, ",") + `) v (o)
 JOIN pg_catalog.pg_operator o ON o.oprname OPERATOR(pg_catalog.=) v.o AND o.oid OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid
 JOIN pg_catalog.pg_proc p ON p.oid OPERATOR(pg_catalog.=) o.oprcode::pg_catalog.oid
 JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) p.pronamespace
 JOIN pg_catalog.pg_type t ON t.oid OPERATOR(pg_catalog.=) p.prorettype`
}
