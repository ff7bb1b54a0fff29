package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/controlplane/masterkey"
	"github.com/postern-dev/postern/controlplane/secret"
	"github.com/postern-dev/postern/controlplane/store"
)

// TestMasterKeyThroughKills rotates the master key and the key of files while a host writes to a mounted workspace, secrets are set
// and statements run, and the control plane is killed again and again. Nothing is lost, and the old keys open nothing that is there
// in the end.
func TestMasterKeyThroughKills(t *testing.T) {
	s, a, target := mounted(t)
	pg := database(t, "rotated")
	db := joinOwn(t, s, "db", "sources:\n"+mustSource(t, s.Dir, "db", pg.SocketDSN("reader", "rotated"), ""))
	masterFile := filepath.Join(s.DataDir(), "master.key")
	oldFile := filepath.Join(t.TempDir(), "master.key")
	oldKey, err := os.ReadFile(masterFile)
	if err == nil {
		err = os.WriteFile(oldFile, oldKey, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{} // secrets
	set := func(name, value string) {
		t.Helper()
		setSecret(t, s, name, value, "--organization")
		want[name] = value
	}
	set("BEFORE", "value-of-before")
	succeeds(t, postern(t, s, "sql", "db/db", "select 'kept before'"))
	before := mustJSON[[]struct{ ID string }](t, s, "query", "list", "--limit", "1")[0].ID

	// The writer, of files that are too long to be kept in the database.
	dir := filepath.Dir(filepath.Dir(target))
	list, stop := filepath.Join(dir, "list"), filepath.Join(dir, "stop")
	script := `i=0; while [ ! -e "$3" ]; do
		yes "content of $i" | head -n 1000 > "$1/f$i" && sync "$1/f$i" && echo $i >> "$2" || echo "FAILED at $i" >> "$2"; sleep 0.05
		i=$((i+1)); done`
	writer := exec.Command("/bin/sh", "-c", script, "writer", target, list, stop)
	if err := writer.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.WriteFile(stop, nil, 0o600); _ = writer.Process.Kill() })
	written := make(chan error, 1)
	go func() { written <- writer.Wait() }()
	eventually(t, 60*time.Second, "objects of files", func() error {
		if text := must(t, s, "workspace", "key", "status"); !strings.Contains(text, "\n1 ") {
			return errors.New(text)
		}
		return nil
	})

	must(t, s, "workspace", "key", "rotate")
	must(t, s, "master-key", "rotate")
	kills := 0
	rotating := func() string {
		master, files := must(t, s, "master-key", "status"), must(t, s, "workspace", "key", "status")
		if strings.HasPrefix(master, "no rotation") && strings.HasPrefix(files, "no rotation") {
			return ""
		}
		return master + files
	}
	for ; kills < 3 || rotating() != ""; kills++ {
		if kills == 40 {
			t.Fatalf("the rotation does not end:\n%s", rotating())
		}
		time.Sleep(time.Duration(rand.IntN(1500)) * time.Millisecond)
		s.ControlPlane.Kill()
		startControlPlane(t, s)
		set(fmt.Sprintf("LOAD_%d", kills%3), fmt.Sprintf("value-of-%08d", kills))
		ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
		err := db.Online(ctx)
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		succeeds(t, postern(t, s, "sql", "db/db", "select 'kept meanwhile'"))
	}
	stopWriter(t, writer, stop, written)
	allUploaded(t, a)
	text, err := os.ReadFile(list)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Fields(string(text))
	t.Logf("%d files, %d kills", len(lines), kills)
	back := t.TempDir()
	must(t, s, "file", "get", "-r", "lab:/", back)
	for _, i := range lines {
		if got, err := os.ReadFile(filepath.Join(back, "f"+i)); err != nil || string(got) != strings.Repeat("content of "+i+"\n", 1000) {
			t.Errorf("file %s: %d bytes, %v", i, len(got), err)
		}
	}
	if e := postern(t, s, "query", "show", before, "--rows"); e.code != 0 || !strings.Contains(e.stdout, "kept before") {
		t.Errorf("the rows of before: %+v", e)
	}
	joinOwn(t, s, "late", "") // with a certificate by the CA's key

	eventually(t, 60*time.Second, "the old key to be out of the file", func() error { // which follows the last step
		ring, err := os.ReadFile(masterFile)
		if err == nil && (bytes.Contains(ring, oldKey) || strings.Contains(string(ring), `"id": "1"`)) {
			err = errors.New("it is there")
		}
		return err
	})
	if err := s.ControlPlane.Stop(30 * time.Second); err != nil {
		t.Fatal(err)
	}
	if left, err := filepath.Glob(filepath.Join(s.DataDir(), ".master.key.*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	owner, err := masterkey.Open(masterFile)
	if err != nil {
		t.Fatal(err)
	}
	thief, err := masterkey.Open(oldFile)
	if err != nil {
		t.Fatal(err)
	}
	index, err := store.Open(t.Context(), store.Config{SQLitePath: filepath.Join(s.DataDir(), "controlplane.db"), Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer index.Close() //nolint:errcheck // it was only read
	const org = store.DefaultOrganizationID
	if n, err := index.SealedByOthers(t.Context(), owner.Active()); err != nil || n[store.SealedSecret]+n[store.SealedAuthority]+n[store.SealedRows]+n[store.SealedFileKey] != 0 {
		t.Errorf("sealed by others than the newest: %v, %v", n, err)
	}
	for name, value := range want {
		row, err := index.Secret(t.Context(), org, store.SecretOrganization, "", name)
		if err != nil {
			t.Fatal(err)
		}
		about := secret.About(secret.Row{Organization: org, Scope: row.Scope, Name: name})
		if got, err := owner.Box("secrets of organization "+org).Open(row.Sealed, about); err != nil || string(got) != value {
			t.Errorf("secret %s: %q, %v", name, got, err)
		}
		for _, sealed := range [][]byte{row.Sealed, row.Sealed[16:]} {
			if _, err := thief.Box("secrets of organization "+org).Open(sealed, about); err == nil {
				t.Errorf("the old key opens the secret %s", name)
			}
		}
	}
	if keys, err := index.FileKeys(t.Context(), org); err != nil || len(keys) != 1 || keys[0].Generation != 2 || keys[0].Objects == 0 {
		t.Errorf("keys of files: %+v, %v", keys, err)
	}
}
