package child

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/mysqlguard"
	"github.com/postern-dev/postern/proto"
)

const (
	// maxViews bounds how many views one statement may use, also through others.
	maxViews = 200
	// maxNames bounds how many names of a statement are looked up.
	maxNames = 5000
)

// systemSchemas are the server's own; what is in the first two can't be changed.
var systemSchemas = map[string]bool{"information_schema": true, "performance_schema": true}

// judgeNames looks at what a statement of a read-only source may mean by its names:
// a view that calls functions, a stored function with the name of a built-in one of
// another version. The server is asked for everything of such a name, in any
// database, so that no parser is needed; what can't be seen is refused.
func (x *mysqlExecution) judgeNames(ctx context.Context, uses mysqlguard.Uses) (*proto.Error, error) {
	functions := x.request.Guard.Functions
	seen := map[string]bool{}
	names := uses.Names
	called := map[string]int{}
	for _, c := range uses.Calls {
		if called[c.Name] == 0 {
			called[c.Name] = c.Position
		}
	}
	if failure, err := x.judgeCalls(ctx, called, ""); failure != nil || err != nil {
		return failure, err
	}
	looked := map[string]bool{}
	views := 0
	for len(names) > 0 {
		var ask []string
		for _, n := range names {
			if !looked[n] {
				looked[n] = true
				ask = append(ask, n)
			}
		}
		names = nil
		if len(looked) > maxNames {
			return denied(0, "the statement is refused: it has more than %d names", maxNames), nil
		}
		if len(ask) == 0 {
			break
		}
		question := "SELECT TABLE_SCHEMA, TABLE_NAME, VIEW_DEFINITION FROM information_schema.VIEWS WHERE LOWER(TABLE_NAME) IN (?" + strings.Repeat(",?", len(ask)-1) + ")"
		found, err := x.ask(ctx, question, ask...)
		if err != nil {
			return nil, err
		}
		for _, row := range found {
			schema, view, definition := row[0], row[1], row[2]
			key := schema + "\x00" + view
			if seen[key] || systemSchemas[strings.ToLower(schema)] || mysqlguard.Allowed(functions, schema, view) {
				continue
			}
			seen[key] = true
			if views++; views > maxViews {
				return denied(0, "the statement is refused: it may use more than %d views", maxViews), nil
			}
			if definition == "" {
				return denied(0, "the statement is refused: what the view %s.%s does can't be seen: grant the account SHOW VIEW on it, or list the view in policy.functions", clean(schema), clean(view)), nil
			}
			used, refusal := mysqlguard.View(definition, schema, functions)
			if refusal != nil {
				return denied(0, "the statement is refused: it may use the view %s.%s, and there %s", clean(schema), clean(view), refusal.Reason), nil
			}
			inner := map[string]int{}
			for _, c := range used.Calls {
				inner[c.Name] = 0
			}
			if failure, err := x.judgeCalls(ctx, inner, fmt.Sprintf("it may use the view %s.%s, and there ", clean(schema), clean(view))); failure != nil || err != nil {
				return failure, err
			}
			if failure, err := x.judgeTables(ctx, schema, view, used.Tables); failure != nil || err != nil {
				return failure, err
			}
			names = append(names, used.Names...)
		}
	}
	return nil, nil
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

// routineAge is for how long the list of stored and loaded functions is believed.
const routineAge = 2 * time.Second

// judgeCalls refuses calls of functions that are the server's own by name and
// somebody else's in truth.
func (x *mysqlExecution) judgeCalls(ctx context.Context, called map[string]int, where string) (*proto.Error, error) {
	if len(called) == 0 {
		return nil, nil
	}
	if time.Since(x.routinesAt) > routineAge || x.routines == nil {
		routines := map[string]bool{}
		err := x.each(ctx, "SELECT LOWER(ROUTINE_NAME) FROM information_schema.ROUTINES WHERE ROUTINE_TYPE = 'FUNCTION' AND ROUTINE_SCHEMA <> 'sys'", nil, func(row []string) error {
			routines[row[0]] = true
			return nil
		})
		if err != nil {
			return nil, err
		}
		// Loaded functions: not every account may read these tables.
		loaded := "SELECT LOWER(UDF_NAME) FROM performance_schema.user_defined_functions WHERE UDF_LIBRARY IS NOT NULL"
		if x.mariadb {
			loaded = "SELECT LOWER(name) FROM mysql.func"
		}
		err = x.each(ctx, loaded, nil, func(row []string) error {
			routines[row[0]] = true
			return nil
		})
		if err != nil && isBroken(err) {
			return nil, err
		}
		x.routines, x.routinesAt = routines, time.Now()
	}
	for name, position := range called {
		if x.routines[name] {
			return denied(position, "the statement is refused: %sthe function %s may be a stored or loaded one of the same name, and policy.functions does not list it", where, clean(name)), nil
		}
	}
	return nil, nil
}
