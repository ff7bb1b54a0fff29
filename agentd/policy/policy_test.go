package policy

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"gopkg.in/yaml.v3"
)

func TestDecide(t *testing.T) {
	readWrite := Default()
	readWrite.Mode = ModeReadWrite
	metadata := Default()
	metadata.Mode = ModeMetadata
	planned, unplanned := Default(), Default()
	planned.Plans, unplanned.Plans = PlansFull, ""
	unknown := Default()
	unknown.Mode = "all"
	tests := []struct {
		name    string
		source  Source
		request Request
		want    Verdict
		reason  string
	}{
		{name: "defaults", source: Default(), want: Verdict{Allowed: true, MaxRows: 1_000_000, MaxBytes: 1 << 30, Timeout: 5 * time.Minute, KeepFirst: 100, KeepLast: 100}},
		{
			name: "narrowed", source: Default(), request: Request{MaxRows: 5, MaxBytes: 6, Timeout: 7},
			want: Verdict{Allowed: true, MaxRows: 5, MaxBytes: 6, Timeout: 7, KeepFirst: 100, KeepLast: 100},
		},
		{
			name: "never widened", source: Default(), request: Request{MaxRows: 1 << 60, MaxBytes: 1 << 60, Timeout: 1 << 60},
			want: Verdict{Allowed: true, MaxRows: 1_000_000, MaxBytes: 1 << 30, Timeout: 5 * time.Minute, KeepFirst: 100, KeepLast: 100},
		},
		{
			name: "read-write", source: readWrite,
			want: Verdict{Allowed: true, ReadWrite: true, MaxRows: 1_000_000, MaxBytes: 1 << 30, Timeout: 5 * time.Minute, KeepFirst: 100, KeepLast: 100},
		},
		{name: "metadata", source: metadata, want: Verdict{Allowed: true, MaxRows: 1_000_000, MaxBytes: 1 << 30, Timeout: 5 * time.Minute, KeepFirst: 100, KeepLast: 100}},
		{name: "unknown mode", source: unknown, reason: "not supported"},
		{name: "plans off", source: Default(), request: Request{Plan: true}, reason: "plans: off"},
		{name: "no plans at all", source: unplanned, request: Request{Plan: true}, reason: "plans: off"},
		{
			name: "a plan", source: planned, request: Request{Plan: true},
			want: Verdict{Allowed: true, MaxRows: 1_000_000, MaxBytes: 1 << 30, Timeout: 5 * time.Minute, KeepFirst: 100, KeepLast: 100},
		},
		{name: "a plan that is run for", source: planned, request: Request{Plan: true, Analyze: true}, reason: "plans: full"},
		{name: "zero policy", reason: "allows nothing"},
		{name: "negative timeout", source: Default(), request: Request{Timeout: -1}, reason: "makes no sense"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got := Decide(test.source, test.request)
			if test.reason != "" {
				if got.Allowed || !strings.Contains(got.Reason, test.reason) {
					t.Fatalf("got %+v, want a refusal with %q", got, test.reason)
				}
				return
			}
			if got != test.want {
				t.Fatalf("got %+v, want %+v", got, test.want)
			}
		})
	}
}

func TestSpec(t *testing.T) {
	tests := []struct {
		name, yaml string
		want       Source
		err        string
	}{
		{name: "empty", yaml: "{}", want: Default()},
		{
			name: "all", yaml: "{mode: read-write, plans: off, max_rows: 5, max_bytes: 2MiB, statement_timeout: 90s, concurrency: 3, keep_rows: off, mask: []}",
			want: Source{Mode: ModeReadWrite, MaxRows: 5, MaxBytes: 2 << 20, StatementTimeout: 90 * time.Second, Concurrency: 3, ClientIdle: time.Hour, ClientIdleInTransaction: 10 * time.Minute, Plans: PlansOff, MaskFilters: FiltersEquality},
		},
		{name: "bytes as a number", yaml: "max_bytes: 4096", want: Source{Mode: ModeReadOnly, MaxRows: 1_000_000, MaxBytes: 4096, StatementTimeout: 5 * time.Minute, Concurrency: 8, ClientIdle: time.Hour, ClientIdleInTransaction: 10 * time.Minute, KeepFirst: 100, KeepLast: 100, Plans: PlansOff, MaskFilters: FiltersEquality}},
		{
			name: "hide", yaml: "{hide: [hr, 'public.*_secret']}",
			want: Source{Mode: ModeReadOnly, MaxRows: 1_000_000, MaxBytes: 1 << 30, StatementTimeout: 5 * time.Minute, Concurrency: 8, ClientIdle: time.Hour, ClientIdleInTransaction: 10 * time.Minute, KeepFirst: 100, KeepLast: 100, Hide: Hide{"hr", "public.*_secret"}, Plans: PlansOff, MaskFilters: FiltersEquality},
		},
		{name: "hide nothing", yaml: "{hide: ['']}", err: `policy.hide: "" is not a pattern`},
		{name: "hide a schema's nothing", yaml: "{hide: ['hr.']}", err: `policy.hide: "hr." lacks a name`},
		{name: "hide nobody's", yaml: "{hide: ['.x']}", err: `policy.hide: ".x" lacks a name`},
		{name: "hide quoted", yaml: `{hide: ['"HR".x']}`, err: "write names as they are in the catalog"},
		{name: "metadata", yaml: "mode: metadata", want: Source{Mode: ModeMetadata, MaxRows: 1_000_000, MaxBytes: 1 << 30, StatementTimeout: 5 * time.Minute, Concurrency: 8, ClientIdle: time.Hour, ClientIdleInTransaction: 10 * time.Minute, KeepFirst: 100, KeepLast: 100, Plans: PlansOff, MaskFilters: FiltersEquality}},
		{name: "unknown mode", yaml: "mode: readonly", err: `policy.mode: "readonly" is none of`},
		{name: "plans", yaml: "plans: full", want: Source{Mode: ModeReadOnly, MaxRows: 1_000_000, MaxBytes: 1 << 30, StatementTimeout: 5 * time.Minute, Concurrency: 8, ClientIdle: time.Hour, ClientIdleInTransaction: 10 * time.Minute, KeepFirst: 100, KeepLast: 100, Plans: PlansFull, MaskFilters: FiltersEquality}},
		{name: "unknown plans", yaml: "plans: some", err: "is none of off"},
		{name: "mask", yaml: "mask: [{columns: ['*.email'], with: hash}, {pattern: 'a+', with: partial, keep: 2}]\nmask_filters: refuse\nmask_safe_functions: [domain_of]", want: Source{
			Mode: ModeReadOnly, MaxRows: 1_000_000, MaxBytes: 1 << 30, StatementTimeout: 5 * time.Minute, Concurrency: 8, ClientIdle: time.Hour, ClientIdleInTransaction: 10 * time.Minute, KeepFirst: 100, KeepLast: 100, Plans: PlansOff, MaskFilters: FiltersRefuse,
			Masks: []Mask{{Columns: []string{"*.email"}, With: MaskHash, Keep: DefaultKeep, Noise: DefaultNoise}, {Pattern: "a+", With: MaskPartial, Keep: 2, Noise: DefaultNoise}}, SafeFunctions: []string{"domain_of"},
		}},
		{name: "mask without a kind", yaml: "mask: [{columns: ['*.email']}]", err: "policy.mask: rule 1: with"},
		{name: "mask with a bad pattern", yaml: "mask: [{pattern: '(', with: redact}]", err: "not a regular expression"},
		{name: "mask of a column without a table", yaml: "mask: [{columns: [email], with: redact}]", err: "TABLE.COLUMN"},
		{name: "bad filters", yaml: "mask_filters: some", err: "policy.mask_filters"},
		{name: "keep rows", yaml: "keep_rows: {first: 5, last: 1000}", want: Source{Mode: ModeReadOnly, MaxRows: 1_000_000, MaxBytes: 1 << 30, StatementTimeout: 5 * time.Minute, Concurrency: 8, ClientIdle: time.Hour, ClientIdleInTransaction: 10 * time.Minute, KeepFirst: 5, KeepLast: 1000, Plans: PlansOff, MaskFilters: FiltersEquality}},
		{name: "keep the first rows", yaml: "keep_rows: {last: 0}", want: Source{Mode: ModeReadOnly, MaxRows: 1_000_000, MaxBytes: 1 << 30, StatementTimeout: 5 * time.Minute, Concurrency: 8, ClientIdle: time.Hour, ClientIdleInTransaction: 10 * time.Minute, KeepFirst: 100, Plans: PlansOff, MaskFilters: FiltersEquality}},
		{name: "keep none, in JSON", yaml: `{"keep_rows": false}`, want: Source{Mode: ModeReadOnly, MaxRows: 1_000_000, MaxBytes: 1 << 30, StatementTimeout: 5 * time.Minute, Concurrency: 8, ClientIdle: time.Hour, ClientIdleInTransaction: 10 * time.Minute, Plans: PlansOff, MaskFilters: FiltersEquality}},
		{name: "keep too many rows", yaml: "keep_rows: {first: 1001}", err: "policy.keep_rows: first: 1001 is not between 0 and 1000"},
		{name: "keep fewer than none", yaml: "keep_rows: {last: -1}", err: "policy.keep_rows: last: -1 is not between"},
		{name: "no rows", yaml: "max_rows: 0", err: "at least 1"},
		{name: "no bytes", yaml: "max_bytes: 0", err: "at least 1"},
		{name: "garbled bytes", yaml: "max_bytes: 1 gig", err: "not a size"},
		{name: "no duration", yaml: "client_idle: forever", err: "policy.client_idle: \"forever\" is not a duration"},
		{name: "too short", yaml: "client_idle: 1ms", err: "not between 1s"},
		{name: "too long", yaml: "client_idle_in_transaction: 1000h", err: "policy.client_idle_in_transaction: 1000h0m0s is not between"},
		{name: "garbled timeout", yaml: "statement_timeout: 5", err: "not a duration"},
		{name: "endless timeout", yaml: "statement_timeout: 100h", err: "not between"},
		{name: "no concurrency", yaml: "concurrency: 0", err: "not between"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			var spec Spec
			decoder := yaml.NewDecoder(strings.NewReader(test.yaml))
			decoder.KnownFields(true)
			if err := decoder.Decode(&spec); err != nil {
				t.Fatal(err)
			}
			got, err := spec.Source()
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Fatalf("got %+v, %v, want an error with %q", got, err, test.err)
				}
				return
			}
			if err != nil || !reflect.DeepEqual(got, test.want) {
				t.Fatalf("got %+v, %v, want %+v", got, err, test.want)
			}
		})
	}
}

func TestParseSize(t *testing.T) {
	good := map[string]uint64{
		"0": 0, "4096": 4096, "12B": 12, "1KiB": 1024, "1kB": 1000, "1KB": 1000, "500MB": 500e6, "3 MiB": 3 << 20,
		"1GiB": 1 << 30, "2TB": 2e12, " 7TiB ": 7 << 40,
	}
	for text, want := range good {
		if got, err := ParseSize(text); err != nil || got != want {
			t.Errorf("ParseSize(%q): got %d, %v, want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "GiB", "-1", "+1", "1.5GiB", "1gib", "1 Gi B", "0x10", "99999999999999999999", "9999999TiB"} {
		if got, err := ParseSize(text); err == nil {
			t.Errorf("ParseSize(%q): got %d, want an error", text, got)
		}
	}
}

func TestHide(t *testing.T) {
	h := Hide{"hr", "tenant_*", "public.*_secret", "*.audit"}
	for name, want := range map[string]bool{"hr": true, "tenant_1": true, "public": false, "HR": false, "x": false} {
		if got := h.Schema(name); got != want {
			t.Errorf("schema %s: %v", name, got)
		}
	}
	for _, c := range []struct {
		schema, object string
		want           bool
	}{
		{"hr", "people", true},
		{"public", "the_secret", true},
		{"public", "the_secrets", false},
		{"other", "the_secret", false},
		{"other", "audit", true},
		{"tenant_2", "x", true},
	} {
		if got := h.Object(c.schema, c.object); got != c.want {
			t.Errorf("%s.%s: %v", c.schema, c.object, got)
		}
	}
	if Hide(nil).Object("a", "b") {
		t.Error("nothing hides something")
	}
}
