package lineage

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	pgquery "github.com/pganalyze/pg_query_go/v6"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
	"github.com/postern-dev/postern/proto/glob"
)

// Name is a name in a statement; Schema is "" where none is written.
type Name struct{ Schema, Name string }

// String implements fmt.Stringer.
func (n Name) String() string {
	if n.Schema == "" {
		return n.Name
	}
	return n.Schema + "." + n.Name
}

// Column is a column of a relation.
type Column struct {
	Name   string
	Number int16
	// Generated is the expression of a generated column, or "".
	Generated string
}

// Relation is a table, view, materialized view, foreign table or the like.
type Relation struct {
	OID          uint32
	Schema, Name string
	Kind         byte     // pg_class.relkind
	Columns      []Column // in order, without dropped ones
	// Definition is the query of a view or materialized view, by
	// pg_get_viewdef; "" for those of the system.
	Definition string
	// Family are the relations that this one inherits from, or that inherit
	// from it, at any distance.
	Family []Name
}

// firstUser is the first OID that is not PostgreSQL's own.
const firstUser = 16384

func (r *Relation) system() bool { return r.OID < firstUser }

// Function is one function that a name may stand for.
type Function struct {
	OID          uint32
	Schema, Name string
	Extension    string // the one that it belongs to, or ""
	Set          bool   // returns a set
	Volatile     bool   // may change something, and so pass on what it is given
	// Out are the names of the columns that it returns, if there are several.
	Out []string
	// Composite tells that it returns rows whose columns are not known here.
	Composite bool
}

// Operator is an operator that is not PostgreSQL's own, by its function.
type Operator struct {
	Name     string
	Function Function
}

// Catalog looks names up as the server would for the statement at hand.
type Catalog interface {
	// Look finds relations (absent: there is none, the name is a CTE's),
	// functions (all that may be meant, in all schemas of the search path) and
	// those operators of these names that are not PostgreSQL's own.
	Look(ctx context.Context, relations, functions []Name, operators []string) (Found, error)
}

// Found is the answer of a Catalog.
type Found struct {
	Relations map[Name]*Relation
	Functions map[Name][]Function
	Operators []Operator
}

// The filters, in package policy's words.
const (
	FiltersAllow    = "allow"
	FiltersEquality = "equality"
	FiltersRefuse   = "refuse"
)

// Rule says which columns are masked.
type Rule struct {
	Columns []string // globs of TABLE.COLUMN or SCHEMA.TABLE.COLUMN
	// Null tells that what is made of such a column becomes NULL; else it is
	// redacted.
	Null bool
}

// Policy is what statements are held against. Rules without Columns count for
// nothing here.
type Policy struct {
	Rules     []Rule
	Filters   string   // "" is equality
	Safe      []string // globs of functions whose result may be told
	Functions []string // globs of functions that may be called
}

// Active tells whether there is any rule for columns.
func (p *Policy) Active() bool {
	for _, r := range p.Rules {
		if len(r.Columns) > 0 {
			return true
		}
	}
	return false
}

// Covers is the first rule for a column of a table, or -1, for engines that find names
// without regard to case: case does not count. The server's own schemas are meant by rules
// alone that name them. An empty column asks for any column of the table.
func (p *Policy) Covers(schema, table, column string) int {
	schema, table, column = strings.ToLower(schema), strings.ToLower(table), strings.ToLower(column)
	for i, r := range p.Rules {
		for _, c := range r.Columns {
			parts := strings.Split(strings.ToLower(c), ".")
			n := len(parts)
			if n == 2 && (schema == "information_schema" || schema == "performance_schema") {
				continue
			}
			if (n == 2 || schema == "" || glob.Match(parts[0], schema)) && glob.Match(parts[n-2], table) && (column == "" || glob.Match(parts[n-1], column)) {
				return i
			}
		}
	}
	return -1
}

// Output is one column of a result.
type Output struct {
	Name string
	// Masked tells that it must be masked: by Rule (an index of Policy.Rules)
	// if it is a plain copy of a masked column (Plain), else redacted or, with
	// Null, made NULL.
	Masked, Plain, Null bool
	Rule                int
	// Source is the masked column, or one of them: SCHEMA.TABLE.COLUMN.
	Source string
	// Relation and Number are the column that it copies, masked or not; 0:
	// none, or not known.
	Relation uint32
	Number   int16
	// Named tells that Name is certain.
	Named bool
}

// Plan is the answer for one statement.
type Plan struct {
	Columns []Output
	// Known is false for a statement whose result, if any, is not of rows of
	// relations (SET, BEGIN): then Columns says nothing.
	Known bool
	// Touches tells that the statement reads, or may read, relations with
	// masked columns, or writes: what the server says of its failure may quote
	// values.
	Touches bool
	masked  map[origin]bool
	known   map[uint32]bool
}

type origin struct {
	relation uint32
	number   int16
}

// MaskedOrigin tells whether the server's word on where a column comes from
// (RowDescription) names a masked column; unknown, that the statement's
// analysis never met the relation.
func (p *Plan) MaskedOrigin(relation uint32, number int16) (masked, unknown bool) {
	return p.masked[origin{relation, number}], !p.known[relation]
}

// Refusal says why a statement may not run.
type Refusal struct {
	Reason string
	// Position is in characters from 1 in the text that was parsed; 0: unknown.
	Position int
}

// Error implements error.
func (r *Refusal) Error() string { return r.Reason }

const (
	maxDepth     = 100
	maxRelations = 2000
	maxViewDepth = 32
	maxSteps     = 500_000
)

// analyzer is the state of one analysis.
type analyzer struct {
	ctx     context.Context
	text    string
	parser  pgtree.Parser
	catalog Catalog
	policy  *Policy

	found   Found
	views   map[uint32][]col // of relations with a definition, once analyzed
	trees   map[uint32]*pgquery.Node
	under   map[uint32]bool // views being analyzed
	made    map[uint32]bool // relations whose columns a masked one may not be compared with
	at      int             // where in the text the view was named that is being analyzed; -1: none
	depth   int
	steps   int
	touches bool
	plan    *Plan
}

// failure carries an error out of the analysis by panic.
type failure struct{ err error }

// Analyze looks at one statement, stmt, of the parsed text. The error is a
// *Refusal, or that of the parser or catalog.
func Analyze(ctx context.Context, text string, stmt *pgquery.Node, parser pgtree.Parser, catalog Catalog, policy *Policy) (plan *Plan, err error) {
	a := &analyzer{
		ctx: ctx, text: text, parser: parser, catalog: catalog, policy: policy, views: map[uint32][]col{}, trees: map[uint32]*pgquery.Node{}, under: map[uint32]bool{}, made: map[uint32]bool{}, at: -1,
		plan:  &Plan{masked: map[origin]bool{}, known: map[uint32]bool{}},
		found: Found{Relations: map[Name]*Relation{}, Functions: map[Name][]Function{}},
	}
	defer func() {
		switch v := recover().(type) {
		case nil:
		case failure:
			plan, err = nil, v.err
		default:
			panic(v)
		}
	}()
	if err := a.load(stmt); err != nil {
		return nil, err
	}
	a.statement(stmt)
	a.plan.Touches = a.plan.Touches || a.touches
	return a.plan, nil
}

// refuse ends the analysis.
func (a *analyzer) refuse(location int32, format string, args ...any) {
	panic(failure{&Refusal{Reason: fmt.Sprintf(format, args...), Position: a.position(location)}})
}

// position is in characters from 1. Locations inside a view's definition say
// nothing to the user: then it is where the view is named.
func (a *analyzer) position(location int32) int {
	at := int(location)
	if a.at >= 0 {
		at = a.at
	}
	if at <= 0 || at > len(a.text) {
		return 0
	}
	return utf8.RuneCountInString(a.text[:at]) + 1
}

// enter bounds nesting; the function that it returns ends the level.
func (a *analyzer) enter() func() {
	a.depth++
	if a.steps++; a.depth > maxDepth || a.steps > maxSteps {
		a.refuse(0, "the statement is nested too deeply to follow its masked columns")
	}
	return func() { a.depth-- }
}

// load looks up all names of a statement, and of the views in it, level by level.
func (a *analyzer) load(stmt *pgquery.Node) error {
	seen := names{relations: map[Name]bool{}, functions: map[Name]bool{}, operators: map[string]bool{}}
	roots := []*pgquery.Node{stmt}
	for level := 0; len(roots) > 0; level++ {
		if level > maxViewDepth {
			return &Refusal{Reason: fmt.Sprintf("views are nested deeper than %d levels: their masked columns can't be followed", maxViewDepth)}
		}
		next := names{relations: map[Name]bool{}, functions: map[Name]bool{}, operators: map[string]bool{}}
		for _, root := range roots {
			next.collect(root.ProtoReflect(), 0)
		}
		roots = nil
		relations, functions, operators := next.less(seen)
		if len(relations)+len(functions)+len(operators) == 0 {
			return nil
		}
		found, err := a.catalog.Look(a.ctx, relations, functions, operators)
		if err != nil {
			return err
		}
		for name, functions := range found.Functions {
			a.found.Functions[name] = functions
		}
		a.found.Operators = append(a.found.Operators, found.Operators...)
		for name, r := range found.Relations {
			if a.found.Relations[name] = r; len(a.found.Relations) > maxRelations {
				return &Refusal{Reason: fmt.Sprintf("the statement reads more than %d tables and views: its masked columns can't be followed", maxRelations)}
			}
			if r.Definition == "" || a.trees[r.OID] != nil {
				continue
			}
			tree, err := a.parser.Parse(a.ctx, r.Definition)
			var syntax *pgtree.SyntaxError
			if errors.As(err, &syntax) {
				return &Refusal{Reason: fmt.Sprintf("the definition of the view %s.%s is not understood, so its masked columns can't be followed", r.Schema, r.Name)}
			}
			if err != nil {
				return err
			}
			if len(tree.Stmts) != 1 || tree.Stmts[0].Stmt.GetSelectStmt() == nil {
				return &Refusal{Reason: fmt.Sprintf("the definition of the view %s.%s is not understood, so its masked columns can't be followed", r.Schema, r.Name)}
			}
			a.trees[r.OID] = tree.Stmts[0].Stmt
			roots = append(roots, tree.Stmts[0].Stmt)
		}
	}
	return nil
}

// ruleOf is the first rule for a column of a relation, or -1.
func (a *analyzer) ruleOf(r *Relation, column string) int {
	for i := range a.policy.Rules {
		rule := &a.policy.Rules[i]
		if rule.covers(Name{r.Schema, r.Name}, column) {
			return i
		}
		for _, relative := range r.Family {
			if rule.covers(relative, column) {
				return i
			}
		}
	}
	return -1
}

// covers tells whether the rule is for this column. The catalogs of the system
// are only meant by rules that name their schema.
func (r *Rule) covers(relation Name, column string) bool {
	for _, c := range r.Columns {
		parts := strings.Split(c, ".")
		n := len(parts)
		if systemSchema(relation.Schema) && (n == 2 || parts[0] != relation.Schema) {
			continue
		}
		if (n == 2 || glob.Match(parts[0], relation.Schema)) && glob.Match(parts[n-2], relation.Name) && glob.Match(parts[n-1], column) {
			return true
		}
	}
	return false
}

func systemSchema(name string) bool { return name == "pg_catalog" || name == "information_schema" }

// matches tells whether a function is meant by one of the globs (NAME or
// SCHEMA.NAME).
func matches(globs []string, f Function) bool {
	for _, g := range globs {
		schema, name, qualified := strings.Cut(g, ".")
		if !qualified {
			schema, name = "*", g
		}
		if glob.Match(schema, f.Schema) && glob.Match(name, f.Name) {
			return true
		}
	}
	return false
}
