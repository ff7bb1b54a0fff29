package main

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/controlplane/masterkey"
	"github.com/postern-dev/postern/controlplane/query"
	"github.com/postern-dev/postern/controlplane/secret"
	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/e2e/storetest"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

// runServer is startServer, of which stop ends it.
func runServer(t *testing.T, o Options) (s *testServer, stop func()) {
	t.Helper()
	o.Listen, o.DrainTimeout, o.LogLevel, o.LogFormat = "127.0.0.1:0", 5*time.Second, "error", "text"
	server, err := NewServer(t.Context(), o, slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn})))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("control plane: %v", err)
		}
		http.DefaultClient.CloseIdleConnections()
	})
	t.Cleanup(stop)
	text, err := os.ReadFile(filepath.Join(o.Data, "admin.token"))
	if err != nil && !errors.Is(err, os.ErrNotExist) { // another replica has it
		t.Fatal(err)
	}
	return &testServer{Server: server, url: "http://" + server.Addr().String(), token: strings.TrimSpace(string(text))}, stop
}

// patiently is eventually for what takes several control planes a while on a busy machine.
func patiently(t *testing.T, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waiting for %s: %v", what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (s *testServer) masterKeyStatus(t *testing.T) *posternv1.MasterKeyStatus {
	t.Helper()
	got, err := s.masters.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func (s *testServer) rotateMasterKey(t *testing.T) *posternv1.MasterKeyStatus {
	t.Helper()
	resp, err := posternv1connect.NewMasterKeyServiceClient(as(s.token), s.url).RotateMasterKey(t.Context(), connect.NewRequest(&posternv1.RotateMasterKeyRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	return resp.Msg
}

// rotatedMasterKey waits for the end of a rotation, which it hurries, and returns the id of the key that seals.
func (s *testServer) rotatedMasterKey(t *testing.T, others ...*testServer) string {
	t.Helper()
	active := ""
	patiently(t, "the end of the rotation", func() error {
		for _, one := range append(others, s) {
			if err := one.masters.step(t.Context(), time.Now()); err != nil {
				return err
			}
		}
		status := s.masterKeyStatus(t)
		if status.Stage != masterStable {
			return fmt.Errorf("it is %v", status)
		}
		for _, k := range status.Keys {
			if k.State == store.MasterActive {
				active = k.Id
			}
		}
		if keys := s.ca.Keys().IDs(); !slices.Equal(keys, []string{active}) {
			return fmt.Errorf("the ring is %v", keys)
		}
		return nil
	})
	return active
}

// sealedThings are all that a master key seals, by name.
type sealedThings struct {
	*testServer
	org string
}

func (s sealedThings) setSecret(name, value string) error {
	_, err := s.secrets.Set(context.Background(), secret.Caller{Principal: &posternv1.Principal{Organization: s.org, TokenId: "tok_1", TokenName: "t", Role: "admin"}},
		&posternv1.SetSecretRequest{Ref: &posternv1.SecretRef{Name: name, Scope: posternv1.SecretScope_SECRET_SCOPE_ORGANIZATION}, Value: []byte(value)})
	return err
}

func (s sealedThings) secret(name string) (string, error) {
	row, err := s.store.Secret(context.Background(), s.org, store.SecretOrganization, "", name)
	if err != nil {
		return "", err
	}
	value, err := s.ca.Box(secretsOf(s.org)).Open(row.Sealed, secret.About(secret.Row{Organization: s.org, Scope: row.Scope, Owner: row.Owner, Name: row.Name}))
	return string(value), err
}

func (s sealedThings) file(method, name string, body []byte) ([]byte, error) {
	r, err := http.NewRequest(method, s.url+"/api/v1/files/w/"+name, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	resp, err := as(s.token).Do(r)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close() //nolint:errcheck // it is read
	got, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode/100 != 2 {
		err = fmt.Errorf("%s: %s", resp.Status, got)
	}
	return got, err
}

// rawSealed are all rows in the database that a master key sealed, as they are on the disk.
func rawSealed(t *testing.T, data string) map[string][][]byte {
	t.Helper()
	db, err := sql.Open("sqlite", filepath.Join(data, "controlplane.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close() //nolint:errcheck // it was only for this
	all := map[string][][]byte{}
	for table, column := range map[string]string{"authorities": "sealed_key", "secrets": "sealed", "kept_rows": "sealed", "file_keys": "sealed"} {
		rows, err := db.QueryContext(t.Context(), "SELECT "+column+", master FROM "+table)
		if err != nil {
			t.Fatal(err)
		}
		for rows.Next() {
			var sealed []byte
			var master string
			if err := rows.Scan(&sealed, &master); err != nil {
				t.Fatal(err)
			}
			if id := masterkey.KeyOf(sealed); id != master {
				t.Errorf("%s: a row says that %s sealed it, it was %s", table, master, id)
			}
			all[table] = append(all[table], sealed)
		}
		if err := errors.Join(rows.Err(), rows.Close()); err != nil {
			t.Fatal(err)
		}
	}
	return all
}

// TestMasterKeyRotation replaces the master key under load: everything is there before, meanwhile, after, and after a
// restart, and the old key, which somebody has kept, opens nothing that is in the database now.
func TestMasterKeyRotation(t *testing.T) {
	o := Options{Data: filepath.Join(t.TempDir(), "data")}
	server, stop := runServer(t, o)
	s := sealedThings{server, store.DefaultOrganizationID}
	masterFile := filepath.Join(o.Data, "master.key")
	oldFile := filepath.Join(t.TempDir(), "master.key")
	oldKey, err := os.ReadFile(masterFile)
	if err == nil {
		err = os.WriteFile(oldFile, oldKey, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := posternv1connect.NewFileServiceClient(as(s.token), s.url).CreateWorkspace(t.Context(), connect.NewRequest(&posternv1.CreateWorkspaceRequest{Name: "w"})); err != nil {
		t.Fatal(err)
	}
	content := bytes.Repeat([]byte("contents of a file "), 1000)
	if _, err := s.file(http.MethodPut, "before", content); err != nil {
		t.Fatal(err)
	}
	if err := s.setSecret("BEFORE", "value-before"); err != nil {
		t.Fatal(err)
	}
	a := newReporter(t, s.testServer, s.token, "host")
	var kept sync.Map // ids of queries of which rows are kept
	a.answer(func(ctx context.Context, req *posternv1.SQLRequest, _ io.Writer) *posternv1.QueryOutcome {
		if err := a.report(ctx, req.QueryId, keptCanary()); err != nil {
			t.Error(err)
		}
		kept.Store(req.QueryId, true)
		return &posternv1.QueryOutcome{RowsReported: true}
	})
	ask := func() error {
		_, outcome, err := s.run(context.Background(), s.token, "host/shop", `{"sql":"select 1"}`)
		if err == nil && outcome.Error != nil {
			err = errors.New(outcome.Error.Message)
		}
		return err
	}
	if err := ask(); err != nil {
		t.Fatal(err)
	}

	if got := s.masterKeyStatus(t); got.Stage != masterStable || len(got.Keys) != 1 || got.Keys[0].Id != masterkey.FirstID || len(got.Left) != 0 {
		t.Fatalf("at first: %v", got)
	}
	status, err := posternv1connect.NewMasterKeyServiceClient(as(s.token), s.url).GetMasterKeyStatus(t.Context(), connect.NewRequest(&posternv1.GetMasterKeyStatusRequest{}))
	if err != nil || status.Msg.Stage != masterStable || len(status.Msg.Replicas) != 1 {
		t.Errorf("by the API: %v, %v", status, err)
	}
	if now, err := os.ReadFile(masterFile); err != nil || !bytes.Equal(now, oldKey) {
		t.Fatalf("the file changed without a rotation: %v", err)
	}
	done := make(chan struct{})
	var load sync.WaitGroup
	var n atomic.Int64
	for name, f := range map[string]func(i int64) error{
		"secrets": func(i int64) error {
			value := fmt.Sprintf("value-%08d", i)
			if err := s.setSecret("LOAD", value); err != nil {
				return err
			}
			got, err := s.secret("LOAD")
			if err == nil && got != value {
				err = fmt.Errorf("it is %q, was set to %q", got, value)
			}
			return err
		},
		"files": func(i int64) error {
			want := bytes.Repeat(fmt.Appendf(nil, "%08d", i), 1000)
			if _, err := s.file(http.MethodPut, "load", want); err != nil {
				return err
			}
			got, err := s.file(http.MethodGet, "load", nil)
			if err == nil && !bytes.Equal(got, want) {
				err = errors.New("another content than was written")
			}
			return err
		},
		"rows": func(int64) error { return ask() },
	} {
		load.Go(func() {
			for {
				select {
				case <-done:
					return
				case <-time.After(60 * time.Millisecond):
				}
				if err := f(n.Add(1)); err != nil && proto.CodeOf(err) != proto.CodeOverloaded {
					t.Errorf("%s meanwhile: %v", name, err)
					return
				}
			}
		})
	}
	worked := func(more int64) {
		t.Helper()
		from := n.Load()
		patiently(t, "work meanwhile", func() error {
			if n.Load() < from+more {
				return fmt.Errorf("%d", n.Load())
			}
			return nil
		})
	}
	worked(9)
	if got := s.rotateMasterKey(t); got.Stage == masterStable && len(got.Keys) != 2 {
		t.Errorf("rotated: %v", got)
	}
	s.rotateMasterKey(t) // which changes nothing
	active := s.rotatedMasterKey(t)
	worked(9)
	close(done)
	load.Wait()
	if active == masterkey.FirstID {
		t.Fatal("the first key seals still")
	}
	check := func(s sealedThings) {
		t.Helper()
		if got, err := s.secret("BEFORE"); err != nil || got != "value-before" {
			t.Errorf("the secret of before: %q, %v", got, err)
		}
		if got, err := s.file(http.MethodGet, "before", nil); err != nil || !bytes.Equal(got, content) {
			t.Errorf("the file of before: %d bytes, %v", len(got), err)
		}
		kept.Range(func(id, _ any) bool {
			got, err := s.show(t, s.token, id.(string))
			if err != nil || !bytes.Equal(got.Rows.GetArrow(), keptCanary().Arrow) {
				t.Errorf("the rows of query %s: %v, %v", id, got, err)
			}
			return err == nil
		})
		if err := s.ca.Reload(t.Context()); err != nil {
			t.Errorf("the CA: %v", err)
		}
	}
	check(s)
	stop()

	// The old key is gone, and opens nothing.
	if now, err := os.ReadFile(masterFile); err != nil || bytes.Contains(now, oldKey) || strings.Contains(string(now), `"id": "1"`) {
		t.Errorf("the old key is in the file, or %v", err)
	}
	thief, err := masterkey.Open(oldFile)
	if err != nil {
		t.Fatal(err)
	}
	owner, err := masterkey.Open(masterFile)
	if err != nil {
		t.Fatal(err)
	}
	for table, rows := range rawSealed(t, o.Data) {
		for _, sealed := range rows {
			if masterkey.KeyOf(sealed) != active {
				t.Errorf("%s: sealed by %s", table, masterkey.KeyOf(sealed))
			}
		}
		if len(rows) == 0 {
			t.Errorf("%s: nothing is in it", table)
		}
	}
	for _, row := range rawSealed(t, o.Data)["kept_rows"] {
		for _, sealed := range [][]byte{row, row[16:]} { // as it is, and as if it bore no id
			kept.Range(func(id, _ any) bool {
				if _, err := thief.Box(rowsOfQueries).Open(sealed, query.RowsAbout(s.org, id.(string))); err == nil {
					t.Error("the old key opens rows")
				}
				return true
			})
		}
	}
	if _, err := owner.FirstDataKey("files of " + s.org); err == nil {
		t.Error("the first key can still be derived from")
	}
	again, stop := runServer(t, o)
	check(sealedThings{again, s.org})

	// With the file of before nothing starts, in one line.
	stale := Options{Data: o.Data, Listen: "127.0.0.1:0", LogLevel: "error", LogFormat: "text"}
	stop()
	if err := os.WriteFile(masterFile, oldKey, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := NewServer(t.Context(), stale, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "does not have the key "+active) || strings.Contains(err.Error(), "\n") {
		t.Errorf("with the old file: got %v", err)
	}
}

// TestMasterKeyFromFile: a key that somebody has put into the file is the next one, and where none can be put the way is told.
func TestMasterKeyFromFile(t *testing.T) {
	o := Options{Data: filepath.Join(t.TempDir(), "data")}
	s, _ := runServer(t, o)
	id, err := masterkey.AddTo(filepath.Join(o.Data, "master.key"))
	if err != nil {
		t.Fatal(err)
	}
	if got := s.rotateMasterKey(t); got.Keys[len(got.Keys)-1].Id != id {
		t.Errorf("another key was made: %v", got)
	}
	if got := s.rotatedMasterKey(t); got != id {
		t.Errorf("%s seals, want %s", got, id)
	}
	// A file that is a mount of its own cannot be replaced: a directory in its place cannot either.
	file := filepath.Join(o.Data, "master.key")
	if err := os.Rename(file, file+".away"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.masters.Rotate(t.Context()); proto.CodeOf(err) != proto.CodeInvalid || strings.Contains(err.Error(), "\n") {
		t.Errorf("without the file: got %v", err)
	}
	if got := s.masterKeyStatus(t); got.Stage != masterStable {
		t.Errorf("a rotation began without a key on the disk: %v", got)
	}
	if err := os.Rename(file+".away", file); err != nil {
		t.Fatal(err)
	}
	if _, err := s.masters.Rotate(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := s.rotatedMasterKey(t); got == id {
		t.Error("the second rotation changed nothing")
	}
}

// TestMasterKeyOfReplicas: all control planes have the new key before it seals; one that does not say so holds the rotation up.
func TestMasterKeyOfReplicas(t *testing.T) {
	cfg, _ := storetest.PostgresConfig(t)
	dir := t.TempDir()
	var all []*testServer
	var keys []byte
	for i := range 3 {
		o := Options{
			Data: filepath.Join(dir, fmt.Sprint(i)), Database: cfg.PostgresDSN, DatabasePasswordFile: cfg.PasswordFile, Blob: filepath.Join(dir, "blob"),
			PeerListen: "127.0.0.1:0", CASettle: 100 * time.Millisecond,
		}
		if i > 0 {
			if err := errors.Join(os.MkdirAll(o.Data, 0o700), os.WriteFile(filepath.Join(o.Data, "master.key"), keys, 0o600)); err != nil {
				t.Fatal(err)
			}
		}
		s, _ := runServer(t, o)
		if i == 0 {
			var err error
			if keys, err = os.ReadFile(filepath.Join(o.Data, "master.key")); err != nil {
				t.Fatal(err)
			}
		} else {
			s.token = all[0].token
		}
		all = append(all, s)
	}
	patiently(t, "the replicas to see each other", func() error {
		for _, s := range all {
			if n := len(s.replicas.others()); n != 2 {
				return fmt.Errorf("%d are seen", n)
			}
		}
		return nil
	})
	s := sealedThings{all[0], store.DefaultOrganizationID}
	if err := s.setSecret("A", "value-a1"); err != nil {
		t.Fatal(err)
	}
	// One of a version before, which lives on.
	cfg.Replica = "of-before"
	before := storetest.Open(t, cfg)
	live, dead := context.WithCancel(t.Context())
	var beating sync.WaitGroup
	beat := func() {
		if err := before.BeatReplica(context.Background(), store.Replica{URL: "https://127.0.0.1:1", Started: time.Now()}); err != nil {
			t.Error(err)
		}
	}
	beat()
	beating.Go(func() {
		for live.Err() == nil {
			beat()
			time.Sleep(100 * time.Millisecond)
		}
	})
	s.rotateMasterKey(t)
	patiently(t, "the others to have the new key", func() error {
		status := all[1].masterKeyStatus(t)
		for _, r := range status.Replicas {
			if len(r.Keys) != 2 && r.Name != "of-before" {
				return fmt.Errorf("%v", status)
			}
			if r.Name == "of-before" && !strings.Contains(r.Problem, "upgrade") {
				t.Errorf("nothing is said of the one of before: %v", r)
			}
		}
		return nil
	})
	for range 3 {
		for _, one := range all {
			if err := one.masters.step(t.Context(), time.Now().Add(time.Hour)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if got := s.masterKeyStatus(t); got.Stage != masterAnnounced {
		t.Fatalf("the new key seals before all have it: %v", got)
	}
	if _, err := (fileKeyRotation{s.Server}).Rotate(t.Context(), s.org, false); proto.CodeOf(err) != proto.CodeUnavailable {
		t.Errorf("a new key of files while one of before is there: got %v", err)
	}
	dead()
	beating.Wait()
	if err := before.ForgetReplica(t.Context(), "of-before"); err != nil {
		t.Fatal(err)
	}
	active := s.rotatedMasterKey(t, all[1:]...)
	for i, one := range all {
		if got := one.rotatedMasterKey(t); got != active || active == masterkey.FirstID {
			t.Errorf("replica %d: %s, want %s", i, got, active)
		}
		things := sealedThings{one, s.org}
		if got, err := things.secret("A"); err != nil || got != "value-a1" {
			t.Errorf("replica %d: %q, %v", i, got, err)
		}
		if err := things.setSecret("A", "value-a1"); err != nil {
			t.Errorf("replica %d: %v", i, err)
		}
		if now, err := os.ReadFile(filepath.Join(one.options.Data, "master.key")); err != nil || bytes.Contains(now, keys) {
			t.Errorf("replica %d has the old key in its file, or %v", i, err)
		}
	}
	if len(audited(t, s.testServer, "masterkey.rotate")) != 1 {
		t.Error("no entry in the audit log says who began it")
	}
	patiently(t, "the entries in the audit log", func() error { // each follows its step
		for _, action := range []string{"masterkey.activate", "masterkey.retire"} {
			if len(audited(t, s.testServer, action)) != 1 {
				return errors.New("no " + action)
			}
		}
		return nil
	})
	// They still talk to each other, with what is derived from the new one.
	patiently(t, "calls between them", func() error {
		for _, one := range all {
			bases := one.replicas.bases()
			if len(bases) != 2 {
				return fmt.Errorf("%d others", len(bases))
			}
			for _, base := range bases {
				one.replicas.client.Close()
				if key, err := one.replicas.masterKey(t.Context(), base, active); err != nil || len(key) != masterkey.Size {
					return fmt.Errorf("%s: %d bytes, %w", base, len(key), err)
				}
				if _, err := one.replicas.masterKey(t.Context(), base, masterkey.FirstID); proto.CodeOf(err) != proto.CodeNotFound {
					return fmt.Errorf("a key that is gone: %w", err)
				}
			}
		}
		return nil
	})
}
