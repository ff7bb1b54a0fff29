package token

import (
	"context"
	"time"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// MaxOverlap bounds how long the secret of before a rotation is good.
const MaxOverlap = 30 * 24 * time.Hour

// Rotate gives a token, found by id or name, a new secret and returns its text, which is
// shown once, and when the secret of before ends: after overlap, or when the token would
// have ended. Whatever belongs to the token stays. At most two secrets are good at a time:
// one that is still good of an earlier rotation ends. ttl is how long the token lives from
// now on; 0 means 90 days, or without end for one that has none.
//
// This process goes by it at once, others within five seconds. What was opened with the old
// secret before goes on until it is closed; Revoke ends that, too.
func (s *Service) Rotate(ctx context.Context, organization, idOrName string, overlap, ttl time.Duration) (*posternv1.Token, string, time.Time, error) {
	endless := ttl == 0
	if endless {
		ttl = defaultTTL
	}
	switch {
	case overlap < 0 || overlap > MaxOverlap:
		return nil, "", time.Time{}, proto.Errorf(proto.CodeInvalid, "a rotated token's old secret is good for 0 s to %d days, not %s", int(MaxOverlap.Hours()/24), overlap)
	case ttl < time.Second || ttl > maxTTL:
		return nil, "", time.Time{}, proto.Errorf(proto.CodeInvalid, "a token lives from 1 s to %d days, not %s", int(maxTTL.Hours()/24), ttl)
	}
	now, text := s.cfg.Now(), NewText()
	t, until, err := s.cfg.Store.RotateToken(ctx, organization, idOrName, text.Hash(), now.Add(overlap), now.Add(ttl), endless)
	if err != nil {
		return nil, "", time.Time{}, err
	}
	s.cache.forget()
	text.ID = t.Id
	return t, text.Encode(), until, nil
}
