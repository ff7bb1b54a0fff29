package policy

import (
	"errors"
	"fmt"
	"strings"

	"github.com/postern-dev/postern/proto/glob"
)

// maxHide bounds the patterns of a source.
const maxHide = 1000

// Hide is what introspection must not tell of: patterns of schemas ("hr",
// "tenant_*"), or of what is in them ("public.*_secret").
type Hide []string

// ParseHide checks patterns. The error is one line.
func ParseHide(patterns []string) (Hide, error) {
	if len(patterns) > maxHide {
		return nil, fmt.Errorf("%d patterns are more than %d", len(patterns), maxHide)
	}
	for _, p := range patterns {
		schema, object, inside := strings.Cut(p, ".")
		switch {
		case strings.TrimSpace(p) != p || p == "":
			return nil, fmt.Errorf("%q is not a pattern such as hr, tenant_* or public.*_secret", p)
		case schema == "" || inside && object == "":
			return nil, fmt.Errorf("%q lacks a name beside its dot: write SCHEMA or SCHEMA.TABLE", p)
		case len(p) > 256:
			return nil, errors.New("a pattern has more than 256 bytes")
		case strings.ContainsAny(p, "\"'\x00\n"):
			return nil, fmt.Errorf("%q has quotes or line breaks: write names as they are in the catalog", p)
		}
	}
	return Hide(patterns), nil
}

// Schema reports whether a schema is hidden with all that is in it.
func (h Hide) Schema(name string) bool {
	for _, p := range h {
		if !strings.Contains(p, ".") && glob.Match(p, name) {
			return true
		}
	}
	return false
}

// Object reports whether a table, view, type or function is hidden, by itself or
// with its schema.
func (h Hide) Object(schema, name string) bool {
	for _, p := range h {
		s, o, inside := strings.Cut(p, ".")
		if glob.Match(s, schema) && (!inside || glob.Match(o, name)) {
			return true
		}
	}
	return false
}

// DecideIntrospection says whether a source's catalog may be told of, and for how
// long the database may be asked.
func DecideIntrospection(source Source) Verdict {
	v := Decide(source, Request{})
	v.ReadWrite = false
	return v
}
