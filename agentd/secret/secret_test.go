package secret

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"gopkg.in/yaml.v3"
)

var t0 = context.Background()

func TestSecretIsRedactedEverywhere(t *testing.T) {
	const marked = "marked-secret"
	s := New(marked)
	holder := struct {
		Password Secret
		P        *Secret
	}{s, &s}
	var log bytes.Buffer
	for _, handler := range []slog.Handler{slog.NewTextHandler(&log, nil), slog.NewJSONHandler(&log, nil)} {
		slog.New(handler).Info("x", "s", s, "p", &s, "h", holder)
	}
	asJSON, err := json.Marshal(holder)
	if err != nil {
		t.Fatal(err)
	}
	asYAML, err := yaml.Marshal(map[string]any{"s": s})
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"v": fmt.Sprintf("%v %+v %#v", s, s, s), "s": fmt.Sprintf("%s %q %x %d", s, s, s, s), "holder": fmt.Sprintf("%v %+v", holder, holder),
		"error": fmt.Errorf("x: %v", s).Error(), "log": log.String(), "json": string(asJSON), "yaml": string(asYAML),
	} {
		if strings.Contains(text, marked) || strings.Contains(text, fmt.Sprintf("%x", marked)) {
			t.Errorf("%s shows the secret: %s", name, text)
		}
		if !strings.Contains(text, "redacted") {
			t.Errorf("%s: got %q, want redacted in it", name, text)
		}
	}
	if s.Reveal() != marked || s.Empty() || !(Secret{}).Empty() {
		t.Error("the value is gone")
	}
}

func TestFile(t *testing.T) {
	tests := []struct {
		name, content string
		mode          os.FileMode
		want, err     string
	}{
		{name: "plain", content: "pw", mode: 0o600, want: "pw"},
		{name: "newline", content: "pw\n", mode: 0o400, want: "pw"},
		{name: "crlf", content: " p w \r\n", mode: 0o600, want: " p w "},
		{name: "group may read", content: "pw", mode: 0o640, want: "pw"},
		{name: "others may read", content: "marked", mode: 0o644, err: "chmod 600"},
		{name: "group may write", content: "marked", mode: 0o660, err: "chmod 600"},
		{name: "empty", content: "\n", mode: 0o600, err: "is empty"},
		{name: "two lines", content: "marked\nmarked\n", mode: 0o600, err: "more than one line"},
		{name: "too long", content: strings.Repeat("marked", 20000), mode: 0o600, err: "more than"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "pw")
			if err := os.WriteFile(path, []byte(test.content), test.mode); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(path, test.mode); err != nil {
				t.Fatal(err)
			}
			got, err := Ref{File: path}.Load(t0, nil)
			if test.err == "" {
				if err != nil || got.Reveal() != test.want {
					t.Fatalf("got %q, %v, want %q", got.Reveal(), err, test.want)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), test.err) || strings.Contains(err.Error(), "marked") {
				t.Fatalf("got %v, want an error with %q and without the secret", err, test.err)
			}
		})
	}
	if _, err := (Ref{File: "/nonexistent/pw"}).Load(t0, nil); err == nil || !strings.Contains(err.Error(), "/nonexistent/pw") {
		t.Errorf("a missing file: got %v", err)
	}
	if _, err := (Ref{File: t.TempDir()}).Load(t0, nil); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("a directory: got %v", err)
	}
}

func TestFileIsReadAfresh(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pw")
	for _, want := range []string{"one", "two"} {
		if err := os.WriteFile(path, []byte(want), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := (Ref{File: path}).Load(t0, nil); err != nil || got.Reveal() != want {
			t.Fatalf("got %q, %v, want %q", got.Reveal(), err, want)
		}
	}
}

func TestCredential(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("CREDENTIALS_DIRECTORY", dir)
	if err := os.WriteFile(filepath.Join(dir, "pw"), []byte("pw\n"), 0o444); err != nil {
		t.Fatal(err)
	}
	if got, err := (Ref{Credential: "pw"}).Load(t0, nil); err != nil || got.Reveal() != "pw" {
		t.Fatalf("got %q, %v, want pw", got.Reveal(), err)
	}
	t.Setenv("CREDENTIALS_DIRECTORY", "")
	if _, err := (Ref{Credential: "pw"}).Load(t0, nil); err == nil || !strings.Contains(err.Error(), "LoadCredential=") {
		t.Fatalf("without systemd: got %v", err)
	}
}

func TestValidate(t *testing.T) {
	tests := []struct {
		name string
		ref  Ref
		err  string
	}{
		{"none", Ref{}, "exactly one"},
		{"two", Ref{File: "/a", Env: "B"}, "exactly one"},
		{"vault without a path", Ref{Vault: &VaultRef{}}, "exactly one of kv and role"},
		{"vault with both", Ref{Vault: &VaultRef{KV: "secret/x", Role: "database/creds/x"}}, "exactly one of kv and role"},
		{"vault and a file", Ref{File: "/a", Vault: &VaultRef{KV: "secret/x"}}, "exactly one of file"},
		{"vault mount alone", Ref{Vault: &VaultRef{KV: "secret"}}, "is not MOUNT/PATH"},
		{"vault climbing", Ref{Vault: &VaultRef{KV: "secret/../sys/raw"}}, "is not MOUNT/PATH"},
		{"vault query", Ref{Vault: &VaultRef{KV: "secret/x?version=1"}}, "is not MOUNT/PATH"},
		{"vault with data", Ref{Vault: &VaultRef{KV: "secret/data/x"}}, "without data/"},
		{"vault role", Ref{Vault: &VaultRef{Role: "reader"}}, "is not a path such as"},
		{"vault role with a field", Ref{Vault: &VaultRef{Role: "database/creds/reader", Field: "x"}}, "go with kv alone"},
		{"relative", Ref{File: "pw"}, "not an absolute path"},
		{"path as credential", Ref{Credential: "../pw"}, "without slashes"},
		{"dots as credential", Ref{Credential: ".."}, "without slashes"},
		{"env with equals", Ref{Env: "A=B"}, "not a variable's name"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if err := test.ref.Validate(); err == nil || !strings.Contains(err.Error(), test.err) {
				t.Fatalf("got %v, want %q", err, test.err)
			}
		})
	}
}

func TestCaptureEnvWipesTheProcessEnvironment(t *testing.T) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{"POSTERN_TEST_WIPE=1", "PW_ONE=marked-secret-1", "PW_EMPTY=", "PW_TWO=marked=secret=2", "OTHER=stays"}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}
