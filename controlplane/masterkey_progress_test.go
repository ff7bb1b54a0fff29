package main

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/controlplane/masterkey"
	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/e2e/storetest"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

// cancelMasterKey asks by the API.
func (s *testServer) cancelMasterKey(t *testing.T) (*posternv1.MasterKeyStatus, error) {
	t.Helper()
	resp, err := posternv1connect.NewMasterKeyServiceClient(as(s.token), s.url).CancelMasterKeyRotation(t.Context(), connect.NewRequest(&posternv1.CancelMasterKeyRotationRequest{}))
	if err != nil {
		return nil, err
	}
	return resp.Msg, nil
}

// wantRefusal is INVALID in one line with this in it.
func wantRefusal(t *testing.T, err error, text string) {
	t.Helper()
	if connect.CodeOf(err) != connect.CodeInvalidArgument || !strings.Contains(err.Error(), text) || strings.Contains(err.Error(), "\n") {
		t.Errorf("got %v, want a refusal with %q", err, text)
	}
}

// masterMetrics are the values of the metrics of a rotation.
func (s *testServer) masterMetrics(t *testing.T) (began, moved, left float64) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, s.url+"/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := as(s.token).Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close() //nolint:errcheck // it is read
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	text := string(body)
	for name, into := range map[string]*float64{"start_timestamp_seconds": &began, "moved_timestamp_seconds": &moved, "left": &left} {
		_, rest, ok := strings.Cut(text, "\ncontrolplane_master_key_rotation_"+name+" ")
		if _, err := fmt.Sscan(rest, into); !ok || err != nil {
			t.Fatalf("%s: %v in\n%s", name, err, text)
		}
	}
	return began, moved, left
}

// TestMasterKeyCancelled calls a rotation off that one control plane holds up: the status says which and since when, the new key
// leaves all files, and another rotation can begin.
func TestMasterKeyCancelled(t *testing.T) {
	cfg, _ := storetest.PostgresConfig(t)
	dir := t.TempDir()
	var all []*testServer
	for i := range 2 {
		o := Options{
			Data: filepath.Join(dir, fmt.Sprint(i)), Database: cfg.PostgresDSN, DatabasePasswordFile: cfg.PasswordFile, Blob: filepath.Join(dir, "blob"),
			PeerListen: "127.0.0.1:0", CASettle: 50 * time.Millisecond,
		}
		if i > 0 {
			keys, err := os.ReadFile(filepath.Join(dir, "0", "master.key"))
			if err = errors.Join(err, os.MkdirAll(o.Data, 0o700), os.WriteFile(filepath.Join(o.Data, "master.key"), keys, 0o600)); err != nil {
				t.Fatal(err)
			}
		}
		s, _ := runServer(t, o)
		if i > 0 {
			s.token = all[0].token
		}
		all = append(all, s)
	}
	one, two := all[0], all[1]
	patiently(t, "the replicas to see each other", func() error {
		if len(one.replicas.others()) != 1 || len(two.replicas.others()) != 1 {
			return errors.New("not yet")
		}
		return nil
	})
	_, err := one.cancelMasterKey(t)
	wantRefusal(t, err, "nothing to call off")
	if began, moved, left := one.masterMetrics(t); began != 0 || moved != 0 || left != 0 {
		t.Errorf("metrics without a rotation: %v %v %v", began, moved, left)
	}
	if got := one.masterKeyStatus(t); got.Began != nil || got.Moved != nil || len(got.Waits) != 0 {
		t.Errorf("without a rotation: %v", got)
	}

	// The second one cannot write its file: it is a directory now.
	file := filepath.Join(two.options.Data, "master.key")
	if err := errors.Join(os.Rename(file, file+".away"), os.Mkdir(file, 0o700)); err != nil {
		t.Fatal(err)
	}
	before := time.Now().Add(-time.Second)
	one.rotateMasterKey(t)
	next := ""
	patiently(t, "what holds it up", func() error {
		if err := errors.Join(one.masters.step(t.Context(), time.Now()), two.masters.step(t.Context(), time.Now())); err != nil {
			return err
		}
		for _, asked := range all {
			got := asked.masterKeyStatus(t)
			if got.Stage != masterAnnounced {
				t.Fatalf("got %v", got)
			}
			next = got.Keys[len(got.Keys)-1].Id
			if got.Began.AsTime().Before(before) || got.Moved.AsTime().Before(got.Began.AsTime()) {
				t.Fatalf("it began %v and moved %v", got.Began.AsTime(), got.Moved.AsTime())
			}
			i := slices.IndexFunc(got.Waits, func(w *posternv1.MasterKeyWait) bool { return w.Replica == two.replica })
			if i < 0 || !strings.Contains(got.Waits[i].What, "is a directory") || got.Waits[i].Since.AsTime().Before(before) || strings.Contains(got.Waits[i].What, "\n") {
				return fmt.Errorf("%v", got)
			}
		}
		return nil
	})
	if began, moved, left := one.masterMetrics(t); began < float64(before.Unix()) || moved < began || left != 0 {
		t.Errorf("metrics of a rotation: %v %v %v", began, moved, left)
	}
	if got, err := two.cancelMasterKey(t); err != nil || got.Stage != masterStable || got.Keys[len(got.Keys)-1].State != store.MasterRetired {
		t.Fatalf("called off: %v, %v", got, err)
	}
	_, err = one.cancelMasterKey(t)
	wantRefusal(t, err, "nothing to call off")
	if err := errors.Join(os.Remove(file), os.Rename(file+".away", file)); err != nil {
		t.Fatal(err)
	}
	patiently(t, "the new key to be out of all files", func() error {
		for _, s := range all {
			if err := s.masters.step(t.Context(), time.Now()); err != nil {
				return err
			}
			if keys := s.ca.Keys().IDs(); !slices.Equal(keys, []string{masterkey.FirstID}) {
				return fmt.Errorf("the ring is %v", keys)
			}
			on, err := masterkey.Open(filepath.Join(s.options.Data, "master.key"))
			if err != nil || on.Has(next) {
				return fmt.Errorf("the file has it, or %w", err)
			}
			if got := s.masterKeyStatus(t); len(got.Waits) != 0 || got.Began != nil {
				return fmt.Errorf("%v", got)
			}
		}
		return nil
	})
	patiently(t, "the metrics", func() error {
		if began, moved, _ := one.masterMetrics(t); began != 0 || moved != 0 {
			return fmt.Errorf("%v %v", began, moved)
		}
		return nil
	})
	if n := len(audited(t, one, "masterkey.cancel")); n < 1 {
		t.Error("no entry in the audit log says who called it off")
	}
	s := sealedThings{one, store.DefaultOrganizationID}
	if err := s.setSecret("A", "value-a1"); err != nil {
		t.Error(err)
	}
	one.rotateMasterKey(t)
	active := one.rotatedMasterKey(t, two)
	if active == next || active == masterkey.FirstID {
		t.Errorf("%s seals after another rotation", active)
	}
}

// TestMasterKeyHeldUp: what does not open holds a rotation up; the status names it, the rotation can't be called off any more, and
// ends when it is gone.
func TestMasterKeyHeldUp(t *testing.T) {
	o := Options{Data: filepath.Join(t.TempDir(), "data")}
	server, _ := runServer(t, o)
	s := sealedThings{server, store.DefaultOrganizationID}
	for _, name := range []string{"A", "B"} {
		if err := s.setSecret(name, "value-"+name+"1"); err != nil {
			t.Fatal(err)
		}
	}
	row, err := s.store.Secret(t.Context(), s.org, store.SecretOrganization, "", "B")
	if err != nil {
		t.Fatal(err)
	}
	broken := slices.Clone(row.Sealed)
	broken[len(broken)-1] ^= 1
	if err := s.store.ReplaceSealed(t.Context(), []store.Sealed{{Kind: store.SealedSecret, ID: row.ID, Sealed: row.Sealed}}, [][]byte{broken}); err != nil {
		t.Fatal(err)
	}
	s.rotateMasterKey(t)
	patiently(t, "what holds it up", func() error {
		if err := s.masters.step(t.Context(), time.Now()); err != nil {
			return err
		}
		got := s.masterKeyStatus(t)
		if len(got.Left) != 1 || got.Left[0].Count != 1 {
			return fmt.Errorf("%v", got)
		}
		if len(got.Waits) != 1 || !strings.Contains(got.Waits[0].What, row.ID) || got.Waits[0].Since.AsTime().Before(got.Began.AsTime()) {
			return fmt.Errorf("%v", got)
		}
		return nil
	})
	_, err = s.cancelMasterKey(t)
	wantRefusal(t, err, "can't be called off any more: the new master key")
	_, moved, _ := s.masterMetrics(t)
	for range 3 {
		if err := s.masters.step(t.Context(), time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	patiently(t, "the count of what is left", func() error {
		s.masters.sight.mu.Lock()
		s.masters.sight.counted = s.masters.sight.counted.Add(-masterCount)
		s.masters.sight.mu.Unlock()
		if err := s.masters.step(t.Context(), time.Now()); err != nil {
			return err
		}
		if _, now, left := s.masterMetrics(t); left != 1 || now < moved {
			return fmt.Errorf("%v left, moved %v after %v", left, now, moved)
		}
		return nil
	})
	_, moved, _ = s.masterMetrics(t)
	for range 3 {
		if err := s.masters.step(t.Context(), time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	if _, now, _ := s.masterMetrics(t); now != moved {
		t.Errorf("it stands still, and moved at %v after %v", now, moved)
	}
	if err := s.setSecret("B", "value-B2"); err != nil {
		t.Fatal(err)
	}
	s.rotatedMasterKey(t)
	if got := s.masterKeyStatus(t); len(got.Waits) != 0 {
		t.Errorf("in the end: %v", got)
	}

	// A step that fails says why.
	alone := &masterRotation{server: s.Server} // which no ticker steps
	alone.sight.failed(errors.Join(errors.New("no space"), proto.Errorf(proto.CodeStorageFull, "is left")))
	all := []store.MasterKey{{ID: "1", State: store.MasterOld}, {ID: "2", State: store.MasterActive, Since: time.Now()}}
	got := alone.waits(t.Context(), all, nil)
	if len(got) != 1 || !strings.Contains(got[0].What, "the last step failed: no space is left") || got[0].Replica != s.replica || time.Since(got[0].Since.AsTime()) > time.Hour {
		t.Errorf("a step that failed: %v", got)
	}
}
