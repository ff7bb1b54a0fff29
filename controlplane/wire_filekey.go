package main

import (
	"context"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/controlplane/api"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// The rotation of organizations' keys of files: a new generation seals from the next write on, older ones' objects are
// sealed anew, in steps, by one control plane at a time, and a key that seals nothing is dropped.

const (
	// fileKeyTick is how often a control plane looks whether there is something to be sealed anew.
	fileKeyTick = 2 * time.Second
	// fileKeyRest is how long it rests after each step, of at most 64 MiB.
	fileKeyRest = 100 * time.Millisecond
)

// fileKeyRotation rotates keys of files.
type fileKeyRotation struct{ server *Server }

var _ api.FileKeys = fileKeyRotation{}

// Status implements api.FileKeys.
func (r fileKeyRotation) Status(ctx context.Context, organization string) (*posternv1.FileKeyStatus, error) {
	all, err := r.server.store.FileKeys(ctx, organization)
	if err != nil {
		return nil, err
	}
	out := &posternv1.FileKeyStatus{Stage: masterStable}
	if len(all) > 1 {
		out.Stage = masterSealing
	}
	for _, k := range all {
		out.Keys = append(out.Keys, &posternv1.FileKey{Generation: uint64(k.Generation), Made: timestamppb.New(k.Made), Objects: k.Objects, Damaged: k.Damaged, MasterKey: k.Master})
	}
	return out, nil
}

// Rotate implements api.FileKeys.
func (r fileKeyRotation) Rotate(ctx context.Context, organization string, force bool) (*posternv1.FileKeyStatus, error) {
	s := r.server
	all, err := s.store.FileKeys(ctx, organization)
	if err != nil {
		return nil, err
	}
	switch {
	case force && len(all) < 2:
		return nil, proto.Errorf(proto.CodeInvalid, "there is no old key to drop: --force ends a rotation in which damaged objects are all that is left (postern workspace key status)")
	case force:
		if all[1].Objects > all[1].Damaged {
			return nil, proto.Errorf(proto.CodeInvalid, "%d objects in good order are still sealed with the old key: wait until they are sealed anew (postern workspace key status)", all[1].Objects-all[1].Damaged)
		}
		if err := s.dropFileKey(ctx, organization, all[1].Generation, true); err != nil {
			return nil, err
		}
	case len(all) < 2:
		replicas, err := s.store.Replicas(ctx)
		if err != nil {
			return nil, err
		}
		for _, one := range replicas {
			// It would take what another key seals for damaged.
			if len(one.MasterKeys) == 0 && one.Name != s.replica {
				return nil, proto.Errorf(proto.CodeUnavailable, "the control plane %s is of a version that knows but one key of files: upgrade or stop it first", one.Name)
			}
		}
		if err := s.fileKeys.Rotate(ctx, organization); err != nil && proto.CodeOf(err) != proto.CodeAlreadyExists {
			return nil, err
		}
	}
	return r.Status(ctx, organization)
}

// followFileKeys seals anew what old keys of files seal, until ctx ends.
func (s *Server) followFileKeys(ctx context.Context) {
	tick := time.NewTicker(fileKeyTick)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := s.stepFileKeys(ctx); err != nil && ctx.Err() == nil {
			s.log.Warn("contents of files not sealed anew", "err", err)
		}
	}
}

// stepFileKeys goes on with rotations until nothing is left to be done.
func (s *Server) stepFileKeys(ctx context.Context) error {
	organizations, err := s.store.FileKeyRotations(ctx)
	if err != nil || len(organizations) == 0 {
		return err
	}
	_, err = s.store.Exclusively(ctx, "file keys", func(ctx context.Context) error {
		var failed error
		for _, organization := range organizations { // none waits for another one's trouble
			if err := s.sealFilesAnew(ctx, organization); err != nil {
				failed = err
			}
		}
		return failed
	})
	return err
}

func (s *Server) sealFilesAnew(ctx context.Context, organization string) error {
	for {
		n, err := s.blobs.Reseal(ctx, organization)
		if err != nil {
			return err
		}
		if n == 0 {
			break
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(fileKeyRest):
		}
	}
	all, err := s.store.FileKeys(ctx, organization)
	if err != nil {
		return err
	}
	for _, k := range all[min(1, len(all)):] {
		if k.Objects > 0 { // damaged ones, or some that came this moment
			continue
		}
		if err := s.dropFileKey(ctx, organization, k.Generation, false); err != nil {
			return err
		}
	}
	return nil
}

// dropFileKey ends a key, if it seals nothing.
func (s *Server) dropFileKey(ctx context.Context, organization string, generation int64, force bool) error {
	done, err := s.store.DropFileKey(ctx, organization, generation, force)
	if err != nil || !done {
		return err
	}
	s.fileKeys.Forget(organization)
	s.log.Info("old key of files dropped", "organization", organization, "generation", generation)
	return s.audit.Append(ctx, auditchain.Entry{
		Time: time.Now(), Organization: organization, Actor: "control plane", Action: "filekey.retire", Target: "key of files", Outcome: "done",
	})
}
