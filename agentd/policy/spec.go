package policy

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// Spec is a source's policy as /etc/postern/agentd.yaml has it; what is absent
// gets its default. Decode it strictly: unknown keys are errors.
type Spec struct {
	Mode             string  `yaml:"mode"`
	Plans            string  `yaml:"plans"`
	MaxRows          *uint64 `yaml:"max_rows"`
	MaxBytes         string  `yaml:"max_bytes"`
	StatementTimeout string  `yaml:"statement_timeout"`
	Concurrency      *int    `yaml:"concurrency"`
	// ClientIdle and ClientIdleInTransaction are for PostgreSQL's own protocol.
	ClientIdle              string    `yaml:"client_idle"`
	ClientIdleInTransaction string    `yaml:"client_idle_in_transaction"`
	KeepRows                *KeepSpec `yaml:"keep_rows"`
	// Hide narrows introspection.
	Hide []string `yaml:"hide"`
	// Functions are those that may be called although the mode would refuse them.
	Functions []string `yaml:"functions"`
	// Write narrows a read-write source.
	Write *WriteSpec `yaml:"write"`
	// Mask are the rules for values, MaskFilters and MaskSafeFunctions what goes with them.
	Mask              []MaskSpec `yaml:"mask"`
	MaskFilters       string     `yaml:"mask_filters"`
	MaskSafeFunctions []string   `yaml:"mask_safe_functions"`
}

// Source checks the policy and fills in the defaults. The error is one line
// that names the key and says what to do.
func (s Spec) Source() (Source, error) {
	source := Default()
	switch Mode(s.Mode) {
	case "":
	case ModeMetadata, ModeReadOnly, ModeReadWrite:
		source.Mode = Mode(s.Mode)
	default:
		return Source{}, fmt.Errorf("policy.mode: %q is none of metadata, read-only, read-write", s.Mode)
	}
	switch s.Plans {
	case "":
	case "off", "structure", "full", "analyze":
		source.Plans = Plans(s.Plans)
	default:
		return Source{}, fmt.Errorf("policy.plans: %q is none of off, structure, full, analyze", s.Plans)
	}
	var err error
	if err := checkFunctions(s.Functions); err != nil {
		return Source{}, fmt.Errorf("policy.functions: %w", err)
	}
	source.Functions = s.Functions
	if source.Write, err = s.Write.check(source.Mode); err != nil {
		return Source{}, fmt.Errorf("policy.write: %w", err)
	}
	if source.Masks, err = checkMasks(s.Mask); err != nil {
		return Source{}, fmt.Errorf("policy.mask: %w", err)
	}
	switch Filters(s.MaskFilters) {
	case "":
	case FiltersAllow, FiltersEquality, FiltersRefuse:
		source.MaskFilters = Filters(s.MaskFilters)
	default:
		return Source{}, fmt.Errorf("policy.mask_filters: %q is none of allow, equality, refuse", s.MaskFilters)
	}
	if err := checkFunctions(s.MaskSafeFunctions); err != nil {
		return Source{}, fmt.Errorf("policy.mask_safe_functions: %w", err)
	}
	source.SafeFunctions = s.MaskSafeFunctions
	if source.KeepFirst, source.KeepLast, err = s.KeepRows.rows(); err != nil {
		return Source{}, err
	}
	if s.MaxRows != nil {
		if *s.MaxRows == 0 {
			return Source{}, errors.New("policy.max_rows: must be at least 1")
		}
		source.MaxRows = *s.MaxRows
	}
	if s.MaxBytes != "" {
		size, err := ParseSize(s.MaxBytes)
		if err != nil {
			return Source{}, fmt.Errorf("policy.max_bytes: %w", err)
		}
		if size == 0 {
			return Source{}, errors.New("policy.max_bytes: must be at least 1")
		}
		source.MaxBytes = size
	}
	if s.StatementTimeout != "" {
		timeout, err := time.ParseDuration(s.StatementTimeout)
		if err != nil {
			return Source{}, fmt.Errorf("policy.statement_timeout: %q is not a duration such as 30s, 5m or 1h30m", s.StatementTimeout)
		}
		if timeout < time.Millisecond || timeout > MaxStatementTimeout {
			return Source{}, fmt.Errorf("policy.statement_timeout: %s is not between 1ms and %s", timeout, MaxStatementTimeout)
		}
		source.StatementTimeout = timeout
	}
	if s.Concurrency != nil {
		if *s.Concurrency < 1 || *s.Concurrency > MaxConcurrency {
			return Source{}, fmt.Errorf("policy.concurrency: %d is not between 1 and %d", *s.Concurrency, MaxConcurrency)
		}
		source.Concurrency = *s.Concurrency
	}
	if source.ClientIdle, err = idle("client_idle", s.ClientIdle, source.ClientIdle); err != nil {
		return Source{}, err
	}
	if source.ClientIdleInTransaction, err = idle("client_idle_in_transaction", s.ClientIdleInTransaction, source.ClientIdleInTransaction); err != nil {
		return Source{}, err
	}
	hide, err := ParseHide(s.Hide)
	if err != nil {
		return Source{}, fmt.Errorf("policy.hide: %w", err)
	}
	source.Hide = hide
	return source, nil
}

// idle reads how long a client may be silent.
func idle(key, text string, standard time.Duration) (time.Duration, error) {
	if text == "" {
		return standard, nil
	}
	limit, err := time.ParseDuration(text)
	if err != nil {
		return 0, fmt.Errorf("policy.%s: %q is not a duration such as 30s, 10m or 1h", key, text)
	}
	if limit < time.Second || limit > MaxClientIdle {
		return 0, fmt.Errorf("policy.%s: %s is not between 1s and %s", key, limit, MaxClientIdle)
	}
	return limit, nil
}

// units are those that ParseSize knows, longest first.
var units = []struct {
	suffix string
	bytes  uint64
}{
	{"KiB", 1 << 10},
	{"MiB", 1 << 20},
	{"GiB", 1 << 30},
	{"TiB", 1 << 40},
	{"KB", 1e3},
	{"kB", 1e3},
	{"MB", 1e6},
	{"GB", 1e9},
	{"TB", 1e12},
	{"B", 1},
	{"", 1},
}

// ParseSize reads a number of bytes such as 1GiB, 500MB, 100KiB or 4096.
func ParseSize(text string) (uint64, error) {
	text = strings.TrimSpace(text)
	for _, unit := range units {
		digits, ok := strings.CutSuffix(text, unit.suffix)
		if !ok {
			continue
		}
		digits = strings.TrimSpace(digits)
		n, err := strconv.ParseUint(digits, 10, 64)
		switch {
		case errors.Is(err, strconv.ErrRange), err == nil && n > math.MaxInt64/unit.bytes:
			return 0, fmt.Errorf("%q is too large", text)
		case err != nil || digits[0] == '+':
			return 0, fmt.Errorf("%q is not a size such as 1GiB, 500MB or 4096", text)
		}
		return n * unit.bytes, nil
	}
	return 0, fmt.Errorf("%q is not a size such as 1GiB, 500MB or 4096", text)
}
