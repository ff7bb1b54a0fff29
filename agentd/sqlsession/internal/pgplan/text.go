package pgplan

import (
	"encoding/json"
	"fmt"
	"strings"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/plandoc"
)

// Text writes a plan in JSON, the server's or Structure's, as EXPLAIN does in lines. With
// costs off estimates are left out.
func Text(plan []byte, costs bool) ([]string, error) {
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
	w := &writer{costs: costs}
	for _, m := range top {
		if node, ok := m.Value.([]member); ok && m.Key == "Plan" {
			w.node(node, 0)
			continue
		}
		w.detail("", m)
	}
	return w.lines, nil
}

type writer struct {
	lines []string
	costs bool
}

// inLine are the members that a node's own line is made of, or that it needs no word of.
var inLine = keys("Node Type", "Strategy", "Partial Mode", "Operation", "Join Type", "Parent Relationship", "Subplan Name", "Parallel Aware", "Async Capable",
	"Scan Direction", "Index Name", "Relation Name", "Schema", "Alias", "Function Name", "CTE Name", "Tuplestore Name", "Table Function Name",
	"Startup Cost", "Total Cost", "Plan Rows", "Plan Width", "Actual Startup Time", "Actual Total Time", "Actual Rows", "Actual Loops",
	"Inner Unique", "Single Copy", "Plans", "Command")

func (w *writer) node(node []member, depth int) {
	get := make(map[string]string)
	for _, m := range node {
		get[m.Key] = scalarText(m.Value)
	}
	at, inner := "", "  "
	if depth > 0 {
		at = strings.Repeat(" ", 6*depth-4) + "->  "
		inner = strings.Repeat(" ", 6*depth+2)
		if name := get["Subplan Name"]; name != "" {
			w.lines = append(w.lines, strings.Repeat(" ", 6*depth-4)+name)
		}
	}
	w.lines = append(w.lines, at+label(get)+w.numbers(get))
	for _, m := range node {
		if !inLine[m.Key] {
			w.detail(inner, m)
		}
	}
	for _, m := range node {
		list, _ := m.Value.([]any)
		if m.Key != "Plans" {
			continue
		}
		for _, child := range list {
			if child, ok := child.([]member); ok {
				w.node(child, depth+1)
			}
		}
	}
}

// label is what a node is and what it is on.
func label(get map[string]string) string {
	name := get["Node Type"]
	switch name {
	case "Aggregate":
		name = map[string]string{"Sorted": "GroupAggregate", "Hashed": "HashAggregate", "Mixed": "MixedAggregate"}[get["Strategy"]]
		if name == "" {
			name = "Aggregate"
		}
	case "SetOp":
		if get["Strategy"] == "Hashed" {
			name = "HashSetOp"
		}
		name = strings.TrimSpace(name + " " + get["Command"])
	case "ModifyTable":
		name = get["Operation"]
	}
	if mode := get["Partial Mode"]; mode == "Partial" || mode == "Finalize" {
		name = mode + " " + name
	}
	if kind := get["Join Type"]; kind != "" && kind != "Inner" {
		if name == "Nested Loop" {
			name += " " + kind + " Join"
		} else {
			name = strings.TrimSuffix(name, " Join") + " " + kind + " Join"
		}
	}
	if get["Parallel Aware"] == "true" {
		name = "Parallel " + name
	}
	if get["Async Capable"] == "true" {
		name = "Async " + name
	}
	if get["Scan Direction"] == "Backward" {
		name += " Backward"
	}
	on := ""
	for _, key := range []string{"Relation Name", "Function Name", "Table Function Name", "CTE Name", "Tuplestore Name"} {
		if on == "" {
			on = get[key]
		}
	}
	plain := on
	if schema := get["Schema"]; schema != "" && on != "" {
		on = schema + "." + on
	}
	if index := get["Index Name"]; index != "" {
		if on == "" {
			return name + " on " + index // of a bitmap
		}
		name += " using " + index
	}
	alias := get["Alias"]
	switch {
	case on == "" && alias == "":
		return name
	case on == "":
		return name + " on " + alias
	case alias != "" && alias != plain:
		on += " " + alias
	}
	return name + " on " + on
}

func (w *writer) numbers(get map[string]string) string {
	var parts []string
	if w.costs && get["Total Cost"] != "" {
		cost := get["Total Cost"]
		if start := get["Startup Cost"]; start != "" {
			cost = start + ".." + cost
		}
		estimate := "cost=" + cost
		if rows := get["Plan Rows"]; rows != "" {
			estimate += " rows=" + rows
		}
		if width := get["Plan Width"]; width != "" {
			estimate += " width=" + width
		}
		parts = append(parts, "("+estimate+")")
	}
	if loops := get["Actual Loops"]; loops == "0" {
		parts = append(parts, "(never executed)")
	} else if loops != "" {
		actual := "rows=" + get["Actual Rows"] + " loops=" + loops
		if total := get["Actual Total Time"]; total != "" {
			actual = "time=" + get["Actual Startup Time"] + ".." + total + " " + actual
		}
		parts = append(parts, "(actual "+actual+")")
	}
	if len(parts) == 0 {
		return ""
	}
	return "  " + strings.Join(parts, " ")
}

// detail writes a member on a line of its own; counts that are 0 and what is false are
// left out, as EXPLAIN does.
func (w *writer) detail(at string, m member) {
	switch v := m.Value.(type) {
	case []member:
		w.lines = append(w.lines, at+m.Key+":")
		for _, part := range v {
			w.detail(at+"  ", part)
		}
	case []any:
		var texts []string
		for _, e := range v {
			if part, ok := e.([]member); ok {
				w.detail(at, member{Key: m.Key, Value: part})
				continue
			}
			texts = append(texts, scalarText(e))
		}
		if len(texts) > 0 {
			w.lines = append(w.lines, at+m.Key+": "+strings.Join(texts, ", "))
		}
	case bool:
		if v {
			w.lines = append(w.lines, at+m.Key+": true")
		}
	case json.Number:
		if v != "0" && v != "0.000" {
			w.lines = append(w.lines, at+m.Key+": "+v.String())
		}
	default:
		w.lines = append(w.lines, at+m.Key+": "+scalarText(v))
	}
}

// scalarText is one line of what is no object.
func scalarText(v any) string {
	switch v := v.(type) {
	case string:
		return strings.Join(strings.Split(v, "\n"), " ")
	case nil, []member:
		return ""
	case []any:
		var texts []string
		for _, e := range v {
			texts = append(texts, scalarText(e))
		}
		return strings.Join(texts, ", ")
	}
	return fmt.Sprint(v)
}
