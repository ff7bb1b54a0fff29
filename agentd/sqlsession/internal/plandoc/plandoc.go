package plandoc

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"
)

// MaxPlan bounds a server's plan in bytes.
const MaxPlan = 8 << 20

// maxDepth bounds how deep plans are nested.
const maxDepth = 1000

// ErrGarbled is returned for what is no plan in JSON.
var ErrGarbled = errors.New("the server's plan is not understood")

// Member is one of an object's, in the server's order.
type Member struct {
	Key   string
	Value any // []Member, []any, string, json.Number, bool or nil
}

// Magnitude is the power of ten that is nearest to n, at least 1.
func Magnitude(n json.Number) json.Number {
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

// Decode reads a plan in JSON, of MaxPlan bytes at most. Objects are []Member, lists
// []any, numbers json.Number. What is no JSON, or nested too deeply, is ErrGarbled.
func Decode(plan []byte) (any, error) {
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
	if depth > maxDepth {
		return nil, fmt.Errorf("%w: it is nested too deeply", ErrGarbled)
	}
	t, err := d.Token()
	if err != nil {
		return nil, ErrGarbled
	}
	switch t {
	case json.Delim('{'):
		object := []Member{}
		for d.More() {
			key, err := d.Token()
			if err != nil {
				return nil, ErrGarbled
			}
			v, err := value(d, depth+1)
			if err != nil {
				return nil, err
			}
			object = append(object, Member{key.(string), v})
		}
		if _, err = d.Token(); err != nil {
			return nil, ErrGarbled
		}
		return object, nil
	case json.Delim('['):
		list := []any{}
		for d.More() {
			v, err := value(d, depth+1)
			if err != nil {
				return nil, err
			}
			list = append(list, v)
		}
		if _, err = d.Token(); err != nil {
			return nil, ErrGarbled
		}
		return list, nil
	}
	return t, nil
}

// Encode writes one line of JSON. text, which may be nil, sees every text in it, names
// of members aside, and returns what to tell.
func Encode(v any, text func(string) string) []byte {
	var out bytes.Buffer
	encode(&out, v, text)
	return out.Bytes()
}

func encode(out *bytes.Buffer, v any, text func(string) string) {
	switch v := v.(type) {
	case []Member:
		out.WriteByte('{')
		for i, m := range v {
			if i > 0 {
				out.WriteByte(',')
			}
			encode(out, m.Key, nil)
			out.WriteByte(':')
			encode(out, m.Value, text)
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
