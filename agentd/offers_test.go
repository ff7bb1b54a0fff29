package main

import (
	"fmt"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession"
)

func TestOffersWorkOnceAndForAWhile(t *testing.T) {
	var o offers
	now := time.Now()
	token, expires := o.add(sqlsession.Source{Name: "w", DSN: "one"}, now)
	other, _ := o.add(sqlsession.Source{Name: "w", DSN: "two"}, now)
	if token == other || len(token) != 37 || !expires.Equal(now.Add(offerLife)) {
		t.Fatalf("got %q until %s", token, expires)
	}
	for _, wrong := range [][2]string{{"w", ""}, {"w", token + "x"}, {"v", token}, {"", token}} {
		if _, ok := o.take(wrong[0], wrong[1], now); ok {
			t.Errorf("%q took it", wrong)
		}
	}
	if s, ok := o.take("w", token, now); !ok || s.DSN != "one" {
		t.Fatalf("got %+v, %v", s, ok)
	}
	if _, ok := o.take("w", token, now); ok {
		t.Error("it works twice")
	}
	if _, ok := o.take("w", other, now.Add(offerLife+time.Second)); ok {
		t.Error("it works for ever")
	}
	for i := range 3 * maxOffers {
		o.add(sqlsession.Source{Name: fmt.Sprint(i)}, now)
	}
	if len(o.list) != maxOffers {
		t.Errorf("%d are kept", len(o.list))
	}
}
