package auditchain

import "testing"

func TestPeerHead(t *testing.T) {
	want := Head{Sequence: 42, Hash: [32]byte{1, 2, 3}}
	if got, ok := PeerHead(Entry{Action: PeerAction, Target: PeerTarget(want)}); !ok || got != want {
		t.Errorf("got %v, %v", got, ok)
	}
	for _, e := range []Entry{
		{Action: "sql.run", Target: PeerTarget(want)},
		{Action: PeerAction},
		{Action: PeerAction, Target: "control plane, entry 0 " + PeerTarget(want)[24:]},
		{Action: PeerAction, Target: "control plane, entry 3 00"},
		{Action: PeerAction, Target: "control plane, entry x " + PeerTarget(want)[24:]},
	} {
		if got, ok := PeerHead(e); ok {
			t.Errorf("%q: got %v", e.Target, got)
		}
	}
}
