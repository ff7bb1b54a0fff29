package kernel

import (
	"regexp"
	"testing"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func TestNewID(t *testing.T) {
	form := regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)
	a, b := newID(), newID()
	if !form.MatchString(a) || a == b {
		t.Errorf("got %q, then %q", a, b)
	}
}

func TestCodeOf(t *testing.T) {
	for _, test := range []struct {
		name, kind, content, code string
		runs                      bool
	}{
		{"code", "execute_request", `{"code":"x = 1","silent":true}`, "x = 1", true},
		{"expressions", "execute_request", `{"code":"","user_expressions":{"a":"f()"}}`, "\n# user_expressions: {\"a\":\"f()\"}", true},
		{"no expressions", "execute_request", `{"code":"1","user_expressions": {} }`, "1", true},
		{"what we can't read", "execute_request", `{"code":7}`, `{"code":7}`, true},
		{"a debugger's", "debug_request", `{"command":"evaluate","arguments":{"expression":"os.environ"}}`, "os.environ", true},
		{"a debugger's breakpoint", "debug_request", `{"command":"setBreakpoints","arguments":{}}`, "", false},
		{"completion", "complete_request", `{"code":"x."}`, "", false},
		{"an answer", "input_reply", `{"value":"secret"}`, "", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			if code, runs := codeOf(test.kind, []byte(test.content)); code != test.code || runs != test.runs {
				t.Errorf("got %q, %v, want %q, %v", code, runs, test.code, test.runs)
			}
		})
	}
}

func TestCodeIsMaskedBySourcesPatterns(t *testing.T) {
	var m maskers
	agent := &posternv1.Agent{Sources: []*posternv1.SourceInfo{{Name: "a", TextPatterns: []string{`\d{13,19}`}}, {Name: "b", TextPatterns: []string{`secret-\w+`}}}}
	for range 2 {
		if got, want := m.code(agent, `pay("4111111111111111", "secret-abc", "plain")`), `pay("***", "***", "plain")`; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
	if got := m.code(&posternv1.Agent{}, "x = 4111111111111111"); got != "x = 4111111111111111" {
		t.Errorf("without patterns: got %s", got)
	}
	if got := m.code(&posternv1.Agent{Sources: []*posternv1.SourceInfo{{TextPatterns: []string{"("}}}}, "x"); got != notKept {
		t.Errorf("with patterns that can't be read: got %s", got)
	}
}
