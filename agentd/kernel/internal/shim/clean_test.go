package shim

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/postern-dev/postern/proto/jupyter"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// TestClean shows what becomes of messages that hold a value, cut in any place, and that
// order and the rest of them stay.
func TestClean(t *testing.T) {
	const value = "abcdefgh-ijkl"
	parent := func(id string) []byte {
		if id == "" {
			return []byte("{}")
		}
		return fmt.Appendf(nil, `{"msg_id":%q,"session":"s","msg_type":"execute_request"}`, id)
	}
	type said struct{ channel, kind, parent, content string }
	stream := func(name, id, text string) said {
		return said{jupyter.IOPub, "stream", id, fmt.Sprintf(`{"name":%q,"text":%q}`, name, text)}
	}
	for name, test := range map[string]struct {
		in   []said
		want string
	}{
		"whole":                        {[]said{stream("stdout", "1", "x "+value+" y\n")}, "stdout 1 x [secret S] y\n|"},
		"cut":                          {[]said{stream("stdout", "1", "x abcd"), stream("stdout", "1", "efgh-ijkl y")}, "stdout 1 x |stdout 1 [secret S] y|"},
		"cut, and no value":            {[]said{stream("stdout", "1", "x abcd"), stream("stdout", "1", "e!")}, "stdout 1 x |stdout 1 abcde!|"},
		"cut by a thread":              {[]said{stream("stdout", "", "abcd"), stream("stdout", "", "efgh-ijkl")}, "stdout  [secret S]|"},
		"cut over the other stream":    {[]said{stream("stdout", "1", "abcd"), stream("stderr", "1", "err\n"), stream("stdout", "1", "efgh-ijkl")}, "stderr 1 err\n|stdout 1 [secret S]|"},
		"held until the end":           {[]said{stream("stdout", "1", "a"), {jupyter.IOPub, "status", "1", `{"execution_state":"idle"}`}}, "stdout 1 a|status {\"execution_state\":\"idle\"}|"},
		"held until the next cell":     {[]said{stream("stdout", "1", "abc"), stream("stdout", "2", "defgh-ijkl")}, "stdout 1 abc|stdout 2 defgh-ijkl|"},
		"before a question":            {[]said{stream("stdout", "1", "abc"), {jupyter.Stdin, "input_request", "1", `{"prompt":"` + value + `"}`}}, "stdout 1 abc|input_request {\"prompt\":\"[secret S]\"}|"},
		"a result":                     {[]said{{jupyter.IOPub, "execute_result", "1", `{"data": {"text/plain": "'` + value + `'"}}`}}, `execute_result {"data": {"text/plain": "'[secret S]'"}}|`},
		"a reply does not disturb":     {[]said{stream("stdout", "1", "abcd"), {jupyter.Shell, "execute_reply", "1", `{"evalue":"` + value + `"}`}, stream("stdout", "1", "efgh-ijkl")}, `execute_reply {"evalue":"[secret S]"}|stdout 1 [secret S]|`},
		"what is no stream":            {[]said{{jupyter.IOPub, "stream", "1", `{"name":"other","text":"` + value + `"}`}}, `stream {"name":"other","text":"[secret S]"}|`},
		"a stream that is no JSON":     {[]said{{jupyter.IOPub, "stream", "1", `{"text":"` + value}}, `stream {"text":"[secret S]|`},
		"nothing to change, as it was": {[]said{{jupyter.IOPub, "stream", "1", `{"name": "stdout",  "text": "\u0041"}`}}, "stdout 1 A|"},
	} {
		t.Run(name, func(t *testing.T) {
			s := &Shim{logger: slog.New(slog.DiscardHandler), self: "x"}
			s.secrets.put(Secrets{Current: []Secret{{Name: "S", Value: []byte(value)}}})
			var got strings.Builder
			for _, in := range test.in {
				for _, m := range s.clean(&posternv1.KernelMessage{Channel: in.channel, Header: fmt.Appendf(nil, `{"msg_type":%q}`, in.kind), ParentHeader: parent(in.parent), Content: []byte(in.content)}, in.kind) {
					h, _ := jupyter.ParseHeader(m.Header)
					of, _ := jupyter.ParseHeader(m.ParentHeader)
					var c struct{ Name, Text string }
					if h.Type == "stream" && json.Unmarshal(m.Content, &c) == nil && c.Name != "other" {
						fmt.Fprintf(&got, "%s %s %s|", c.Name, of.ID, c.Text)
					} else {
						fmt.Fprintf(&got, "%s %s|", h.Type, m.Content)
					}
				}
			}
			if got.String() != test.want {
				t.Errorf("got %q, want %q", got.String(), test.want)
			}
		})
	}
	// Without secrets a message is what it was, byte for byte.
	s := &Shim{}
	m := &posternv1.KernelMessage{Channel: jupyter.IOPub, Content: []byte(`{"name": "stdout",  "text": "\u0041"}`)}
	if out := s.clean(m, "stream"); len(out) != 1 || out[0] != m || string(m.Content) != `{"name": "stdout",  "text": "\u0041"}` {
		t.Errorf("got %v", out)
	}
}
