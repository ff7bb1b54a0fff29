package client_test

import (
	"encoding/json"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/client"
)

func TestVariable(t *testing.T) {
	day := time.Date(2026, 11, 22, 4, 5, 6, 7000, time.FixedZone("", 3600))
	tests := []struct {
		name        string
		value       any
		text, kind  string
		null        bool
		errContains string
	}{
		{name: "null", null: true},
		{name: "bool", value: true, text: "true", kind: "bool"},
		{name: "int", value: -7, text: "-7", kind: "int8"},
		{name: "float", value: 0.1, text: "0.1", kind: "float8"},
		{name: "infinity", value: math.Inf(-1), text: "-Infinity", kind: "float8"},
		{name: "big number", value: json.Number("123456789012345678901234567890"), text: "123456789012345678901234567890", kind: "numeric"},
		{name: "small number", value: json.Number("12"), text: "12", kind: "int8"},
		{name: "text", value: "it's", text: "it's"},
		{name: "time", value: day, text: "2026-11-22T04:05:06.000007+01:00", kind: "timestamptz"},
		{name: "list", value: []any{1, nil, 2}, text: `["1",null,"2"]`, kind: "int8"},
		{name: "numbers", value: []any{1, 2.5}, text: `["1","2.5"]`, kind: "numeric"},
		{name: "texts", value: []any{"a", "b"}, text: `["a","b"]`},
		{name: "empty list", value: []any{}, text: "[]"},
		{name: "mixed", value: []any{"a", 1}, errContains: "element 2"},
		{name: "nested", value: []any{[]any{}}, errContains: "element 1"},
		{name: "map", value: map[string]any{}, errContains: "can't be a value"},
		{name: "too long", value: make([]any, client.MaxListElements+1), errContains: "longer than"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got, err := client.Variable("x", test.value)
			if test.errContains != "" {
				if err == nil || !strings.Contains(err.Error(), test.errContains) {
					t.Fatalf("got %v, want an error with %q", err, test.errContains)
				}
				return
			}
			if err != nil || got.GetValue() != test.text || got.Type != test.kind || (got.Value == nil) != test.null {
				t.Fatalf("got %v, %v, want %q of type %q", got, err, test.text, test.kind)
			}
		})
	}
}
