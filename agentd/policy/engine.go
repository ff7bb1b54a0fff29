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
	columns := slices.ContainsFunc(s.Mask, func(m MaskSpec) bool { return len(m.Columns) > 0 })
	plans := s.Plans != "" && s.Plans != string(PlansOff)
	switch {
	case s.Plans == string(PlansAnalyze):
		return fmt.Errorf("policy.plans: analyze is not supported for engine %s: write full or structure", engine)
	case plans && columns:
		return fmt.Errorf("policy.plans: plans of a source that masks columns are not supported for engine %s, as what they tell of them is not certain: set it to off", engine)
	case plans && s.Mode == string(ModeMetadata) && engine == "mysql":
		return fmt.Errorf("policy.plans: plans in mode metadata are not supported for engine mysql, which runs parts of a statement to make its plan: set it to off")
	case columns && s.MaskFilters != string(FiltersAllow):
		return fmt.Errorf("policy.mask_filters: engine %s can't hold what statements compare masked columns with: write mask_filters: allow, if it may be found out so, or grant the account a view without these columns", engine)
	case !columns && s.MaskFilters != "":
		return refuse("mask_filters", "remove it, or mask columns")
	case columns && s.Mode == string(ModeReadWrite) && engine == "mysql":
		return fmt.Errorf("policy.mask: columns on a source that may write is not supported for engine mysql, as a statement could copy them to where they are not masked: add a second source for writing")
	case len(s.MaskSafeFunctions) > 0:
		return refuse("mask_safe_functions", "remove it")
	case s.ClientIdle != "" || s.ClientIdleInTransaction != "":
		return refuse("client_idle", "remove it: it is for clients of PostgreSQL's own protocol")
	case s.Write != nil && engine == "mysql":
		return refuse("write", "remove it, and grant the account no more than it needs")
	}
	return nil
}
