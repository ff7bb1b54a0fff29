package policy

import (
	"strings"
	"testing"

	"gopkg.in/yaml.v3"
)

func TestCheckEngine(t *testing.T) {
	for _, test := range []struct{ engine, policy, err string }{
		{"postgres", "{mode: metadata, plans: full, functions: [f], mask: [{columns: ['*.a'], with: hash}]}", ""},
		{"mysql", "{mode: read-only, functions: [app.f], hide: [hr], keep_rows: off, max_rows: 5, plans: off}", ""},
		{"mysql", "{mode: metadata}", ""},
		{"mysql", "{plans: structure}", ""},
		{"mysql", "{plans: full, mode: read-write, mask: [{pattern: x, with: redact}]}", ""},
		{"mysql", "{plans: structure, mode: metadata}", "policy.plans: plans in mode metadata are not supported for engine mysql"},
		{"mysql", "{plans: analyze}", "policy.plans: analyze is not supported for engine mysql: write full or structure"},
		{"mysql", "{plans: structure, mask: [{columns: ['*.a'], with: redact}], mask_filters: allow}", "policy.plans: plans of a source that masks columns are not supported for engine mysql"},
		{"sqlite", "{plans: structure, mask: [{columns: ['*.a'], with: redact}], mask_filters: allow}", "policy.plans: plans of a source that masks columns are not supported for engine sqlite"},
		{"sqlite", "{plans: full, mode: metadata}", ""},
		{"mysql", "{mask: [{columns: ['*.a'], with: hash}]}", "policy.mask_filters: engine mysql can't hold what statements compare masked columns with: write mask_filters: allow"},
		{"mysql", "{mask: [{columns: ['*.a'], with: hash}], mask_filters: equality}", "policy.mask_filters: "},
		{"mysql", "{mask: [{columns: ['*.a'], with: hash}], mask_filters: allow}", ""},
		{"mysql", "{mode: read-write, mask: [{columns: ['*.a'], with: hash}], mask_filters: allow}", "policy.mask: columns on a source that may write"},
		{"sqlite", "{mode: read-write, mask: [{columns: ['*.a'], with: hash}], mask_filters: allow}", ""},
		{"sqlite", "{mask: [{columns: ['*.a'], with: hash}], mask_filters: allow, mask_safe_functions: [f]}", "policy.mask_safe_functions: "},
		{"mysql", "{mask_filters: allow}", "policy.mask_filters: "},
		{"mysql", "{mask_safe_functions: [f]}", "policy.mask_safe_functions: "},
		{"mysql", "{mode: read-write, write: {statements: [insert]}}", "policy.write: "},
		{"sqlite", "{mode: metadata}", ""},
		{"sqlite", "{mode: read-write, write: {statements: [insert], schemas: [main]}}", ""},
		{"sqlite", "{plans: analyze}", "policy.plans: analyze is not supported for engine sqlite"},
		{"sqlite", "{mask: [{pattern: 'a+', with: redact}]}", ""},
		{"mysql", "{mask: [{pattern: 'a+', with: hash}, {pattern: 'b', with: partial}]}", ""},
		{"sqlite", "{mask: [{pattern: 'a+', with: redact}, {columns: ['*.a'], with: hash}]}", "policy.mask_filters: engine sqlite can't hold"},
	} {
		var spec Spec
		if err := yaml.Unmarshal([]byte(test.policy), &spec); err != nil {
			t.Fatal(err)
		}
		if _, err := spec.Source(); err != nil {
			t.Errorf("%s: %v", test.policy, err)
		}
		err := spec.CheckEngine(test.engine)
		if (err == nil) != (test.err == "") || err != nil && !strings.HasPrefix(err.Error(), test.err) {
			t.Errorf("%s %s: got %v, want %q", test.engine, test.policy, err, test.err)
		}
	}
}
