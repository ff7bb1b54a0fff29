package child

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/go-sql-driver/mysql"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/mysqlguard"
	"github.com/postern-dev/postern/proto"
)

const (
	// maxViews bounds how many views one statement may use, also through others.
	maxViews = 200
	// maxNames bounds how many names of a statement are looked up.
	maxNames = 5000
)

// systemSchemas are the server's own, which can't be changed.
var systemSchemas = map[string]bool{"information_schema": true, "performance_schema": true}

const (
	// objectAge is for how long the lists of views and functions are believed.
	objectAge = 2 * time.Second
	// maxObjects bounds those lists.
	maxObjects = 100_000
)

// mysqlObjects is what is looked up by name: what the server has now.
type mysqlObjects struct {
	at time.Time
	// views are schema and name, by name in the server's lower case.
	views map[string][][2]string
	// tables are all that can be read, views as well, likewise; nil unless columns are masked.
	tables map[string][][2]string
	// functions are the stored and loaded ones, in lower case; odd tells that some
	// have names beyond ASCII, which the server may find by other names.
	functions map[string]bool
	odd       bool
	// varying are those of the stored ones that are not declared deterministic, schema and
	// name in lower case: the server does not call them before a statement runs.
	varying map[[2]string]bool
}

// objects asks for the lists, or takes those of a moment ago.
func (s *mysqlSession) objectsNow(ctx context.Context) (*mysqlObjects, error) {
	tables := s.masking.hidesColumns()
	if s.objects != nil && time.Since(s.objects.at) < objectAge && (s.objects.tables != nil || !tables) {
		return s.objects, nil
	}
	o := &mysqlObjects{at: time.Now(), views: map[string][][2]string{}, functions: map[string]bool{}, varying: map[[2]string]bool{}}
	count := 0
	more := func() error {
		if count++; count > maxObjects {
			return errTooManyObjects
		}
		return nil
	}
	question := "SELECT LOWER(TABLE_NAME), TABLE_SCHEMA, TABLE_NAME, TABLE_TYPE FROM information_schema.TABLES"
	if tables {
		o.tables = map[string][][2]string{}
	} else {
		question += " WHERE TABLE_TYPE = 'VIEW'"
	}
	err := s.each(ctx, question, nil, func(row []string) error {
		if row[3] == "VIEW" {
			o.views[row[0]] = append(o.views[row[0]], [2]string{row[1], row[2]})
		}
		if tables {
			o.tables[row[0]] = append(o.tables[row[0]], [2]string{row[1], row[2]})
		}
		return more()
	})
	if err != nil {
		return nil, err
	}
	function := func(row []string) error {
		o.functions[row[0]] = true
		o.odd = o.odd || !isASCII(row[0])
		return more()
	}
	err = s.each(ctx, "SELECT LOWER(ROUTINE_NAME), LOWER(ROUTINE_SCHEMA), IS_DETERMINISTIC FROM information_schema.ROUTINES WHERE ROUTINE_TYPE = 'FUNCTION' AND ROUTINE_SCHEMA <> 'sys'", nil, func(row []string) error {
		if row[2] == "NO" {
			o.varying[[2]string{row[1], row[0]}] = true
		}
		return function(row)
	})
	if err != nil {
		return nil, err
	}
	// Loaded functions: not every account may read these tables.
	loaded := "SELECT LOWER(UDF_NAME) FROM performance_schema.user_defined_functions WHERE UDF_LIBRARY IS NOT NULL"
	if s.mariadb {
		loaded = "SELECT LOWER(name) FROM mysql.func"
	}
	var refusal *mysql.MySQLError
	if err := s.each(ctx, loaded, nil, function); err != nil && !errors.As(err, &refusal) {
		return nil, err
	}
	s.objects = o
	return o, nil
}

var errTooManyObjects = fmt.Errorf("the server has more than %d tables, views and functions", maxObjects)

func isASCII(text string) bool {
	return !strings.ContainsFunc(text, func(c rune) bool { return c >= utf8.RuneSelf })
}

// lower is names in the server's own lower case: beyond ASCII it has rules of its own.
func (s *mysqlSession) lower(ctx context.Context, names []string) ([]string, error) {
	var out, ask []string
	for _, n := range names {
		if isASCII(n) {
			out = append(out, strings.ToLower(n))
		} else {
			ask = append(ask, n)
		}
	}
	if len(ask) == 0 {
		return out, nil
	}
	rows, err := s.ask(ctx, "SELECT LOWER(?)"+strings.Repeat(", LOWER(?)", len(ask)-1), ask...)
	if err != nil || len(rows) != 1 {
		return nil, err
	}
	return append(out, rows[0]...), nil
}

// judgeNames looks at what a statement of a read-only source may mean by its names:
// a view that calls functions, a stored function with the name of a built-in one of
// another version. The server is asked for everything of such a name, in any
// database, so that no parser is needed; what can't be seen is refused. views tells
// whether any name may be a view's.
func (x *mysqlExecution) judgeNames(ctx context.Context, uses mysqlguard.Uses) (refused *proto.Error, views bool, failed error) {
	refused, views, _, failed = x.lookUp(ctx, uses)
	return refused, views, failed
}

// lookUp is judgeNames and gives all names besides, those of views as well.
func (x *mysqlExecution) lookUp(ctx context.Context, uses mysqlguard.Uses) (refused *proto.Error, views bool, all []string, failed error) {
	functions := x.request.Guard.Functions
	objects, err := x.objectsNow(ctx)
	if errors.Is(err, errTooManyObjects) {
		return denied(0, "the statement is refused: %s", err), false, nil, nil
	}
	if err != nil {
		return nil, false, nil, err
	}
	called := map[string]int{}
	for _, c := range uses.Calls {
		if called[c.Name] == 0 {
			called[c.Name] = c.Position
		}
	}
	if failure, err := x.judgeCalls(ctx, objects, called, ""); failure != nil || err != nil {
		return failure, false, nil, err
	}
	looked, seen := map[string]bool{}, map[[2]string]bool{}
	catalog := strings.EqualFold(x.database, catalogSchema) || x.show != nil && x.show.Kind == mysqlguard.ShowTableStatus
	for names := uses.Names; len(names) > 0; {
		all = append(all, names...)
		lowered, err := x.lower(ctx, names)
		if err != nil {
			return nil, false, nil, err
		}
		names = nil
		for _, n := range lowered {
			if looked[n] {
				continue
			}
			looked[n] = true
			catalog = catalog || n == catalogSchema
			if len(looked) > maxNames {
				return denied(0, "the statement is refused: it has more than %d names", maxNames), false, nil, nil
			}
			for _, view := range objects.views[n] {
				views = true
				if seen[view] || systemSchemas[strings.ToLower(view[0])] || mysqlguard.Allowed(functions, view[0], view[1]) {
					continue
				}
				seen[view] = true
				if len(seen) > maxViews {
					return denied(0, "the statement is refused: it may use more than %d views", maxViews), false, nil, nil
				}
				used, failure, err := x.judgeView(ctx, objects, view[0], view[1])
				if failure != nil || err != nil {
					return failure, false, nil, err
				}
				names = append(names, used.Names...)
			}
		}
	}
	if catalog && x.mariadb {
		failure, err := x.judgeCatalog(ctx, objects)
		return failure, views, all, err
	}
	return nil, views, all, nil
}

// catalogSchema is where the server tells of all tables and views.
const catalogSchema = "information_schema"

// judgeCatalog is for a statement that has MariaDB tell of views. To say what columns a
// view has, it prepares it, and when it prepares, it calls functions that are declared
// deterministic if their arguments are constant. So no view may have one that the policy
// does not list.
func (x *mysqlExecution) judgeCatalog(ctx context.Context, objects *mysqlObjects) (*proto.Error, error) {
	functions := x.request.Guard.Functions
	besides := func(schema, name string) bool { return objects.varying[[2]string{strings.ToLower(schema), name}] }
	var found *proto.Error
	err := x.each(ctx, "SELECT TABLE_SCHEMA, TABLE_NAME, VIEW_DEFINITION FROM information_schema.VIEWS WHERE TABLE_SCHEMA NOT IN ('sys', 'mysql')", nil, func(row []string) error {
		if found != nil || mysqlguard.Allowed(functions, row[0], row[1]) {
			return nil
		}
		why := "what that does can't be seen: grant the account SHOW VIEW on it, or list the view in policy.functions"
		if row[2] != "" {
			_, refusal := mysqlguard.View(row[2], row[0], functions, besides)
			if refusal == nil {
				return nil
			}
			why = refusal.Reason
		}
		found = denied(0, "the statement is refused: to answer it MariaDB prepares the view %s.%s, and there %s", clean(row[0]), clean(row[1]), why)
		return nil
	})
	return found, err
}

// judgeView looks into one view.
func (x *mysqlExecution) judgeView(ctx context.Context, objects *mysqlObjects, schema, view string) (mysqlguard.Uses, *proto.Error, error) {
	var none mysqlguard.Uses
	found, err := x.ask(ctx, "SELECT VIEW_DEFINITION FROM information_schema.VIEWS WHERE TABLE_SCHEMA = ? AND TABLE_NAME = ?", schema, view)
	if err != nil {
		return none, nil, err
	}
	if len(found) != 1 || found[0][0] == "" {
		return none, denied(0, "the statement is refused: what the view %s.%s does can't be seen: grant the account SHOW VIEW on it, or list the view in policy.functions", clean(schema), clean(view)), nil
	}
	used, refusal := mysqlguard.View(found[0][0], schema, x.request.Guard.Functions, nil)
	if refusal != nil {
		return none, denied(0, "the statement is refused: it may use the view %s.%s, and there %s", clean(schema), clean(view), refusal.Reason), nil
	}
	inner := map[string]int{}
	for _, c := range used.Calls {
		inner[c.Name] = 0
	}
	if failure, err := x.judgeCalls(ctx, objects, inner, fmt.Sprintf("it may use the view %s.%s, and there ", clean(schema), clean(view))); failure != nil || err != nil {
		return none, failure, err
	}
	failure, err := x.judgeTables(ctx, schema, view, used.Tables)
	return used, failure, err
}

// judgeTables refuses a view that is made of what the account can't see: it might be
// another view.
func (x *mysqlExecution) judgeTables(ctx context.Context, schema, view string, tables [][2]string) (*proto.Error, error) {
	for _, t := range tables {
		owner, table := t[0], t[1]
		if systemSchemas[strings.ToLower(owner)] || mysqlguard.Allowed(x.request.Guard.Functions, owner, table) {
			continue
		}
		rows, err := x.ask(ctx, "SELECT 1 FROM information_schema.TABLES WHERE TABLE_SCHEMA = ? AND TABLE_NAME = ? LIMIT 1", owner, table)
		if err != nil {
			return nil, err
		}
		if len(rows) == 0 {
			return denied(0, "the statement is refused: the view %s.%s is made of %s.%s, which the account can't see: grant it a right to that, or list the view in policy.functions",
				clean(schema), clean(view), clean(owner), clean(table)), nil
		}
	}
	return nil, nil
}

// judgeCalls refuses calls of functions that are the server's own by name and
// somebody else's in truth.
func (x *mysqlExecution) judgeCalls(ctx context.Context, objects *mysqlObjects, called map[string]int, where string) (*proto.Error, error) {
	for name, position := range called {
		if objects.functions[name] {
			return denied(x.text.Position(position), "the statement is refused: %sthe function %s may be a stored or loaded one of the same name, and policy.functions does not list it", where, clean(name)), nil
		}
	}
	if !objects.odd || len(called) == 0 {
		return nil, nil
	}
	// The server finds a function without regard to accents: it must say which.
	names := slices.Sorted(maps.Keys(called))
	rows, err := x.ask(ctx, "SELECT ROUTINE_NAME FROM information_schema.ROUTINES WHERE ROUTINE_TYPE = 'FUNCTION' AND CONVERT(ROUTINE_NAME USING utf8mb4) COLLATE utf8mb4_general_ci IN (?"+
		strings.Repeat(", ?", len(names)-1)+") LIMIT 1", names...)
	if err != nil {
		return nil, err
	}
	if len(rows) > 0 {
		return denied(0, "the statement is refused: %sit may call the stored function %s, and policy.functions does not list it", where, clean(rows[0][0])), nil
	}
	return nil, nil
}
