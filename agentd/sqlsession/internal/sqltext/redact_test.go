package sqltext

import "testing"

func TestRedact(t *testing.T) {
	tests := map[string]string{
		"":                                         "",
		"(a = 5)":                                  "(a = ?)",
		"(a = ANY ('{1,2}'::int[]))":               "(a = ANY (?::int[]))",
		`(a ~~ E'x\\''y%'::text)`:                  "(a ~~ ?::text)",
		"(a.b1 > '1e3'::numeric(10,2))":            "(a.b1 > ?::numeric(?,?))",
		"(x IS NULL) AND (y IS NOT NULL)":          "(x IS NULL) AND (y IS NOT NULL)",
		"(x IS TRUE) OR x = true":                  "(x IS TRUE) OR x = ?",
		"COALESCE(x, NULL::text)":                  "COALESCE(x, ?::text)",
		"(hashed SubPlan 1) AND (InitPlan 2).col1": "(hashed SubPlan 1) AND (InitPlan 2).col1",
		`("order".id = $0)`:                        `("order".id = $0)`,
		"false":                                    "?",
		"(a < -12.5)":                              "(a < -?)",
		"(a = $$x$$)":                              "(a = ?)",
		"x'ab' || B'01' || 0x1F":                   "? || ? || ?",
		"'not closed":                              "?",
	}
	for text, want := range tests {
		if got := Redact(text); got != want {
			t.Errorf("%s: got %s, want %s", text, got, want)
		}
	}
}
