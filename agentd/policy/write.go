package policy

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// StatementKinds are those that write.statements may name. ddl is CREATE, ALTER,
// DROP, COMMENT, TRUNCATE of tables and what belongs to them.
var StatementKinds = []string{"insert", "update", "delete", "merge", "truncate", "ddl", "call"}

// Write narrows what a read-write source may be written with. The zero value
// narrows nothing.
type Write struct {
	// Schemas are globs of the schemas that may be written to; empty: all.
	Schemas []string
	// Statements are of StatementKinds; empty: all.
	Statements []string
}

// WriteSpec is write as the configuration file has it.
type WriteSpec struct {
	Schemas    []string `yaml:"schemas"`
	Statements []string `yaml:"statements"`
}

func (s *WriteSpec) check(mode Mode) (Write, error) {
	if s == nil {
		return Write{}, nil
	}
	if mode != ModeReadWrite {
		return Write{}, errors.New("it is for mode: read-write alone")
	}
	for _, schema := range s.Schemas {
		if schema == "" || len(schema) > 128 || strings.ContainsAny(schema, "\"'\x00\n. ") {
			return Write{}, fmt.Errorf("schemas: %q is not a schema or a pattern of schemas", schema)
		}
	}
	for _, kind := range s.Statements {
		if !slices.Contains(StatementKinds, kind) {
			return Write{}, fmt.Errorf("statements: %q is none of %s", kind, strings.Join(StatementKinds, ", "))
		}
	}
	return Write{Schemas: s.Schemas, Statements: s.Statements}, nil
}

// checkFunctions checks patterns of functions: NAME or SCHEMA.NAME.
func checkFunctions(names []string) error {
	for _, name := range names {
		if parts := strings.Split(name, "."); len(parts) > 2 || slices.Contains(parts, "") || len(name) > 256 || strings.ContainsAny(name, "\"'\x00\n ()") {
			return fmt.Errorf("%q is not a function such as app.report or a pattern such as app.report_*", name)
		}
	}
	if len(names) > 1000 {
		return fmt.Errorf("%d are more than 1000", len(names))
	}
	return nil
}
