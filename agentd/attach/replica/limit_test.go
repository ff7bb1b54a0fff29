package replica

import (
	"testing"
	"time"
)

func TestLimit(t *testing.T) {
	var l limit
	now := time.Unix(1000, 0)
	for i := range limitLines {
		if ok, withheld := l.allow(now); !ok || withheld != 0 {
			t.Fatalf("line %d: %v, %d withheld", i, ok, withheld)
		}
	}
	for range 7 {
		if ok, _ := l.allow(now.Add(limitWindow - 1)); ok {
			t.Fatal("more lines than the limit")
		}
	}
	if ok, withheld := l.allow(now.Add(limitWindow)); !ok || withheld != 7 {
		t.Fatalf("in the next window: %v, %d withheld; want 7", ok, withheld)
	}
	if ok, withheld := l.allow(now.Add(limitWindow)); !ok || withheld != 0 {
		t.Fatalf("the one behind it: %v, %d withheld", ok, withheld)
	}
	// The clock was set back.
	if ok, _ := l.allow(now.Add(-time.Hour)); !ok {
		t.Fatal("no line after the clock was set back")
	}
}
