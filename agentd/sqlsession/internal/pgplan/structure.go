package pgplan

import (
	"encoding/json"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/plandoc"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/sqltext"
)

// MaxPlan bounds the server's plan in bytes.
const MaxPlan = plandoc.MaxPlan

// ErrGarbled is returned for what is no plan in JSON.
var ErrGarbled = plandoc.ErrGarbled

// Numbers says which numbers Structure keeps.
type Numbers bool

// What becomes of estimates of rows and costs.
const (
	NoNumbers Numbers = false
	Magnitude Numbers = true // a power of ten
)

// member is one of an object's, in the server's order.
type member = plandoc.Member

// Check makes one line of canonical JSON of the server's plan, all of which is
// kept. text, which may be nil, sees every text in it and returns what to tell.
func Check(plan []byte, text func(string) string) ([]byte, error) {
	v, err := plandoc.Decode(plan)
	if err != nil {
		return nil, err
	}
	return plandoc.Encode(v, text), nil
}

// Structure makes a plan without literals of the server's: nodes, tables, indexes,
// sort keys, and conditions in which every literal is a question mark. Members
// that are not known to be harmless are left out.
func Structure(plan []byte, numbers Numbers) ([]byte, error) {
	v, err := plandoc.Decode(plan)
	if err != nil {
		return nil, err
	}
	list, ok := v.([]any)
	if !ok || len(list) != 1 {
		return nil, ErrGarbled
	}
	top, ok := list[0].([]member)
	if !ok {
		return nil, ErrGarbled
	}
	kept := []member{}
	for _, m := range top {
		if root, ok := m.Value.([]member); ok && m.Key == "Plan" {
			kept = append(kept, member{Key: "Plan", Value: reduce(root, numbers)})
		}
	}
	if len(kept) == 0 {
		return nil, ErrGarbled
	}
	return plandoc.Encode([]any{kept}, nil), nil
}

// The members of a node that are told below full.
var (
	names = keys("Node Type", "Strategy", "Partial Mode", "Operation", "Command", "Join Type", "Parent Relationship", "Subplan Name",
		"Scan Direction", "Index Name", "Relation Name", "Schema", "Alias", "Function Name", "Table Function Name", "CTE Name",
		"Tuplestore Name", "Conflict Resolution", "Cache Mode", "Conflict Arbiter Indexes", "Sampling Method")
	flags       = keys("Parallel Aware", "Async Capable", "Inner Unique", "Single Copy", "Disabled")
	expressions = keys("Sort Key", "Presorted Key", "Group Key", "Hash Key", "Group Keys", "Hash Keys", "Key", "Filter", "Index Cond",
		"Recheck Cond", "Hash Cond", "Merge Cond", "Join Filter", "One-Time Filter", "TID Cond", "Order By", "Run Condition",
		"Conflict Filter", "Cache Key", "Window")
	parts     = keys("Plans", "Grouping Sets", "Target Tables")
	estimates = keys("Plan Rows", "Total Cost")
)

func keys(list ...string) map[string]bool {
	s := make(map[string]bool)
	for _, k := range list {
		s[k] = true
	}
	return s
}

func reduce(node []member, numbers Numbers) []member {
	kept := []member{}
	for _, m := range node {
		switch {
		case names[m.Key]:
			if text, ok := texts(m.Value, func(s string) string { return s }); ok {
				kept = append(kept, member{Key: m.Key, Value: text})
			}
		case flags[m.Key]:
			if flag, ok := m.Value.(bool); ok {
				kept = append(kept, member{Key: m.Key, Value: flag})
			}
		case expressions[m.Key]:
			if text, ok := texts(m.Value, sqltext.Redact); ok {
				kept = append(kept, member{Key: m.Key, Value: text})
			}
		case parts[m.Key]:
			list, ok := m.Value.([]any)
			if !ok {
				continue
			}
			inner := []any{}
			for _, part := range list {
				if part, ok := part.([]member); ok {
					inner = append(inner, reduce(part, numbers))
				}
			}
			kept = append(kept, member{Key: m.Key, Value: inner})
		case estimates[m.Key] && numbers == Magnitude:
			if n, ok := m.Value.(json.Number); ok {
				kept = append(kept, member{Key: m.Key, Value: plandoc.Magnitude(n)})
			}
		}
	}
	return kept
}

// texts applies f to a text, or to the texts of lists of them.
func texts(v any, f func(string) string) (any, bool) {
	switch v := v.(type) {
	case string:
		return f(v), true
	case []any:
		out := []any{}
		for _, e := range v {
			if e, ok := texts(e, f); ok {
				out = append(out, e)
			}
		}
		return out, true
	}
	return nil, false
}
