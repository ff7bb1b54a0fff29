package client

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Credentials are what `postern login` keeps.
type Credentials struct {
	// URL is the control plane's, as ParseURL gives it.
	URL   string
	Token Secret
	// CAFile is an absolute path; empty means the system's CAs alone.
	CAFile string
}

// credentialsFile is the file's form: JSON.
type credentialsFile struct {
	URL    string `json:"url"`
	Token  string `json:"token"`
	CAFile string `json:"ca_file,omitempty"`
}

// ErrNoLogin is returned when no login is stored.
var ErrNoLogin = errors.New("not logged in: run `postern login`")

// CredentialsPath is $XDG_CONFIG_HOME/postern/credentials.json, by default
// ~/.config/postern/credentials.json.
func CredentialsPath() (string, error) {
	dir, err := os.UserConfigDir()
	if err != nil {
		return "", fmt.Errorf("find the place of the stored login: %w", err)
	}
	return filepath.Join(dir, "postern", "credentials.json"), nil
}

// LoadCredentials reads the login stored at path; ErrNoLogin if there is none.
// A file that others may read is refused.
func LoadCredentials(path string) (Credentials, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Credentials{}, ErrNoLogin
	}
	if err != nil {
		return Credentials{}, fmt.Errorf("read the stored login: %w", err)
	}
	defer f.Close() //nolint:errcheck // it was only read
	info, err := f.Stat()
	if err != nil {
		return Credentials{}, fmt.Errorf("read the stored login: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return Credentials{}, fmt.Errorf("the stored login %s can be read by others (mode %04o): run `chmod 600 %s`", path, info.Mode().Perm(), path)
	}
	var file credentialsFile
	dec := json.NewDecoder(f)
	dec.DisallowUnknownFields()
	if err := dec.Decode(&file); err != nil || file.URL == "" || file.Token == "" {
		return Credentials{}, fmt.Errorf("the stored login %s is damaged: run `postern login` again", path)
	}
	return Credentials{URL: file.URL, Token: NewSecret(file.Token), CAFile: file.CAFile}, nil
}

// SaveCredentials stores the login at path, whole or not at all, with mode 0600
// in a directory with mode 0700, whatever the umask.
func SaveCredentials(path string, c Credentials) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("store the login: %w", err)
		}
	}()
	data, err := json.MarshalIndent(credentialsFile{URL: c.URL, Token: c.Token.Reveal(), CAFile: c.CAFile}, "", "  ")
	if err != nil {
		return err
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(dir, ".credentials-*") // 0600
	if err != nil {
		return err
	}
	defer func() {
		tmp.Close() //nolint:errcheck // an error that matters was seen by Sync
		if err != nil {
			os.Remove(tmp.Name()) //nolint:errcheck // it is only rubbish
		}
	}()
	if _, err := tmp.Write(append(data, '\n')); err != nil {
		return err
	}
	if err := tmp.Sync(); err != nil {
		return err
	}
	if err := os.Rename(tmp.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close() //nolint:errcheck // it was only read
	return d.Sync()
}
