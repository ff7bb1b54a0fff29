package pgplan

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/sqltext"
)

// MaxPlan bounds the server's plan in bytes.
const MaxPlan = 8 << 20

// maxPlanDepth bounds how deep plans are nested.
const maxPlanDepth = 1000

// ErrGarbled is returned for what is no plan in JSON.
var ErrGarbled = errors.New("the server's plan is not understood")

// Numbers says which numbers Structure keeps.
type Numbers bool

// What becomes of estimates of rows and costs.
const (
	NoNumbers Numbers = false
	Magnitude Numbers = true // a power of ten
)

// member is one of an object's, in the server's order.
type member struct {
	key   string
	value any // []member, []any, string, json.Number, bool or nil
}

// Check makes one line of canonical JSON of the server's plan, all of which is
// kept. text, which may be nil, sees every text in it and returns what to tell.
func Check(plan []byte, text func(string) string) ([]byte, error) {
	v, err := decode(plan)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	encode(&out, v, text)
	return out.Bytes(), nil
}

// Structure makes a plan without literals of the server's: nodes, tables, indexes,
// sort keys, and conditions in which every literal is a question mark. Members
// that are not known to be harmless are left out.
func Structure(plan []byte, numbers Numbers) ([]byte, error) {
	v, err := decode(plan)
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
		if root, ok := m.value.([]member); ok && m.key == "Plan" {
			kept = append(kept, member{"Plan", reduce(root, numbers)})
		}
	}
	if len(kept) == 0 {
		return nil, ErrGarbled
	}
	var out bytes.Buffer
	encode(&out, []any{kept}, nil)
	return out.Bytes(), nil
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
		case names[m.key]:
			if text, ok := texts(m.value, func(s string) string { return s }); ok {
				kept = append(kept, member{m.key, text})
			}
		case flags[m.key]:
			if flag, ok := m.value.(bool); ok {
				kept = append(kept, member{m.key, flag})
			}
		case expressions[m.key]:
			if text, ok := texts(m.value, sqltext.Redact); ok {
				kept = append(kept, member{m.key, text})
			}
		case parts[m.key]:
			list, ok := m.value.([]any)
			if !ok {
				continue
			}
			inner := []any{}
			for _, part := range list {
				if part, ok := part.([]member); ok {
					inner = append(inner, reduce(part, numbers))
				}
			}
			kept = append(kept, member{m.key, inner})
		case estimates[m.key] && numbers == Magnitude:
			if n, ok := m.value.(json.Number); ok {
				kept = append(kept, member{m.key, magnitude(n)})
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

// magnitude is the power of ten that is nearest to n, at least 1.
func magnitude(n json.Number) json.Number {
	f, err := n.Float64()
	if err != nil || !(f > 1) {
		return "1"
	}
	power := math.Round(math.Log10(f))
	if power > 300 {
		power = 300
	}
	return json.Number(strconv.FormatFloat(math.Pow(10, power), 'f', 0, 64))
}

// decode reads JSON and keeps the order of members.
func decode(plan []byte) (any, error) {
	if len(plan) > MaxPlan {
		return nil, fmt.Errorf("%w: it has %d bytes, more than %d", ErrGarbled, len(plan), MaxPlan)
	}
	d := json.NewDecoder(bytes.NewReader(plan))
	d.UseNumber()
	v, err := value(d, 0)
	if err != nil {
		return nil, err
	}
	if d.More() {
		return nil, ErrGarbled
	}
	return v, nil
}

func value(d *json.Decoder, depth int) (any, error) {
	if depth > maxPlanDepth {
		return nil, fmt.Errorf("%w: it is nested too deeply", ErrGarbled)
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
			v, err := value(d, depth+1)
			if err != nil {
				return nil, err
			}
			object = append(object, member{key.(string), v})
		}
		_, err = d.Token()
		return object, err
	case json.Delim('['):
		list := []any{}
		for d.More() {
			v, err := value(d, depth+1)
			if err != nil {
				return nil, err
			}
			list = append(list, v)
		}
		_, err = d.Token()
		return list, err
	}
	return t, nil
}

func encode(out *bytes.Buffer, v any, text func(string) string) {
	switch v := v.(type) {
	case []member:
		out.WriteByte('{')
		for i, m := range v {
			if i > 0 {
				out.WriteByte(',')
			}
			encode(out, m.key, nil)
			out.WriteByte(':')
			encode(out, m.value, text)
		}
		out.WriteByte('}')
	case []any:
		out.WriteByte('[')
		for i, e := range v {
			if i > 0 {
				out.WriteByte(',')
			}
			encode(out, e, text)
		}
		out.WriteByte(']')
	case string:
		if text != nil {
			v = text(v)
		}
		var b bytes.Buffer
		e := json.NewEncoder(&b)
		e.SetEscapeHTML(false)
		_ = e.Encode(v) // a string can be encoded
		out.Write(bytes.TrimSuffix(b.Bytes(), []byte("\n")))
	case json.Number:
		out.WriteString(v.String())
	case bool:
		out.WriteString(strconv.FormatBool(v))
	default:
		out.WriteString("null")
	}
}
