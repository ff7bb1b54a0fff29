package control

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"time"
)

// Key is one of the host's keys for checkpoints and what it still seals.
type Key struct {
	ID     string    `json:"id"`
	Made   time.Time `json:"made"`
	Newest bool      `json:"newest"`
	// Packs, their living Chunks and the packs' Bytes; Checkpoints whose description or
	// list of files it seals.
	Packs       int   `json:"packs"`
	Chunks      int   `json:"chunks"`
	Bytes       int64 `json:"bytes"`
	Checkpoints int   `json:"checkpoints"`
}

// KeyOrder asks for a new key if Rotate is set, else for a list alone.
type KeyOrder struct {
	Rotate bool `json:"rotate"`
}

// keyAnswer are the keys, oldest first, or why there are none.
type keyAnswer struct {
	Keys  []Key  `json:"keys"`
	Error string `json:"error,omitempty"`
}

// handleKeys answers at /key.
func handleKeys(keys func(context.Context, KeyOrder) ([]Key, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var o KeyOrder
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 4<<10)).Decode(&o); err != nil {
			http.Error(w, "not an order about keys", http.StatusBadRequest)
			return
		}
		list, err := keys(r.Context(), o)
		if err != nil {
			write(w, keyAnswer{Error: err.Error()})
			return
		}
		write(w, keyAnswer{Keys: list})
	}
}

// AskKeys has the agentd of this runtime directory list its keys for checkpoints, oldest
// first, after it made a new one if o says so. ErrNotRunning says that there is none.
func AskKeys(ctx context.Context, runtimeDir string, o KeyOrder) ([]Key, error) {
	body, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	var a keyAnswer
	if err := ask(ctx, runtimeDir, http.MethodPost, "/key", body, &a); err != nil {
		return nil, err
	}
	if a.Error != "" {
		return nil, errors.New(a.Error)
	}
	return a.Keys, nil
}
