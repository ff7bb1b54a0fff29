package jupyter

import (
	"net/http"
	"testing"
)

func TestSplitPath(t *testing.T) {
	for path, want := range map[string][3]string{
		"":                             {"", "/", ""},
		"edge":                         {"edge", "/", ""},
		"edge/api":                     {"edge", "/api", ""},
		"edge/api/":                    {"edge", "/api", ""},
		"edge/t/TOKEN/api/kernels":     {"edge", "/api/kernels", "TOKEN"},
		"edge/t/TOKEN":                 {"edge", "/", "TOKEN"},
		"edge/t/":                      {"edge", "/", ""},
		"edge//api":                    {"edge", "/api", ""},
		"t/t/TOKEN/api/kernels/t/more": {"t", "/api/kernels/t/more", "TOKEN"},
	} {
		agent, rest, token := splitPath(path)
		if got := [3]string{agent, rest, token}; got != want {
			t.Errorf("%q: got %q, want %q", path, got, want)
		}
	}
}

func TestHeaderToken(t *testing.T) {
	for header, want := range map[string]string{
		"": "", "Bearer a": "a", "bearer  a ": "a", "token a": "a", "Token a": "a", "TOKEN a": "a", "Basic a": "", "a": "", "Bearer": "",
	} {
		if got := headerToken(header); got != want {
			t.Errorf("%q: got %q, want %q", header, got, want)
		}
	}
}

func TestSameSite(t *testing.T) {
	for _, test := range []struct {
		name, origin, forwarded, peer string
		want                          bool
	}{
		{"a program", "", "", "192.0.2.1:5", true},
		{"our page", "https://cp.example.com", "", "192.0.2.1:5", true},
		{"other letters", "https://CP.example.com", "", "192.0.2.1:5", true},
		{"another site", "https://evil.example.com", "", "192.0.2.1:5", false},
		{"another port", "https://cp.example.com:8443", "", "192.0.2.1:5", false},
		{"a longer name", "https://cp.example.com.evil.com", "", "192.0.2.1:5", false},
		{"a sandboxed page", "null", "", "192.0.2.1:5", false},
		{"nonsense", "://", "", "192.0.2.1:5", false},
		{"behind a proxy here", "https://lab.example.com", "lab.example.com", "127.0.0.1:5", true},
		{"a proxy elsewhere can say what it likes", "https://lab.example.com", "lab.example.com", "192.0.2.1:5", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := &http.Request{Host: "cp.example.com", RemoteAddr: test.peer, Header: http.Header{}}
			if test.origin != "" {
				r.Header.Set("Origin", test.origin)
			}
			if test.forwarded != "" {
				r.Header.Set("X-Forwarded-Host", test.forwarded)
			}
			if got := sameSite(r); got != test.want {
				t.Errorf("got %v, want %v", got, test.want)
			}
		})
	}
	r := &http.Request{Host: "cp.example.com", RemoteAddr: "192.0.2.1:5", Header: http.Header{"Origin": {"https://cp.example.com", "https://evil.example.com"}}}
	if sameSite(r) {
		t.Error("two origins are taken")
	}
}
