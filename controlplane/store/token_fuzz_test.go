package store

import "testing"

// FuzzParsePlace feeds what a caller could send as a page token.
func FuzzParsePlace(f *testing.F) {
	f.Add("")
	f.Add(place{Schema: "public", Kind: kindFunction, Name: "f", Position: 3}.token())
	f.Add("e30")
	f.Fuzz(func(t *testing.T, token string) {
		p, err := parsePlace(token)
		if err != nil || token == "" {
			return
		}
		if again, err := parsePlace(p.token()); err != nil || again != p {
			t.Errorf("%+v comes back as %+v, %v", p, again, err)
		}
	})
}
