package adversary

import (
	"encoding/base64"
	"encoding/hex"
	"slices"
	"strings"
	"testing"

	"github.com/postern-dev/postern/agentd/sqlsession"
)

// canaries are the forms in which values.sql's values are looked for. Every text
// in it has "kanari", so has the statement that another backend runs.
var canaries = func() []string {
	const word = "kanari"
	reversed := []byte(word)
	slices.Reverse(reversed)
	forms := []string{
		word, string(reversed), hex.EncodeToString([]byte(word)), "a\u200bnari",
		"771234", "981237", "432177", "732189", // the numbers' first digits, and reversed
	}
	// Base64 has three alignments; the characters at the edges depend on what is around.
	for pad := range 3 {
		text := base64.StdEncoding.EncodeToString([]byte(strings.Repeat("x", pad) + word + "xxx"))
		forms = append(forms, strings.ToLower(text[4*((pad+2)/3):4*((pad+2)/3)+4]))
	}
	return forms
}()

// spilled returns the form of a canary that a text has, or "".
func spilled(text string) string {
	text = strings.ToLower(text)
	for _, form := range canaries {
		if strings.Contains(text, form) {
			return form
		}
	}
	return ""
}

// telling is what a statement must not tell, in the worlds alpha and beta.
type telling struct {
	t         *testing.T
	w         *world
	m         *sqlsession.Manager
	log       *lockedBuffer
	readWrite bool
	// same tells that both worlds must give the same answer. It is off where a
	// mask is meant to differ with the value (hashes).
	same bool
}

// ask runs a statement in both worlds and returns what is wrong with the answers.
func (x *telling) ask(a attack) (problems []string, got answer) {
	x.t.Helper()
	sqlAlpha, sqlBeta := x.w.fill(a.sql, alpha), x.w.fill(a.sql, beta)
	got = ask(x.t, x.m, x.log, alpha, sqlAlpha, x.readWrite)
	other := ask(x.t, x.m, x.log, beta, sqlBeta, x.readWrite)
	if p := a.judge(got); p != "" {
		problems = append(problems, p)
	}
	one, two := got.plain(), other.plain()
	if x.same && one != two {
		problems = append(problems, "it tells the worlds apart: "+clip(delta(one, two)))
	}
	if spilled(sqlAlpha) == "" {
		for _, text := range []string{one, string(got.stream), got.log} {
			if form := spilled(text); form != "" {
				problems = append(problems, "a canary came out: "+around(text, form))
				break
			}
		}
	}
	return problems, got
}

// around cuts out where a canary is.
func around(text, form string) string {
	i := strings.Index(strings.ToLower(text), form)
	return strings.ToValidUTF8(text[max(0, i-60):min(len(text), i+len(form)+60)], "?")
}

// TestMetadata: no value of any row comes out, and nothing changes.
func TestMetadata(t *testing.T) {
	w := sharedWorld(t)
	guard := sqlsession.Guard{Mode: "metadata", Plans: "off"}
	m, log := newManager(t, w.source(alpha, roleRoot, alpha, guard), w.source(beta, roleRoot, beta, guard))
	r := newReport(t, "metadata")
	defer r.end()
	before, err := w.snapshot(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	x := &telling{t: t, w: w, m: m, log: log, same: true}
	attacks := corpus(t, "testdata/metadata.sql")
	// What is refused or fails elsewhere must at least do no harm here.
	for _, a := range append(corpus(t, "testdata/readonly.sql"), generated()...) {
		if a.expect != fails {
			a.expect = harmless
		}
		a.why = "[read-only] " + a.why
		attacks = append(attacks, a)
	}
	for _, a := range attacks {
		problems, _ := x.ask(a)
		found, after, err := w.changed(t.Context(), before)
		if err != nil {
			t.Fatalf("after %s: %v", clip(a.sql), err)
		}
		for _, f := range found {
			problems = append(problems, "changed: "+f)
		}
		if len(found) > 0 {
			w.repair(t, found)
			if after, err = w.snapshot(t.Context(), nil); err != nil {
				t.Fatal(err)
			}
		}
		before = after
		r.add(a, problems)
	}
}
