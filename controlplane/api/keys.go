package api

import (
	"context"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Bounds of registration keys.
const (
	defaultKeyTTL = time.Hour
	maxKeyTTL     = 30 * 24 * time.Hour
	maxKeyUses    = 10000
	maxKeyLabels  = 32
	maxLabel      = 128
)

// CreateKey implements KeyService.
func (a *API) CreateKey(ctx context.Context, req *connect.Request[posternv1.CreateKeyRequest]) (*connect.Response[posternv1.CreateKeyResponse], error) {
	return call(ctx, a, func(c Caller) (*posternv1.CreateKeyResponse, error) {
		ttl, uses := defaultKeyTTL, max(req.Msg.MaxUses, 1)
		if req.Msg.Ttl != nil {
			ttl = req.Msg.Ttl.AsDuration()
		}
		switch {
		case ttl < time.Second || ttl > maxKeyTTL:
			return nil, proto.Errorf(proto.CodeInvalid, "a key's life must be between 1s and %s, not %s", maxKeyTTL, ttl)
		case uses > maxKeyUses:
			return nil, proto.Errorf(proto.CodeInvalid, "a key has at most %d uses, not %d", maxKeyUses, uses)
		}
		if err := checkLabels(req.Msg.Labels); err != nil {
			return nil, err
		}
		key, secret, err := a.cfg.Keys.Create(ctx, c.Organization, ttl, uses, req.Msg.Labels, c.TokenName)
		if err != nil {
			return nil, err
		}
		if err := a.audit(ctx, c, auditchain.Entry{Action: "key.create", Target: key.Id}); err != nil {
			return nil, err
		}
		return &posternv1.CreateKeyResponse{Key: key, Secret: secret}, nil
	})
}

func checkLabels(labels map[string]string) error {
	if len(labels) > maxKeyLabels {
		return proto.Errorf(proto.CodeInvalid, "a key has at most %d labels, not %d", maxKeyLabels, len(labels))
	}
	for k, v := range labels {
		if k == "" || len(k) > maxLabel || len(v) > maxLabel {
			return proto.Errorf(proto.CodeInvalid, "label %.20q: names have 1 to %d bytes, values at most %d", k, maxLabel, maxLabel)
		}
	}
	return nil
}

// ListKeys implements KeyService.
func (a *API) ListKeys(ctx context.Context, _ *connect.Request[posternv1.ListKeysRequest]) (*connect.Response[posternv1.ListKeysResponse], error) {
	return call(ctx, a, func(c Caller) (*posternv1.ListKeysResponse, error) {
		keys, err := a.cfg.Store.ListKeys(ctx, c.Organization)
		return &posternv1.ListKeysResponse{Keys: keys}, err
	})
}

// RevokeKey implements KeyService.
func (a *API) RevokeKey(ctx context.Context, req *connect.Request[posternv1.RevokeKeyRequest]) (*connect.Response[posternv1.RevokeKeyResponse], error) {
	return call(ctx, a, func(c Caller) (*posternv1.RevokeKeyResponse, error) {
		key, err := a.cfg.Store.RevokeKey(ctx, c.Organization, req.Msg.KeyId, time.Now())
		if err != nil {
			return nil, err
		}
		if err := a.audit(ctx, c, auditchain.Entry{Action: "key.revoke", Target: key.Id}); err != nil {
			return nil, err
		}
		return &posternv1.RevokeKeyResponse{Key: key}, nil
	})
}
