package pki

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
)

// masterKeySize is in bytes: AES-256.
const masterKeySize = 32

// masterKey seals private keys. It prints as "redacted".
type masterKey [masterKeySize]byte

// String hides the key.
func (masterKey) String() string { return "redacted" }

// GoString hides the key.
func (masterKey) GoString() string { return "redacted" }

// LogValue hides the key.
func (masterKey) LogValue() slog.Value { return slog.StringValue("redacted") }

// MarshalJSON hides the key.
func (masterKey) MarshalJSON() ([]byte, error) { return []byte(`"redacted"`), nil }

// readMasterKey reads the key's file. It refuses one that others may read: who
// has it and the database has the CA.
func readMasterKey(path string) (masterKey, error) {
	var key masterKey
	file, err := os.Open(path)
	if err != nil {
		return key, fmt.Errorf("master key: %w", err)
	}
	defer func() { _ = file.Close() }()
	info, err := file.Stat()
	if err != nil {
		return key, fmt.Errorf("master key: %w", err)
	}
	// The group may read it: a Kubernetes secret volume gives 0440.
	if mode := info.Mode().Perm(); mode&0o027 != 0 {
		return key, fmt.Errorf("master key: %s has mode %04o, so others could read or change it: run chmod 600 %s", path, mode, path)
	}
	content, err := io.ReadAll(io.LimitReader(file, masterKeySize+1))
	if err != nil {
		return key, fmt.Errorf("master key: %w", err)
	}
	if len(content) != masterKeySize {
		return key, fmt.Errorf("master key: %s does not hold %d bytes: restore it from a backup", path, masterKeySize)
	}
	copy(key[:], content)
	return key, nil
}

// makeMasterKey makes the file, whole or not at all, and never over another one.
// It is on the disk when makeMasterKey returns.
func makeMasterKey(path string) (masterKey, error) {
	var key masterKey
	if _, err := rand.Read(key[:]); err != nil {
		return key, err
	}
	if err := writeNew(path, key[:]); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return readMasterKey(path) // another process was first
		}
		return key, fmt.Errorf("master key: %w", err)
	}
	return key, nil
}

func writeNew(path string, content []byte) error {
	dir := filepath.Dir(path)
	temp, err := os.CreateTemp(dir, filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(temp.Name()) }()
	_, err = temp.Write(content)
	err = errors.Join(err, temp.Sync(), temp.Close())
	if err != nil {
		return err
	}
	if err := os.Link(temp.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// seal encrypts with AES-256-GCM: a random nonce, then the text. about is
// authenticated: a sealed key stands for one certificate only.
func (k masterKey) seal(plain []byte, about string) ([]byte, error) {
	aead, err := k.aead()
	if err != nil {
		return nil, err
	}
	nonce := make([]byte, aead.NonceSize())
	if _, err := rand.Read(nonce); err != nil {
		return nil, err
	}
	return aead.Seal(nonce, nonce, plain, []byte(about)), nil
}

var errUnseal = errors.New("it was sealed with another master key, or altered")

func (k masterKey) unseal(sealed []byte, about string) ([]byte, error) {
	return k.unsealInto(sealed, about, func([]byte) []byte { return nil })
}

// unsealInto is unseal, and appends to what room returns for the ciphertext.
func (k masterKey) unsealInto(sealed []byte, about string, room func(ciphertext []byte) []byte) ([]byte, error) {
	aead, err := k.aead()
	if err != nil {
		return nil, err
	}
	if len(sealed) < aead.NonceSize() {
		return nil, errUnseal
	}
	plain, err := aead.Open(room(sealed[aead.NonceSize():]), sealed[:aead.NonceSize()], sealed[aead.NonceSize():], []byte(about))
	if err != nil {
		return nil, errUnseal
	}
	return plain, nil
}

func (k masterKey) aead() (cipher.AEAD, error) {
	block, err := aes.NewCipher(k[:])
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}
