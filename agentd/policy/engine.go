package policy

import (
	"fmt"
	"slices"
)

// CheckEngine refuses what the engine of a source does not enforce. The error is one
// line that names the key and says what to do. Source has checked the rest.
func (s Spec) CheckEngine(engine string) error {
	if engine != "mysql" && engine != "sqlite" {
		return nil
	}
	refuse := func(key, instead string) error {
		return fmt.Errorf("policy.%s: %s is not supported for engine %s: %s", key, key, engine, instead)
	}
	switch {
	case s.Plans != "" && s.Plans != string(PlansOff):
		return refuse("plans", "remove it or set it to off")
	case slices.ContainsFunc(s.Mask, func(m MaskSpec) bool { return len(m.Columns) > 0 }):
		return fmt.Errorf("policy.mask: columns is not supported for engine %s: grant the account a view with the columns that may be seen, and nothing else, or mask by pattern", engine)
	case s.MaskFilters != "":
		return refuse("mask_filters", "remove it")
	case len(s.MaskSafeFunctions) > 0:
		return refuse("mask_safe_functions", "remove it")
	case s.ClientIdle != "" || s.ClientIdleInTransaction != "":
		return refuse("client_idle", "remove it: it is for clients of PostgreSQL's own protocol")
	case s.Write != nil && engine == "mysql":
		return refuse("write", "remove it, and grant the account no more than it needs")
	}
	return nil
}
