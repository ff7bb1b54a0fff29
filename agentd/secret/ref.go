package secret

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// maxSize bounds a secret; a longer file is no password.
const maxSize = 64 << 10

// Ref says where a secret comes from: exactly one field is set. The zero Ref
// means no secret.
type Ref struct {
	// File is an absolute path. Nobody but the owner and the group may have
	// access to the file. One newline at its end is not part of the secret.
	File string `yaml:"file"`
	// Env names a variable that CaptureEnv took.
	Env string `yaml:"env"`
	// Credential names a file in $CREDENTIALS_DIRECTORY (systemd's
	// LoadCredential=, SetCredentialEncrypted=, ...).
	Credential string `yaml:"credential"`
	// Vault says what to read of HashiCorp Vault; package vault does.
	Vault *VaultRef `yaml:"vault"`
}

// IsZero tells whether no secret is meant.
func (r Ref) IsZero() bool { return r == Ref{} }

// Validate checks the form of the reference; it reads nothing.
func (r Ref) Validate() error {
	set := 0
	if r.Vault != nil {
		set++
		if err := r.Vault.validate(); err != nil {
			return err
		}
	}
	for _, field := range []string{r.File, r.Env, r.Credential} {
		if field != "" {
			set++
		}
	}
	if set != 1 {
		return errors.New("exactly one of file, env, credential and vault must be given")
	}
	if r.File != "" && !filepath.IsAbs(r.File) {
		return fmt.Errorf("file %q is not an absolute path", r.File)
	}
	if strings.ContainsAny(r.Env, "=\x00") {
		return fmt.Errorf("env %q is not a variable's name", r.Env)
	}
	if r.Credential != "" && (r.Credential != filepath.Base(r.Credential) || r.Credential == "." || r.Credential == "..") {
		return fmt.Errorf("credential %q is not a name without slashes", r.Credential)
	}
	return nil
}

// Load reads the secret afresh. env may be nil where no Ref names a variable.
// An error says what was read and what to do, never the value.
func (r Ref) Load(ctx context.Context, env *Environment) (Secret, error) {
	if err := ctx.Err(); err != nil {
		return Secret{}, err
	}
	if err := r.Validate(); err != nil {
		return Secret{}, err
	}
	switch {
	case r.Vault != nil:
		return Secret{}, errors.New("the secret is in Vault, which is not at hand here")
	case r.File != "":
		return readFile(r.File, true)
	case r.Env != "":
		return env.get(r.Env)
	default:
		dir := os.Getenv("CREDENTIALS_DIRECTORY")
		if dir == "" {
			return Secret{}, fmt.Errorf("credential %s: CREDENTIALS_DIRECTORY is not set: add LoadCredential=%s:FILE to agentd's unit", r.Credential, r.Credential)
		}
		// systemd keeps these in a directory that only the service can enter.
		return readFile(filepath.Join(dir, r.Credential), false)
	}
}

func readFile(path string, checkMode bool) (Secret, error) {
	f, err := os.Open(path)
	if err != nil {
		return Secret{}, fmt.Errorf("read secret: %w", err)
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return Secret{}, fmt.Errorf("read secret: %w", err)
	}
	if !info.Mode().IsRegular() {
		return Secret{}, fmt.Errorf("secret file %s is not a regular file", path)
	}
	if mode := info.Mode().Perm(); checkMode && mode&0o027 != 0 {
		return Secret{}, fmt.Errorf("secret file %s is open to others (mode %04o): run chmod 600 %s", path, mode, path)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxSize+1))
	if err != nil {
		return Secret{}, fmt.Errorf("read secret: %w", err)
	}
	if len(data) > maxSize {
		return Secret{}, fmt.Errorf("secret file %s has more than %d bytes", path, maxSize)
	}
	value := strings.TrimSuffix(strings.TrimSuffix(string(data), "\n"), "\r")
	if value == "" {
		return Secret{}, fmt.Errorf("secret file %s is empty", path)
	}
	if strings.ContainsAny(value, "\x00\n") {
		return Secret{}, fmt.Errorf("secret file %s has more than one line, or a zero byte", path)
	}
	return New(value), nil
}
