package mask

import (
	"bytes"
	"encoding/base32"
	"encoding/binary"
	"math"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"
)

var key = []byte("0123456789abcdef0123456789abcdef")

func apply(t testing.TB, rule Rule, oid uint32, value string) string {
	t.Helper()
	out, null := NewColumn(rule, oid, "public.t.c", key).Apply([]byte("x"), []byte(value), 0, 0)
	if out[0] != 'x' {
		t.Fatalf("the destination was lost")
	}
	if null {
		return "NULL"
	}
	return string(out[1:])
}

func TestApply(t *testing.T) {
	redact, null := Rule{Kind: Redact}, Rule{Kind: Null}
	partial := Rule{Kind: Partial, Keep: 4}
	for _, test := range []struct {
		rule      Rule
		oid       uint32
		in, want  string
		wantedOID uint32
	}{
		{redact, oidText, "alice", "***", oidText},
		{redact, oidVarchar, "", "***", oidText},
		{redact, 99999, "(alice,1)", "***", oidText},
		{redact, oidRecord, "(alice)", "***", oidText},
		{redact, oidJSONB, `{"a":1}`, `"***"`, oidJSONB},
		{redact, oidInt4, "5", "NULL", oidInt4},
		{redact, oidBool, "t", "NULL", oidBool},
		{redact, 1082, "2020-01-01", "NULL", 1082},
		{redact, 17, `\x00`, "NULL", 17},
		{redact, 1009, "{alice}", "NULL", 1009},
		{null, oidText, "alice", "NULL", oidText},
		{partial, oidText, "4111111111111234", "************1234", oidText},
		{partial, oidText, "abcde", "***de", oidText},
		{partial, oidText, "a", "*", oidText},
		{partial, oidText, "", "", oidText},
		{partial, oidText, "ééé", "**é", oidText},
		{Rule{Kind: Partial}, oidText, "abcdef", "******", oidText},
		{partial, oidInt8, "4915112345678", "*********5678", oidText},
		{partial, oidJSON, `{"a":1}`, `"***"`, oidJSON},
		{partial, 1082, "2020-01-01", "NULL", 1082},
		{Rule{Kind: Noise, Noise: 0.1}, oidText, "12", "NULL", oidText},
		{Rule{Kind: "of a later version"}, oidText, "alice", "***", oidText},
	} {
		if got := apply(t, test.rule, test.oid, test.in); got != test.want {
			t.Errorf("%v of %d, %q: got %q, want %q", test.rule, test.oid, test.in, got, test.want)
		}
		if got := NewColumn(test.rule, test.oid, "", key).Type(); got != test.wantedOID {
			t.Errorf("%v of %d: type %d, want %d", test.rule, test.oid, got, test.wantedOID)
		}
	}
}

func TestHash(t *testing.T) {
	hash := Rule{Kind: Hash}
	want := apply(t, hash, oidText, "42")
	if !regexp.MustCompile(`^[a-z2-7]{26}$`).MatchString(want) {
		t.Fatalf("got %q", want)
	}
	for _, same := range []struct {
		oid   uint32
		value string
	}{{oidInt4, "42"}, {oidInt8, "42"}, {oidNumeric, "42.000"}, {oidNumeric, "42"}, {oidBpchar, "42   "}} {
		if got := apply(t, hash, same.oid, same.value); got != want {
			t.Errorf("%q of %d hashes to %s, not as 42 does", same.value, same.oid, got)
		}
	}
	if apply(t, hash, oidNumeric, "100") == apply(t, hash, oidNumeric, "1") {
		t.Error("100 hashes as 1 does")
	}
	if got := apply(t, hash, oidUUID, "11111111-2222-3333-4444-555555555555"); !regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`).MatchString(got) {
		t.Errorf("got %q", got)
	}
	// A golden value: other hosts with the same key, and later versions, must
	// give the same.
	if got := apply(t, hash, oidText, "alice@example.com"); got != golden {
		t.Errorf("got %s, want %s", got, golden)
	}
	raw := NewColumn(hash, oidText, "", key).mac.digest(nil, []byte("42"))
	if got := base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(raw); strings.ToLower(got) != want {
		t.Errorf("%s is not base32 of the digest, %s", want, got)
	}
	other, _ := NewColumn(hash, oidText, "", []byte("another key of sixteen bytes up")).Apply(nil, []byte("42"), 0, 0)
	if string(other) == want {
		t.Error("the key does not count")
	}
}

const golden = "6c6k4456qeql2dskfoye3mmak4"

func TestNoise(t *testing.T) {
	rule := Rule{Kind: Noise, Noise: 0.1}
	c := NewColumn(rule, oidInt4, "public.t.salary", key)
	moved := 0
	for v := int64(-20000); v <= 20000; v += 37 {
		got := c.Int(v, 32)
		if math.Abs(float64(got-v)) > math.Abs(float64(v))*0.1+0.5 {
			t.Fatalf("%d became %d", v, got)
		}
		if got != v {
			moved++
		}
		if again := c.Int(v, 32); again != got {
			t.Fatalf("%d became %d and then %d", v, got, again)
		}
	}
	if moved < 1000 {
		t.Errorf("only %d moved", moved)
	}
	for _, bits := range []int{16, 32, 64} {
		limit := int64(1)<<(bits-1) - 1
		for i := range int64(100) {
			if got := c.Int(limit-i, bits); got < 0 || got > limit {
				t.Fatalf("%d of %d bits became %d", limit-i, bits, got)
			}
			if got := c.Int(-limit+i, bits); got > 0 || got < -limit-1 {
				t.Fatalf("%d of %d bits became %d", -limit+i, bits, got)
			}
		}
	}
	if a, b := c.Int(1000003, 64), NewColumn(rule, oidInt8, "public.t.other", key).Int(1000003, 64); a == b {
		t.Error("two columns have the same noise")
	}
	// All formats say the same.
	in := binary.BigEndian.AppendUint32(nil, 123456)
	asText, _ := c.Apply(nil, []byte("123456"), 0, 0)
	asBinary, _ := c.Apply(nil, in, 1, 1)
	if got := strconv.Itoa(int(int32(binary.BigEndian.Uint32(asBinary)))); got != string(asText) {
		t.Errorf("text %s, binary %s", asText, got)
	}
	for _, v := range []string{"0", "0.00", "12.50", "-12.50", "0.01", "99999999999999999999999999.9", "NaN", "-Infinity", strings.Repeat("9", 1000)} {
		got := apply(t, rule, oidNumeric, v)
		a, err1 := strconv.ParseFloat(v, 64)
		b, err2 := strconv.ParseFloat(got, 64)
		if (err1 != nil) != (err2 != nil) || math.Abs(a-b) > math.Abs(a)*0.1+1e-2 || strings.Contains(v, ".") != strings.Contains(got, ".") {
			t.Errorf("%s became %s", v, got)
		}
	}
	if got := apply(t, rule, oidNumeric, strings.Repeat("9", maxDigits+1)); got != "NULL" {
		t.Errorf("a giant became %.10s", got)
	}
	for _, v := range []string{"1.5", "-1e300", "NaN", "Infinity", "1.7976931348623157e308", "0"} {
		got := apply(t, rule, oidFloat8, v)
		a, _ := strconv.ParseFloat(v, 64)
		b, err := strconv.ParseFloat(got, 64)
		if err != nil || math.Abs(a-b) > math.Abs(a)*0.1 || math.IsInf(a, 0) != math.IsInf(b, 0) {
			t.Errorf("%s became %s", v, got)
		}
	}
}

func TestTexts(t *testing.T) {
	texts, err := NewTexts([]Pattern{
		{Expr: `\b\d{13,19}\b`, Rule: Rule{Kind: Partial, Keep: 4}},
		{Expr: `[a-z]+@[a-z.]+`, Rule: Rule{Kind: Redact}},
		{Expr: `key-\w+`, Rule: Rule{Kind: Hash}},
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	if got := texts.String("4111111111111234 of alice@example.com"); got != "************1234 of ***" {
		t.Errorf("got %q", got)
	}
	if got := texts.String("key-abc"); len(got) != hashLength || got == "key-abc" {
		t.Errorf("got %q", got)
	}
	if out, found := texts.Append(nil, []byte(`{"a":"alice@example.com"}`), oidJSONB); !found || string(out) != `{"a":"***"}` {
		t.Errorf("got %s", out)
	}
	if texts.Looks(oidInt4) || !texts.Looks(oidText) || !texts.Looks(99999) || (*Texts)(nil).Looks(oidText) {
		t.Error("looks at the wrong types")
	}
	if _, err := NewTexts([]Pattern{{Expr: "("}}, key); err == nil {
		t.Error("a bad pattern is taken")
	}
}

func FuzzApply(f *testing.F) {
	f.Add("alice@example.com", uint32(oidText), uint8(0))
	f.Add("-12.50", uint32(oidNumeric), uint8(4))
	kinds := []Kind{Redact, Hash, Partial, Null, Noise}
	f.Fuzz(func(t *testing.T, value string, oid uint32, kind uint8) {
		rule := Rule{Kind: kinds[int(kind)%len(kinds)], Keep: 4, Noise: 0.1}
		c := NewColumn(rule, oid, "t", key)
		out, null := c.Apply(nil, []byte(value), 0, 0)
		if null && len(out) != 0 {
			t.Errorf("NULL with %q", out)
		}
		if rule.Kind != Partial && rule.Kind != Noise && len(value) > 8 && bytes.Contains(out, []byte(value)) {
			t.Errorf("%s of %q shows it: %q", rule.Kind, value, out)
		}
		if rule.Kind == Partial && utf8.ValidString(value) && !utf8.Valid(out) {
			t.Errorf("%q became %q", value, out)
		}
	})
}

func BenchmarkHash(b *testing.B) {
	c := NewColumn(Rule{Kind: Hash}, oidText, "t", key)
	value, dst := []byte("alice.0123456789@xyz"), make([]byte, 0, 64)
	b.ReportAllocs()
	for b.Loop() {
		dst, _ = c.Apply(dst[:0], value, 0, 0)
	}
}

func BenchmarkPartial(b *testing.B) {
	c := NewColumn(Rule{Kind: Partial, Keep: 4}, oidText, "t", key)
	value, dst := []byte("alice.0123456789@xyz"), make([]byte, 0, 64)
	b.ReportAllocs()
	for b.Loop() {
		dst, _ = c.Apply(dst[:0], value, 0, 0)
	}
}
