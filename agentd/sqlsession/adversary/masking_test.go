package adversary

import (
	"bytes"
	"strings"
	"testing"

	"github.com/postern-dev/postern/agentd/sqlsession"
)

// masked are the columns whose values differ between the worlds.
var masked = []string{
	"app.customers.email", "app.customers.card", "app.customers.salary", "app.customers.balance", "app.customers.born", "app.customers.tags", "app.customers.doc",
	"app.customers.big", "app.customers.extra", "app.orders.note", "app.orders.amount", "app.orders.placed", "secret.*.*", "app.parted.*", "app.guarded.v", "app.readings.v",
}

// maskGuard hides them all. Kinds that tell nothing let the worlds be compared.
func maskGuard(mode, filters string, with ...string) sqlsession.Guard {
	guard := sqlsession.Guard{Mode: mode, Plans: "off", MaskFilters: filters, MaskKey: bytes.Repeat([]byte{7}, 32)}
	for i, column := range masked {
		guard.Masks = append(guard.Masks, sqlsession.Mask{Columns: []string{column}, With: with[i%len(with)], Keep: 4, Noise: 0.1})
	}
	return guard
}

// TestMasking: nothing that comes out tells of a masked column's values.
func TestMasking(t *testing.T) {
	w := ownWorld(t)
	tell := func(name string, same bool, filters string, with ...string) map[bool]*telling {
		all := make(map[bool]*telling)
		for _, readWrite := range []bool{false, true} {
			mode := "read-only"
			if readWrite {
				mode = "read-write"
			}
			guard := maskGuard(mode, filters, with...)
			m, log := newManager(t, w.source(alpha, roleRoot, alpha, guard), w.source(beta, roleRoot, beta, guard))
			all[readWrite] = &telling{t: t, w: w, m: m, log: log, readWrite: readWrite, same: same}
		}
		return all
	}
	strict := tell("strict", true, "refuse", "redact", "null")
	loose := tell("loose", false, "equality", "hash", "partial", "noise")
	r := newReport(t, "masking")
	defer r.end()
	before, err := w.snapshot(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range corpus(t, "testdata/masking.sql") {
		readWrite := strings.HasPrefix(a.why, "[rw] ")
		problems, _ := strict[readWrite].ask(a)
		more, _ := loose[readWrite].ask(a)
		for _, p := range more {
			problems = append(problems, "with hash, partial and noise: "+p)
		}
		found, after, err := w.changed(t.Context(), before)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range found {
			if a.expect == refused {
				problems = append(problems, "changed: "+f)
			}
		}
		before = after
		r.add(a, problems)
	}
}
