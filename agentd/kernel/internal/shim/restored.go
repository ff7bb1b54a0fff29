package shim

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"time"

	"github.com/postern-dev/postern/agentd/kernel/internal/sandbox"
)

// restoredFile is in a kernel's run directory: the kernel's module postern looks for it
// before each cell, and seeds random numbers anew if need be.
const restoredFile = "restored.json"

// restoredNote is its content.
type restoredNote struct {
	// Token is another one after each restore.
	Token      string `json:"token"`
	Kind       string `json:"kind"`
	Checkpoint string `json:"checkpoint"`
	// Saved and Restored are seconds since the epoch.
	Saved    float64 `json:"saved"`
	Restored float64 `json:"restored"`
}

// writeRestored writes the file before the processes are there. What the kernel left in
// its place is not followed.
func writeRestored(spec sandbox.Spec, o RestoreOrder) error {
	var token [16]byte
	if _, err := rand.Read(token[:]); err != nil {
		return err
	}
	now := time.Now()
	if o.SavedAt.IsZero() {
		o.SavedAt = now
	}
	text, err := json.Marshal(restoredNote{hex.EncodeToString(token[:]), o.Why, o.Checkpoint, seconds(o.SavedAt), seconds(now)})
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(spec.RunDir)
	if err != nil {
		return err
	}
	defer root.Close() //nolint:errcheck // it is written through
	if err := root.RemoveAll(restoredFile); err != nil {
		return err
	}
	f, err := root.OpenFile(restoredFile, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	return errors.Join(err, f.Chown(int(spec.UID), int(spec.GID)), f.Close())
}

func seconds(t time.Time) float64 { return float64(t.UnixMilli()) / 1000 }
