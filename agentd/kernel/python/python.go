package python

import (
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

//go:embed postern/*.py
var files embed.FS

// Extension is the module that an IPython kernel loads at its start: the value of
// --IPKernelApp.extra_extensions.
const Extension = "postern"

// Version names the module's content: 16 hexadecimal digits.
func Version() string {
	h := sha256.New()
	for _, name := range names() {
		text, _ := files.ReadFile(name)
		fmt.Fprintf(h, "%s %d\n%s", name, len(text), text)
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}

func names() []string {
	list, _ := fs.Glob(files, "postern/*.py")
	return list
}

// Install writes the module beneath a directory of the caller's and returns the
// directory for PYTHONPATH, which is never changed once it is there: kernels of
// an older agentd keep theirs. Everybody may read it. Two at once are one.
func Install(dir string) (string, error) {
	place := filepath.Join(dir, Version())
	if _, err := os.Stat(place); err == nil {
		return place, nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(dir, ".new-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	if err := fill(tmp); err != nil {
		return "", err
	}
	if err := os.Rename(tmp, place); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	return place, nil
}

func fill(dir string) error {
	if err := os.MkdirAll(filepath.Join(dir, "postern"), 0o755); err != nil {
		return err
	}
	for _, name := range names() {
		text, err := files.ReadFile(name)
		if err != nil {
			return err
		}
		if err := writeSynced(filepath.Join(dir, name), text); err != nil {
			return err
		}
	}
	// MkdirTemp and the umask have left less than everybody needs.
	return errors.Join(os.Chmod(filepath.Join(dir, "postern"), 0o755), os.Chmod(dir, 0o755))
}

func writeSynced(path string, text []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	return errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close())
}
