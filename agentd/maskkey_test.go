package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/postern-dev/postern/agentd/config"
	"github.com/postern-dev/postern/agentd/policy"
	"github.com/postern-dev/postern/agentd/secret"
)

func TestMaskKey(t *testing.T) {
	ctx, state := context.Background(), t.TempDir()
	file := filepath.Join(state, maskKeyFile)
	c := config.Default()
	c.Sources = []config.Source{{Name: "a"}}
	if key, err := maskKey(ctx, c, nil, state, "org_1"); key != nil || err != nil {
		t.Fatalf("without masks: %v, %v", key, err)
	}
	if _, err := os.Stat(file); err == nil {
		t.Fatal("a key was made that nothing needs")
	}
	c.Sources[0].Policy.Masks = []policy.Mask{{Pattern: "x", With: policy.MaskRedact}}
	key, err := maskKey(ctx, c, nil, state, "org_1")
	if err != nil || len(key) != 32 {
		t.Fatalf("got %d bytes, %v", len(key), err)
	}
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 || st.Size() != maskKeySize {
		t.Fatalf("the file: %v, %v", st, err)
	}
	again, _ := maskKey(ctx, c, nil, state, "org_1")
	other, _ := maskKey(ctx, c, nil, state, "org_2")
	if !bytes.Equal(key, again) || bytes.Equal(key, other) {
		t.Error("the key must be the same for an organization, and another for another")
	}
	// Hosts that share a key mask alike.
	shared := filepath.Join(t.TempDir(), "shared")
	if err := os.WriteFile(shared, []byte(strings.Repeat("k", 64)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c.MaskKey = secret.Ref{File: shared}
	here, err := maskKey(ctx, c, nil, state, "org_1")
	if err != nil {
		t.Fatal(err)
	}
	there, _ := maskKey(ctx, c, nil, t.TempDir(), "org_1")
	if !bytes.Equal(here, there) || bytes.Equal(here, key) {
		t.Error("a shared key does not count")
	}
	if err := os.WriteFile(shared, []byte("short"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := maskKey(ctx, c, nil, state, "org_1"); err == nil || strings.Contains(err.Error(), "short\n") {
		t.Errorf("a short key: %v", err)
	}
	c.MaskKey = secret.Ref{}
	if err := os.WriteFile(file, []byte("torn"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := maskKey(ctx, c, nil, state, "org_1"); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("a broken file: %v", err)
	}
}
