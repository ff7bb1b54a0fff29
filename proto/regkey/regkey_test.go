package regkey

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/postern-dev/postern/proto"
)

func TestRoundTrip(t *testing.T) {
	k := New(sha256.Sum256([]byte("ca")))
	text := k.Encode()
	if len(text) != 130 {
		t.Errorf("length %d, want 130 as documented", len(text))
	}
	got, err := Parse("  " + text + "\n")
	if err != nil {
		t.Fatal(err)
	}
	if got != k {
		t.Error("the key changed on its way")
	}
}

func TestParseRefuses(t *testing.T) {
	good := New(sha256.Sum256([]byte("ca"))).Encode()
	flip := func(i int) string {
		c := byte('a')
		if good[i] == c {
			c = 'b'
		}
		return good[:i] + string(c) + good[i+1:]
	}
	for name, text := range map[string]string{
		"empty": "", "blank": " \n", "token": "pst1_abc", "cut": good[:len(good)-1], "longer": good + "a", "upper case": "prk1_" + strings.ToUpper(good[5:]),
		"first changed": flip(5), "middle changed": flip(60), "last changed": flip(len(good) - 1), "huge": "prk1_" + strings.Repeat("a", 1<<20), "inner space": good[:9] + " " + good[9:],
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Parse(text)
			if proto.CodeOf(err) != proto.CodeKeyMalformed {
				t.Fatalf("got %v, want KEY_MALFORMED", err)
			}
			if len(text) > 20 && strings.Contains(err.Error(), text[10:20]) {
				t.Errorf("the error quotes the key: %v", err)
			}
		})
	}
}

func TestKeyIsRedacted(t *testing.T) {
	k := New([32]byte{1})
	j, err := json.Marshal(map[string]any{"k": k})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{fmt.Sprint(k), fmt.Sprintf("%+v", k), fmt.Sprintf("%#v", k), string(j)} {
		if !strings.Contains(s, "redacted") || strings.Contains(s, k.ID) {
			t.Errorf("printed as %q", s)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(New([32]byte{1}).Encode())
	f.Add("prk1_")
	f.Fuzz(func(t *testing.T, text string) {
		k, err := Parse(text)
		if err == nil && k.Encode() != strings.TrimSpace(text) {
			t.Fatalf("%q is not canonical", text)
		}
	})
}
