package policy

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/postern-dev/postern/proto/glob"
)

// MaskKind is what becomes of a masked value; NULL stays NULL.
type MaskKind string

// The kinds of masks.
const (
	MaskRedact  MaskKind = "redact"  // a fixed mark
	MaskHash    MaskKind = "hash"    // keyed, the same value always gives the same hash, so joins still work
	MaskPartial MaskKind = "partial" // all but the last characters are replaced
	MaskNull    MaskKind = "null"    // NULL
	MaskNoise   MaskKind = "noise"   // a number that is off by a random part of itself
)

// Filters is how a statement may use masked columns beside its result: WHERE,
// JOIN, GROUP BY, HAVING, ORDER BY, DISTINCT.
type Filters string

// The filters of masked columns.
const (
	FiltersAllow    Filters = "allow"
	FiltersEquality Filters = "equality" // =, IN, IS NULL, joins by =, GROUP BY; no order, no ranges, no LIKE
	FiltersRefuse   Filters = "refuse"
)

// Bounds of masks.
const (
	DefaultKeep  = 4
	MaxKeep      = 64
	DefaultNoise = 0.1
	maxMasks     = 200
	maxPattern   = 1000
)

// Mask is one checked rule: it has either Columns or a Pattern.
type Mask struct {
	// Columns are globs of TABLE.COLUMN or SCHEMA.TABLE.COLUMN.
	Columns []string
	// Pattern is a regular expression (RE2) of what is masked inside of texts.
	Pattern string
	With    MaskKind
	// Keep is how many of the last characters MaskPartial leaves.
	Keep int
	// Noise is the largest part of a number by which MaskNoise moves it.
	Noise float64
}

// MaskSpec is a rule as the configuration file has it.
type MaskSpec struct {
	Columns []string `yaml:"columns"`
	Pattern string   `yaml:"pattern"`
	With    string   `yaml:"with"`
	Keep    *int     `yaml:"keep"`
	Noise   *float64 `yaml:"noise"`
}

// check makes a rule of what the file has. The error is one line.
func (s MaskSpec) check() (Mask, error) {
	m := Mask{Columns: s.Columns, Pattern: s.Pattern, With: MaskKind(s.With), Keep: DefaultKeep, Noise: DefaultNoise}
	kinds := []MaskKind{MaskRedact, MaskHash, MaskPartial, MaskNull, MaskNoise}
	switch {
	case !slices.Contains(kinds, m.With):
		return Mask{}, fmt.Errorf("with: %q is none of redact, hash, partial, null, noise", s.With)
	case len(s.Columns) > 0 && s.Pattern != "":
		return Mask{}, errors.New("a rule has both columns and pattern: make it two rules")
	case len(s.Columns) == 0 && s.Pattern == "":
		return Mask{}, errors.New(`a rule has neither columns nor pattern: write columns: ["*.email"] or pattern: '\b\d{13,19}\b'`)
	case s.Pattern != "" && (m.With == MaskNoise || m.With == MaskNull):
		return Mask{}, fmt.Errorf("a pattern is within a text: with: %s is for columns alone", s.With)
	case s.Keep != nil && m.With != MaskPartial:
		return Mask{}, errors.New("keep is for with: partial alone")
	case s.Noise != nil && m.With != MaskNoise:
		return Mask{}, errors.New("noise is for with: noise alone")
	case len(s.Pattern) > maxPattern:
		return Mask{}, fmt.Errorf("a pattern has more than %d bytes", maxPattern)
	}
	for _, c := range s.Columns {
		if err := checkColumnGlob(c); err != nil {
			return Mask{}, err
		}
	}
	if s.Pattern != "" {
		re, err := regexp.Compile(s.Pattern)
		if err != nil {
			return Mask{}, fmt.Errorf("pattern %q is not a regular expression (RE2): %s", s.Pattern, strings.TrimPrefix(err.Error(), "error parsing regexp: "))
		}
		if re.MatchString("") {
			return Mask{}, fmt.Errorf("pattern %q matches nothing at all, and so everywhere", s.Pattern)
		}
	}
	if s.Keep != nil {
		if m.Keep = *s.Keep; m.Keep < 0 || m.Keep > MaxKeep {
			return Mask{}, fmt.Errorf("keep: %d is not between 0 and %d", m.Keep, MaxKeep)
		}
	}
	if s.Noise != nil {
		if m.Noise = *s.Noise; !(m.Noise > 0 && m.Noise <= 1) {
			return Mask{}, fmt.Errorf("noise: %v is not above 0 and at most 1", m.Noise)
		}
	}
	return m, nil
}

func checkColumnGlob(c string) error {
	parts := strings.Split(c, ".")
	if len(parts) < 2 || len(parts) > 3 || slices.Contains(parts, "") || len(c) > 256 || strings.ContainsAny(c, "\"'\x00\n ") {
		return fmt.Errorf("columns: %q is not TABLE.COLUMN or SCHEMA.TABLE.COLUMN, such as *.email or hr.people.ssn", c)
	}
	return nil
}

// Covers tells whether the rule is for this column.
func (m Mask) Covers(schema, table, column string) bool {
	for _, c := range m.Columns {
		parts := strings.Split(c, ".")
		n := len(parts)
		if (n == 2 || glob.Match(parts[0], schema)) && glob.Match(parts[n-2], table) && glob.Match(parts[n-1], column) {
			return true
		}
	}
	return false
}

// checkMasks makes the rules of a source.
func checkMasks(specs []MaskSpec) ([]Mask, error) {
	if len(specs) > maxMasks {
		return nil, fmt.Errorf("%d rules are more than %d", len(specs), maxMasks)
	}
	var masks []Mask
	for i, s := range specs {
		m, err := s.check()
		if err != nil {
			return nil, fmt.Errorf("rule %d: %w", i+1, err)
		}
		masks = append(masks, m)
	}
	return masks, nil
}
