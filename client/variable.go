package client

import (
	"encoding/json"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// MaxListElements is how many elements a list may have.
const MaxListElements = 10_000

// Variable makes a parameter of a live variable, as a notebook has it: nil is
// NULL; bool, integers and floats (and json.Number) go with the type bool, int8,
// float8 or numeric; a string goes without a type, so that it fits where a date or
// a number is wanted too; a time.Time is a timestamptz. A list ([]any of those
// but lists) is for {{name|list}}. Other types are an error.
func Variable(name string, value any) (*posternv1.Parameter, error) {
	if list, ok := value.([]any); ok {
		return listVariable(name, list)
	}
	text, kind, err := scalar(value)
	if err != nil {
		return nil, fmt.Errorf("variable %q: %w", name, err)
	}
	return &posternv1.Parameter{Name: name, Value: text, Type: kind}, nil
}

func listVariable(name string, list []any) (*posternv1.Parameter, error) {
	if len(list) > MaxListElements {
		return nil, fmt.Errorf("variable %q: a list of %d elements is longer than %d", name, len(list), MaxListElements)
	}
	texts := make([]*string, len(list))
	common := ""
	for i, value := range list {
		text, kind, err := scalar(value)
		if err != nil {
			return nil, fmt.Errorf("variable %q: element %d: %w", name, i+1, err)
		}
		if texts[i] = text; text == nil {
			continue
		}
		if kind == "" {
			kind = untyped
		}
		switch {
		case common == "" || common == kind:
			common = kind
		case numbers[common] && numbers[kind]:
			common = "numeric"
		default:
			return nil, fmt.Errorf("variable %q: a list has elements of one kind: element %d is another than those before", name, i+1)
		}
	}
	encoded, err := json.Marshal(texts)
	if err != nil {
		return nil, fmt.Errorf("variable %q: %w", name, err)
	}
	value := string(encoded)
	return &posternv1.Parameter{Name: name, Value: &value, Type: strings.TrimPrefix(common, untyped)}, nil
}

// untyped marks a list of strings.
const untyped = "?"

var numbers = map[string]bool{"int8": true, "float8": true, "numeric": true}

// scalar is a value's text form and type.
func scalar(value any) (text *string, kind string, err error) {
	var s string
	switch v := value.(type) {
	case nil:
		return nil, "", nil
	case bool:
		s, kind = strconv.FormatBool(v), "bool"
	case int:
		s, kind = strconv.Itoa(v), "int8"
	case int64:
		s, kind = strconv.FormatInt(v, 10), "int8"
	case float64:
		// NaN and the infinities are the server's words, too.
		switch {
		case math.IsInf(v, 1):
			s = "Infinity"
		case math.IsInf(v, -1):
			s = "-Infinity"
		default:
			s = strconv.FormatFloat(v, 'g', -1, 64)
		}
		kind = "float8"
	case json.Number:
		s, kind = v.String(), "numeric"
		if _, err := strconv.ParseInt(s, 10, 64); err == nil {
			kind = "int8"
		}
	case string:
		if !utf8.ValidString(v) {
			return nil, "", fmt.Errorf("the text is not valid UTF-8")
		}
		s = v
	case time.Time:
		s, kind = v.Format("2006-01-02T15:04:05.999999999Z07:00"), "timestamptz"
	default:
		return nil, "", fmt.Errorf("a %T can't be a value: use nil, bool, a number, a string, a time or a list of them", value)
	}
	return &s, kind, nil
}
