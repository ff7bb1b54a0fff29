package plantext

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
)

// ErrGarbled is returned for what is no plan.
var ErrGarbled = errors.New("this is no plan in JSON")

// maxDepth bounds how deep a plan is nested.
const maxDepth = 1000

// member is one of an object's, in the order of the text.
type member struct {
	key   string
	value any // []member, []any, string, json.Number, bool or nil
}

// Lines returns the lines of a plan, without line breaks. They may hold any other
// character that the plan has.
func Lines(plan []byte) ([]string, error) {
	d := json.NewDecoder(bytes.NewReader(plan))
	d.UseNumber()
	v, err := decode(d, 0)
	if err != nil {
		return nil, err
	}
	p := &printer{}
	if object, ok := v.([]member); ok {
		if p.object(object, 0); len(p.lines) == 0 {
			return nil, ErrGarbled
		}
		return p.lines, nil
	}
	list, ok := v.([]any)
	if !ok || len(list) == 0 {
		return nil, ErrGarbled
	}
	for _, statement := range list {
		top, ok := statement.([]member)
		if !ok {
			return nil, ErrGarbled
		}
		for _, m := range top {
			if root, ok := m.value.([]member); ok && m.key == "Plan" {
				p.node(root, 0, true)
			} else if ok && m.key == "Planning" {
				p.properties(root, 0, m.key+": ")
			}
		}
		for _, m := range top {
			if n, ok := m.value.(json.Number); ok && strings.HasSuffix(m.key, "Time") {
				p.line(0, m.key+": "+n.String()+" ms")
			}
		}
	}
	if len(p.lines) == 0 {
		return nil, ErrGarbled
	}
	return p.lines, nil
}

type printer struct{ lines []string }

func (p *printer) line(indent int, text string) {
	text = strings.NewReplacer("\r", " ", "\n", " ").Replace(text)
	p.lines = append(p.lines, strings.Repeat(" ", indent)+text)
}

// fields are a node's members by key.
type fields map[string]any

func (f fields) text(key string) string {
	s, _ := f[key].(string)
	return s
}

func (f fields) number(key string) string {
	n, _ := f[key].(json.Number)
	return n.String()
}

// node prints a node and what is under it, as PostgreSQL's text form does.
func (p *printer) node(node []member, indent int, root bool) {
	f := fields{}
	for _, m := range node {
		f[m.key] = m.value
	}
	if name := f.text("Subplan Name"); name != "" {
		p.line(indent, name)
		indent += 2
	}
	arrow := "->  "
	if root {
		arrow = ""
	}
	p.line(indent, arrow+title(f)+numbers(f))
	inner := indent + 2
	if !root {
		inner = indent + len(arrow) + 2
	}
	p.properties(node, inner, "")
	plans, _ := f["Plans"].([]any)
	for _, plan := range plans {
		if plan, ok := plan.([]member); ok {
			p.node(plan, inner, false)
		}
	}
}

// object prints a plan of MySQL or MariaDB: an object, whose members differ by version,
// as an outline.
func (p *printer) object(object []member, indent int) {
	for _, m := range object {
		switch v := m.value.(type) {
		case []member:
			p.line(indent, m.key+":")
			p.object(v, indent+2)
		case []any:
			p.items(m.key, v, indent)
		default:
			p.line(indent, m.key+": "+scalar(v))
		}
	}
}

// items prints a list: scalars on one line, then objects with a dash before each.
func (p *printer) items(key string, list []any, indent int) {
	title := key + ":"
	for i, e := range list {
		switch e.(type) {
		case []member, []any:
		default:
			if i > 0 {
				title += ","
			}
			title += " " + scalar(e)
		}
	}
	p.line(indent, title)
	for _, e := range list {
		switch e := e.(type) {
		case []member:
			first := len(p.lines)
			p.object(e, indent+4)
			if first < len(p.lines) {
				p.lines[first] = strings.Repeat(" ", indent+2) + "- " + p.lines[first][indent+4:]
			}
		case []any:
			p.items("-", e, indent+2)
		}
	}
}

func scalar(v any) string {
	switch v := v.(type) {
	case nil:
		return "null"
	case string:
		return v
	}
	return fmt.Sprint(v)
}

// inTitle are members that the title, the numbers or nobody shows.
var inTitle = map[string]bool{
	"Node Type": true, "Strategy": true, "Partial Mode": true, "Operation": true, "Command": true, "Join Type": true,
	"Parent Relationship": true, "Subplan Name": true, "Scan Direction": true, "Index Name": true, "Relation Name": true, "Schema": true,
	"Alias": true, "Function Name": true, "Table Function Name": true, "CTE Name": true, "Tuplestore Name": true, "Parallel Aware": true,
	"Async Capable": true, "Single Copy": true, "Plans": true, "Startup Cost": true, "Total Cost": true, "Plan Rows": true, "Plan Width": true,
	"Actual Startup Time": true, "Actual Total Time": true, "Actual Rows": true, "Actual Loops": true,
}

// properties prints the other members.
func (p *printer) properties(node []member, indent int, prefix string) {
	for _, m := range node {
		if inTitle[m.key] {
			continue
		}
		switch v := m.value.(type) {
		case string:
			p.line(indent, prefix+m.key+": "+v)
		case json.Number:
			if s := v.String(); strings.Trim(s, "0.") != "" {
				p.line(indent, prefix+m.key+": "+s)
			}
		case bool:
			if v && m.key != "Inner Unique" {
				p.line(indent, prefix+m.key)
			}
		case []any:
			p.list(m.key, v, indent)
		}
	}
}

func (p *printer) list(key string, list []any, indent int) {
	var texts []string
	for _, e := range list {
		switch e := e.(type) {
		case string:
			texts = append(texts, e)
		case json.Number:
			texts = append(texts, e.String())
		case []any:
			p.list(key, e, indent)
		case []member:
			p.properties(e, indent, "")
		}
	}
	if len(texts) > 0 {
		p.line(indent, key+": "+strings.Join(texts, ", "))
	}
}

func title(f fields) string {
	kind := f.text("Node Type")
	switch kind {
	case "":
		kind = "?"
	case "Aggregate":
		kind = map[string]string{"Hashed": "HashAggregate", "Sorted": "GroupAggregate", "Mixed": "MixedAggregate"}[f.text("Strategy")]
		if kind == "" {
			kind = "Aggregate"
		}
	case "SetOp":
		if f.text("Strategy") == "Hashed" {
			kind = "HashSetOp"
		}
		kind += " " + f.text("Command")
	case "ModifyTable":
		if op := f.text("Operation"); op != "" {
			kind = op
		}
	case "Foreign Scan":
		if op := f.text("Operation"); op != "" && op != "Select" {
			kind = "Foreign " + op
		}
	case "Nested Loop", "Hash Join", "Merge Join":
		if join := f.text("Join Type"); join != "" && join != "Inner" {
			kind = strings.TrimSuffix(kind, " Join") + " " + join + " Join"
		}
	}
	if mode := f.text("Partial Mode"); mode != "" && mode != "Simple" {
		kind = mode + " " + kind
	}
	if parallel, _ := f["Parallel Aware"].(bool); parallel {
		kind = "Parallel " + kind
	}
	if async, _ := f["Async Capable"].(bool); async {
		kind = "Async " + kind
	}
	if f.text("Scan Direction") == "Backward" {
		kind += " Backward"
	}
	index, object, alias := f.text("Index Name"), objectOf(f), f.text("Alias")
	switch {
	case index != "" && object == "":
		kind += " on " + index
	case index != "":
		kind += " using " + index
	}
	if object != "" {
		kind += " on " + object
		if name := object[strings.LastIndexByte(object, '.')+1:]; alias != "" && alias != name {
			kind += " " + alias
		}
	} else if alias != "" {
		kind += " on " + alias
	}
	return kind
}

func objectOf(f fields) string {
	for _, key := range []string{"Relation Name", "Function Name", "CTE Name", "Table Function Name", "Tuplestore Name"} {
		if name := f.text(key); name != "" {
			if schema := f.text("Schema"); schema != "" {
				return schema + "." + name
			}
			return name
		}
	}
	return ""
}

// numbers are the estimates, and what was measured. Without the cost of the start
// they are powers of ten.
func numbers(f fields) string {
	text := ""
	switch start, total, rows := f.number("Startup Cost"), f.number("Total Cost"), f.number("Plan Rows"); {
	case start != "":
		text = fmt.Sprintf("  (cost=%s..%s rows=%s width=%s)", start, total, rows, f.number("Plan Width"))
	case total != "" && rows != "":
		text = fmt.Sprintf("  (cost about %s, rows about %s)", total, rows)
	}
	if rows := f.number("Actual Rows"); rows != "" {
		loops := f.number("Actual Loops")
		switch start := f.number("Actual Startup Time"); {
		case loops == "0":
			text += " (never executed)"
		case start != "":
			text += fmt.Sprintf(" (actual time=%s..%s rows=%s loops=%s)", start, f.number("Actual Total Time"), rows, loops)
		default:
			text += fmt.Sprintf(" (actual rows=%s loops=%s)", rows, loops)
		}
	}
	return text
}

func decode(d *json.Decoder, depth int) (any, error) {
	if depth > maxDepth {
		return nil, ErrGarbled
	}
	t, err := d.Token()
	if err != nil {
		return nil, ErrGarbled
	}
	switch t {
	case json.Delim('{'):
		object := []member{}
		for d.More() {
			key, err := d.Token()
			if err != nil {
				return nil, ErrGarbled
			}
			v, err := decode(d, depth+1)
			if err != nil {
				return nil, err
			}
			object = append(object, member{key.(string), v})
		}
		if _, err := d.Token(); err != nil {
			return nil, ErrGarbled
		}
		return object, nil
	case json.Delim('['):
		list := []any{}
		for d.More() {
			v, err := decode(d, depth+1)
			if err != nil {
				return nil, err
			}
			list = append(list, v)
		}
		if _, err := d.Token(); err != nil {
			return nil, ErrGarbled
		}
		return list, nil
	}
	return t, nil
}
