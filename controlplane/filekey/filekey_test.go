package filekey_test

import (
	"bytes"
	"context"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/postern-dev/postern/controlplane/filekey"
	"github.com/postern-dev/postern/controlplane/masterkey"
	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/e2e/storetest"
	"github.com/postern-dev/postern/proto"
)

var ctx = context.Background()

func kit(t *testing.T) (s *store.Store, keys *masterkey.Keys, org string) {
	t.Helper()
	s = storetest.SQLite(t)
	keys, err := masterkey.Create(filepath.Join(t.TempDir(), "master.key"))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.FirstMasterKey(ctx, masterkey.FirstID, time.Now()); err != nil {
		t.Fatal(err)
	}
	o, err := s.CreateOrganization(ctx, "acme", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return s, keys, o.Id
}

// TestFirst: the first generation is the key that versions before derived, however many make it at once; without the
// first master key it is a random one.
func TestFirst(t *testing.T) {
	s, keys, org := kit(t)
	want, err := keys.FirstDataKey("files of " + org)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			generation, key, err := filekey.New(s, keys).Newest(ctx, org)
			if err != nil || generation != 1 || !bytes.Equal(key.Bytes(), want.Bytes()) {
				t.Errorf("generation %d, %v", generation, err)
			}
		})
	}
	wg.Wait()
	if got, err := filekey.New(s, keys).Of(ctx, org, 1); err != nil || !bytes.Equal(got.Bytes(), want.Bytes()) {
		t.Errorf("got another key, or %v", err)
	}
	id, err := keys.New()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.AnnounceMasterKey(ctx, id, time.Now()); err != nil {
		t.Fatal(err)
	}
	keys.Use(id, id)
	if err := keys.Drop(masterkey.FirstID); err != nil {
		t.Fatal(err)
	}
	o, err := s.CreateOrganization(ctx, "later", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	_, key, err := filekey.New(s, keys).Newest(ctx, o.Id)
	if err != nil || bytes.Equal(key.Bytes(), want.Bytes()) {
		t.Errorf("without the first master key: %v", err)
	}
	again, err := filekey.New(s, keys).Of(ctx, o.Id, 1)
	if err != nil || !bytes.Equal(again.Bytes(), key.Bytes()) {
		t.Errorf("it is not kept: %v", err)
	}
}

// TestRotate: another process learns of a new key, old ones open until they are dropped, and a key of one organization
// or generation does not pass for another's.
func TestRotate(t *testing.T) {
	s, keys, org := kit(t)
	here, there := filekey.New(s, keys), filekey.New(s, keys)
	_, first, err := there.Newest(ctx, org)
	if err != nil {
		t.Fatal(err)
	}
	if err := here.Rotate(ctx, org); err != nil {
		t.Fatal(err)
	}
	if err := there.Rotate(ctx, org); proto.CodeOf(err) != proto.CodeAlreadyExists {
		t.Errorf("a second one: got %v", err)
	}
	generation, second, err := here.Newest(ctx, org)
	if err != nil || generation != 2 || bytes.Equal(first.Bytes(), second.Bytes()) {
		t.Fatalf("generation %d, %v", generation, err)
	}
	there.Forget(org)
	if generation, _, err = there.Newest(ctx, org); err != nil || generation != 2 {
		t.Errorf("elsewhere generation %d, %v", generation, err)
	}
	if old, err := there.Of(ctx, org, 1); err != nil || !bytes.Equal(old.Bytes(), first.Bytes()) {
		t.Errorf("the old key: %v", err)
	}
	_, sealed, err := s.NewestFileKey(ctx, org)
	if err != nil || bytes.Contains(sealed, second.Bytes()[:16]) {
		t.Fatalf("the key is in the store in the clear, or %v", err)
	}
	for _, other := range [][2]string{{org, "1"}, {"org_other", "2"}} {
		if _, err := here.Reseal(other[0], other[1], sealed); err == nil {
			t.Errorf("it passes for the one of %v", other)
		}
	}
	if _, err := here.Reseal(org, "2", sealed); err != nil {
		t.Error(err)
	}
	if done, err := s.DropFileKey(ctx, org, 1, false); err != nil || !done {
		t.Fatalf("%v, %v", done, err)
	}
	here.Forget(org)
	if _, err := here.Of(ctx, org, 1); proto.CodeOf(err) != proto.CodeNotFound {
		t.Errorf("a key that is gone: got %v", err)
	}
}
