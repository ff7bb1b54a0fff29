package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/postern-dev/postern/proto"
)

const (
	// blobKnown, in the data directory, has a hash of the object store's address that a start found working.
	blobKnown = "blob.known"
	// blobAgain is how often an object store is looked for that was away at the start.
	blobAgain = 10 * time.Second
)

// checkBlob sees whether the object store works. One that did at a start before, and now does
// not answer, is an outage and keeps nothing else from being served: away says so. What is wrong with the
// address, the credentials or the permissions is an error, and so is a first start without an answer.
func (s *Server) checkBlob(ctx context.Context, where string) (away bool, err error) {
	sum := sha256.Sum256([]byte(where))
	address, path := hex.EncodeToString(sum[:]), filepath.Join(s.options.Data, blobKnown)
	known, rerr := os.ReadFile(path)
	if rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
		return false, rerr
	}
	same := strings.TrimSpace(string(known)) == address
	switch err := s.blobs.Check(ctx); {
	case err == nil && same:
		return false, nil
	case err == nil:
		if err := os.WriteFile(path+".new", []byte(address+"\n"), 0o600); err != nil {
			return false, err
		}
		return false, os.Rename(path+".new", path)
	case !same || proto.CodeOf(err) != proto.CodeUnavailable || ctx.Err() != nil:
		return false, err
	default:
		s.log.Error("object store not reachable: started without it, contents of files are unavailable until it answers", "err", err)
		return true, nil
	}
}

// awaitBlob looks for an object store that was away at the start, until it answers or ctx ends.
func (s *Server) awaitBlob(ctx context.Context) {
	if !s.blobAway {
		return
	}
	ticker := time.NewTicker(blobAgain)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		err := s.blobs.Check(ctx)
		switch {
		case err == nil:
			s.log.Info("object store reachable again")
			return
		case proto.CodeOf(err) != proto.CodeUnavailable && ctx.Err() == nil:
			s.log.Error("object store not usable", "err", err)
		}
	}
}
