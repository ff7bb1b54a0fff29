package store_test

import (
	"bytes"
	"encoding/hex"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/e2e/storetest"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// sealedBy is something that bears a master key's id.
func sealedBy(t *testing.T, id, text string) []byte {
	t.Helper()
	if id == "1" {
		return []byte(text)
	}
	raw, err := hex.DecodeString(id)
	if err != nil {
		t.Fatal(err)
	}
	return append(append([]byte("PSTNKEY1"), raw...), text...)
}

func TestMasterKeys(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		org, other := tenants(t, s)
		const next = "00112233445566ff"
		states := func() map[string]string {
			t.Helper()
			all := map[string]string{}
			for _, k := range must(s.MasterKeys(ctx))(t) {
				all[k.ID] = k.State
			}
			return all
		}
		want := func(first, second string) {
			t.Helper()
			got := states()
			if got["1"] != first || got[next] != second {
				t.Fatalf("got %v, want 1 %s and the next %s", got, first, second)
			}
		}
		put := func(org, name, id, text string) error {
			_, err := s.PutSecret(ctx, store.SecretRow{ID: proto.NewID("sec_"), Organization: org, Scope: store.SecretOrganization, Name: name, Sealed: sealedBy(t, id, text), Changed: now})
			return err
		}
		left := func(id string) (n uint64) {
			t.Helper()
			for _, count := range must(s.SealedByOthers(ctx, id))(t) {
				n += count
			}
			return n
		}
		for range 2 {
			if err := s.FirstMasterKey(ctx, "1", now); err != nil {
				t.Fatal(err)
			}
		}
		want("active", "")
		if err := put(org, "A", "1", "a"); err != nil {
			t.Fatal(err)
		}
		if err := put(other, "B", "1", "b"); err != nil {
			t.Fatal(err)
		}
		must(0, s.InsertQuery(ctx, org, "t1", &posternv1.Query{Id: "q1", State: "running", Started: timestamppb.New(now)}))(t)
		if err := s.KeepRows(ctx, org, "q1", sealedBy(t, "1", "rows"), now); err != nil {
			t.Fatal(err)
		}
		if err := s.InsertAuthority(ctx, "f1", []byte("certificate"), sealedBy(t, "1", "key"), "trusted", now); err != nil {
			t.Fatal(err)
		}
		if err := put(org, "C", next, "c"); err == nil {
			t.Error("something sealed by a key that nobody knows was taken")
		}
		if err := s.AnnounceMasterKey(ctx, next, now); err != nil {
			t.Fatal(err)
		}
		want("active", "announced")
		wantCode(t, s.AnnounceMasterKey(ctx, "ffffffffffffffff", now), proto.CodeAlreadyExists)
		if done := must(s.ActivateMasterKey(ctx, "1", now))(t); done {
			t.Error("the active key was activated")
		}
		if done := must(s.ActivateMasterKey(ctx, next, now.Add(time.Second)))(t); !done {
			t.Error("not activated")
		}
		if done := must(s.ActivateMasterKey(ctx, next, now))(t); done {
			t.Error("activated twice")
		}
		want("old", "active")
		wantCode(t, s.AnnounceMasterKey(ctx, "ffffffffffffffff", now), proto.CodeAlreadyExists)

		stale := must(s.StaleSealed(ctx, next, 0))(t)
		if len(stale) != 4 || left(next) != 4 || left("1") != 0 {
			t.Fatalf("%d are stale, %d by count: %+v", len(stale), left(next), stale)
		}
		if done := must(s.CloseMasterKey(ctx, "1", now))(t); done {
			t.Error("closed although it seals")
		}
		// Somebody sets a secret, another removes his, while they are sealed anew.
		if err := put(org, "A", "1", "newer"); err != nil {
			t.Fatal(err)
		}
		var fresh [][]byte
		for _, x := range stale {
			fresh = append(fresh, sealedBy(t, next, "anew "+string(x.Sealed)))
			if x.Kind == store.SealedSecret && x.Name == "B" {
				if x.Organization != other || x.Scope != store.SecretOrganization {
					t.Errorf("got %+v", x)
				}
				if err := s.DeleteSecret(ctx, other, x.ID); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := s.ReplaceSealed(ctx, stale, fresh); err != nil {
			t.Fatal(err)
		}
		if got := must(s.Secret(ctx, org, store.SecretOrganization, "", "A"))(t); string(got.Sealed) != "newer" {
			t.Errorf("a newer value was overwritten: %q", got.Sealed)
		}
		if got := must(s.KeptRows(ctx, org, "q1"))(t); !bytes.Equal(got, sealedBy(t, next, "anew rows")) {
			t.Errorf("rows: %q", got)
		}
		if got := must(s.SealedAuthorityKey(ctx, "f1"))(t); !bytes.Equal(got, sealedBy(t, next, "anew key")) {
			t.Errorf("authority: %q", got)
		}
		if n := left(next); n != 1 {
			t.Errorf("%d are left, want 1", n)
		}
		if err := put(org, "A", next, "newest"); err != nil {
			t.Fatal(err)
		}
		if done := must(s.RetireMasterKey(ctx, "1", now))(t); done {
			t.Error("retired before it was closed")
		}
		if done := must(s.CloseMasterKey(ctx, "1", now))(t); !done {
			t.Error("not closed")
		}
		want("closed", "active")
		wantCode(t, put(org, "D", "1", "late"), proto.CodeUnavailable)
		wantCode(t, s.KeepRows(ctx, org, "q1", sealedBy(t, "1", "late"), now), proto.CodeUnavailable)
		wantCode(t, s.InsertAuthority(ctx, "f2", []byte("certificate"), sealedBy(t, "1", "late"), "trusted", now), proto.CodeUnavailable)
		if done := must(s.RetireMasterKey(ctx, "1", now))(t); !done {
			t.Error("not retired")
		}
		want("retired", "active")
		wantCode(t, put(org, "D", "1", "late"), proto.CodeUnavailable)
		wantCode(t, s.AnnounceMasterKey(ctx, next, now), proto.CodeInvalid)
		if id := must(s.CancelMasterKey(ctx, now))(t); id != "" {
			t.Errorf("without a rotation %q was called off", id)
		}
		if err := s.AnnounceMasterKey(ctx, "ffffffffffffffff", now); err != nil {
			t.Errorf("the rotation after: %v", err)
		}
		if id := must(s.CancelMasterKey(ctx, now))(t); id != "ffffffffffffffff" || states()[id] != "retired" {
			t.Errorf("%q was called off: %v", id, states())
		}
		if done := must(s.ActivateMasterKey(ctx, "ffffffffffffffff", now))(t); done {
			t.Error("activated after it was called off")
		}
		wantCode(t, put(org, "D", "ffffffffffffffff", "late"), proto.CodeUnavailable)
		// What an announced key has sealed, by whatever mistake, is not given up.
		const third = "eeeeeeeeeeeeeeee"
		if err := s.AnnounceMasterKey(ctx, third, now); err != nil {
			t.Fatal(err)
		}
		if err := put(org, "D", third, "early"); err != nil {
			t.Fatal(err)
		}
		_, err := s.CancelMasterKey(ctx, now)
		wantCode(t, err, proto.CodeInvalid)
		if states()[third] != "announced" {
			t.Errorf("it was changed: %v", states())
		}
		if done := must(s.ActivateMasterKey(ctx, third, now))(t); !done {
			t.Error("not activated")
		}
		if id := must(s.CancelMasterKey(ctx, now))(t); id != "" {
			t.Errorf("%q was called off although it seals", id)
		}
	})
}
