package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/postern-dev/postern/proto"
)

// TestMasterKeyCommand changes a file without a control plane.
func TestMasterKeyCommand(t *testing.T) {
	file := filepath.Join(t.TempDir(), "master.key")
	if err := os.WriteFile(file, bytes.Repeat([]byte{9}, 32), 0o600); err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) (string, error) {
		cmd := command()
		var out bytes.Buffer
		cmd.SetOut(&out)
		cmd.SetErr(&out)
		cmd.SetArgs(append([]string{"master-key"}, args...))
		err := cmd.ExecuteContext(t.Context())
		return strings.TrimSpace(out.String()), err
	}
	if got, err := run("list", file); err != nil || got != "1" {
		t.Errorf("list: %q, %v", got, err)
	}
	id, err := run("add", file)
	if err != nil || len(id) != 16 {
		t.Fatalf("add: %q, %v", id, err)
	}
	if got, err := run("list", file); err != nil || got != "1\n"+id {
		t.Errorf("list: %q, %v", got, err)
	}
	if _, err := run("remove", file, "nobody"); proto.CodeOf(err) != proto.CodeInvalid {
		t.Errorf("remove an unknown key: got %v", err)
	}
	if _, err := run("remove", file, "1"); err != nil {
		t.Fatal(err)
	}
	if _, err := run("remove", file, id); proto.CodeOf(err) != proto.CodeInvalid {
		t.Errorf("remove the last key: got %v", err)
	}
	var usage usageError
	for _, args := range [][]string{{}, {"add"}, {"remove", file}, {"other"}} {
		if _, err := run(args...); !errors.As(err, &usage) {
			t.Errorf("%v: got %v, want a usage error", args, err)
		}
	}
	if _, err := run("list", file+"-not"); err == nil {
		t.Error("a file that is not there")
	}
}
