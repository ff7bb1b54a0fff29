package registration

import (
	"context"
	"crypto/sha256"
	"regexp"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/regkey"
)

// Bounds of a registration key.
const (
	defaultTTL = time.Hour
	maxTTL     = 30 * 24 * time.Hour
	maxUses    = 10_000
	maxLabels  = 32
)

// Labels reach scripts and pages: a strict alphabet.
var (
	labelKey   = regexp.MustCompile(`^[a-z0-9]([a-z0-9._/-]{0,61}[a-z0-9])?$`)
	labelValue = regexp.MustCompile(`^[A-Za-z0-9._-]{0,63}$`)
)

// Create makes a registration key and returns its text, which is shown once: only
// the SHA-256 of its secret is stored. A ttl of 0 means 1 h, uses of 0 one. by is
// who made it, for people.
func (s *Service) Create(ctx context.Context, organization string, ttl time.Duration, uses uint32, labels map[string]string, by string) (*posternv1.Key, string, error) {
	if ttl == 0 {
		ttl = defaultTTL
	}
	if uses == 0 {
		uses = 1
	}
	switch {
	case ttl < time.Second || ttl > maxTTL:
		return nil, "", proto.Errorf(proto.CodeInvalid, "a key lives from 1 s to %d days, not %s", int(maxTTL.Hours()/24), ttl)
	case uses > maxUses:
		return nil, "", proto.Errorf(proto.CodeInvalid, "a key has at most %d uses, not %d", maxUses, uses)
	case len(labels) > maxLabels:
		return nil, "", proto.Errorf(proto.CodeInvalid, "a key has at most %d labels, not %d", maxLabels, len(labels))
	}
	for name, value := range labels {
		if !labelKey.MatchString(name) || !labelValue.MatchString(value) {
			return nil, "", proto.Errorf(proto.CodeInvalid,
				"label %.80q=%.80q: the name is 1 to 63 of a-z, 0-9, ., _, / and -, the value at most 63 of A-Z, a-z, 0-9, ., _ and -", name, value)
		}
	}
	secret := regkey.New(s.cfg.CA.Fingerprint())
	now := s.cfg.Now()
	key := &posternv1.Key{
		Id: secret.ID, Labels: labels, MaxUses: uses, CreatedBy: by,
		Created: timestamppb.New(now), Expires: timestamppb.New(now.Add(ttl)),
	}
	if err := s.cfg.Store.InsertKey(ctx, organization, key, sha256.Sum256(secret.Secret[:])); err != nil {
		return nil, "", err
	}
	return key, secret.Encode(), nil
}
