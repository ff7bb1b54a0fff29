package mask

import (
	"bytes"
	"crypto/aes"
	"encoding/hex"
	"testing"
)

// TestCMAC runs the examples of RFC 4493, section 4.
func TestCMAC(t *testing.T) {
	decode := func(s string) []byte {
		b, err := hex.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	block, err := aes.NewCipher(decode("2b7e151628aed2a6abf7158809cf4f3c"))
	if err != nil {
		t.Fatal(err)
	}
	m := newCMAC(block)
	if got, want := hex.EncodeToString(m.k1[:]), "fbeed618357133667c85e08f7236a8de"; got != want {
		t.Errorf("K1 is %s, want %s", got, want)
	}
	if got, want := hex.EncodeToString(m.k2[:]), "f7ddac306ae266ccf90bc11ee46d513b"; got != want {
		t.Errorf("K2 is %s, want %s", got, want)
	}
	message := decode("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e5130c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710")
	for _, test := range []struct {
		length int
		want   string
	}{
		{0, "bb1d6929e95937287fa37d129b756746"},
		{16, "070a16b46b4d4144f79bdd9dd04a287c"},
		{40, "dfa66747de9ae63030ca32611497c827"},
		{64, "51f0bebf7e3b9d92fc49741779363cfe"},
	} {
		for _, cut := range []int{0, 1, 16, 17} {
			cut = min(cut, test.length)
			if got := hex.EncodeToString(m.digest(message[:cut], message[cut:test.length])); got != test.want {
				t.Errorf("%d bytes, %d of them in front: got %s, want %s", test.length, cut, got, test.want)
			}
		}
	}
}

func TestDigestIsCheap(t *testing.T) {
	m := newMAC(bytes.Repeat([]byte("k"), 32))
	value, prefix := []byte("somebody@example.com"), []byte("noise\x00public.t.c\x00")
	m.digest(prefix, value)
	if n := testing.AllocsPerRun(100, func() { m.digest(nil, value); m.digest(prefix, value) }); n != 0 {
		t.Errorf("a digest allocates %v times", n)
	}
	m.digest(prefix, make([]byte, 1<<20))
	if cap(m.joined) > maxJoined {
		t.Errorf("%d bytes are kept, more than %d", cap(m.joined), maxJoined)
	}
}

func BenchmarkApply(b *testing.B) {
	key, value := bytes.Repeat([]byte("k"), 32), []byte("0123456789abcdef0123")
	for _, rule := range []Rule{{Kind: Hash}, {Kind: Partial, Keep: 4}} {
		c := NewColumn(rule, oidText, "public.people.email", key)
		b.Run(string(rule.Kind), func(b *testing.B) {
			var dst []byte
			for b.Loop() {
				dst, _ = c.Apply(dst[:0], value, 0, 0)
			}
		})
	}
}
