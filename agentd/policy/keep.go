package policy

import (
	"fmt"

	"gopkg.in/yaml.v3"
)

// Bounds of keep_rows.
const (
	DefaultKeepRows = 100
	MaxKeepRows     = 1000
)

// KeepSpec is keep_rows as the configuration file has it: the word off, or how
// many of the first and last rows of each result the control plane may keep with
// its history. What is absent is DefaultKeepRows.
type KeepSpec struct {
	First *int `yaml:"first"`
	Last  *int `yaml:"last"`

	off bool
}

// UnmarshalYAML implements yaml.Unmarshaler.
func (k *KeepSpec) UnmarshalYAML(node *yaml.Node) error {
	if node.Kind == yaml.ScalarNode {
		// A configuration written as JSON may say false.
		if node.Value == "off" || node.Value == "false" {
			k.off = true
			return nil
		}
		return &yaml.TypeError{Errors: []string{fmt.Sprintf("line %d: policy.keep_rows is neither off nor {first: N, last: N}", node.Line)}}
	}
	type plain KeepSpec
	return node.Decode((*plain)(k))
}

// rows is how many of the first and the last rows to keep.
func (k *KeepSpec) rows() (first, last int, err error) {
	first, last = DefaultKeepRows, DefaultKeepRows
	switch {
	case k == nil:
		return first, last, nil
	case k.off:
		return 0, 0, nil
	}
	for _, n := range []struct {
		name  string
		given *int
		value *int
	}{{"first", k.First, &first}, {"last", k.Last, &last}} {
		if n.given == nil {
			continue
		}
		if *n.given < 0 || *n.given > MaxKeepRows {
			return 0, 0, fmt.Errorf("policy.keep_rows: %s: %d is not between 0 and %d", n.name, *n.given, MaxKeepRows)
		}
		*n.value = *n.given
	}
	return first, last, nil
}
