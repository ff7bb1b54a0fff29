package api

import (
	"context"
	"slices"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Bounds of tokens.
const (
	defaultTokenTTL = 90 * 24 * time.Hour
	maxTokenTTL     = 10 * 365 * 24 * time.Hour
)

// WhoAmI implements IdentityService.
func (a *API) WhoAmI(ctx context.Context, _ *connect.Request[posternv1.WhoAmIRequest]) (*connect.Response[posternv1.WhoAmIResponse], error) {
	return call(ctx, a, func(c Caller) (*posternv1.WhoAmIResponse, error) {
		who := &posternv1.WhoAmIResponse{
			Organization: c.OrganizationName, TokenId: c.TokenId, TokenName: c.TokenName, Role: c.Role, ServerVersion: proto.Software(),
		}
		if !c.Expires.IsZero() {
			who.Expires = timestamppb.New(c.Expires)
		}
		return who, nil
	})
}

// CreateToken implements TokenService.
func (a *API) CreateToken(ctx context.Context, req *connect.Request[posternv1.CreateTokenRequest]) (*connect.Response[posternv1.CreateTokenResponse], error) {
	return call(ctx, a, func(c Caller) (*posternv1.CreateTokenResponse, error) {
		ttl := defaultTokenTTL
		if req.Msg.Ttl != nil {
			ttl = req.Msg.Ttl.AsDuration()
		}
		switch {
		case !slices.Contains(roles, req.Msg.Role):
			return nil, proto.Errorf(proto.CodeInvalid, "role %q is none of %v", req.Msg.Role, roles)
		case ttl < time.Minute || ttl > maxTokenTTL:
			return nil, proto.Errorf(proto.CodeInvalid, "a token's life must be between 1m and %s, not %s", maxTokenTTL, ttl)
		}
		token, secret, err := a.cfg.Tokens.Create(ctx, c.Organization, req.Msg.Name, req.Msg.Role, ttl)
		if err != nil {
			return nil, err
		}
		err = a.audit(ctx, c, auditchain.Entry{Action: "token.create", Target: token.Id + " " + token.Name + " " + token.Role})
		if err != nil {
			return nil, err
		}
		return &posternv1.CreateTokenResponse{Token: token, Secret: secret}, nil
	})
}

// ListTokens implements TokenService.
func (a *API) ListTokens(ctx context.Context, _ *connect.Request[posternv1.ListTokensRequest]) (*connect.Response[posternv1.ListTokensResponse], error) {
	return call(ctx, a, func(c Caller) (*posternv1.ListTokensResponse, error) {
		tokens, err := a.cfg.Store.ListTokens(ctx, c.Organization)
		return &posternv1.ListTokensResponse{Tokens: tokens}, err
	})
}

// RevokeToken implements TokenService.
func (a *API) RevokeToken(ctx context.Context, req *connect.Request[posternv1.RevokeTokenRequest]) (*connect.Response[posternv1.RevokeTokenResponse], error) {
	return call(ctx, a, func(c Caller) (*posternv1.RevokeTokenResponse, error) {
		if req.Msg.Token == c.TokenId || req.Msg.Token == c.TokenName {
			return nil, proto.Errorf(proto.CodeInvalid, "a token cannot revoke itself: use another admin token")
		}
		token, err := a.cfg.Tokens.Revoke(ctx, c.Organization, req.Msg.Token)
		if err != nil {
			return nil, err
		}
		if err := a.audit(ctx, c, auditchain.Entry{Action: "token.revoke", Target: token.Id + " " + token.Name}); err != nil {
			return nil, err
		}
		return &posternv1.RevokeTokenResponse{Token: token}, nil
	})
}

// defaultOverlap is how long a rotated token's old secret is good.
const defaultOverlap = time.Hour

// RotateToken implements TokenService.
func (a *API) RotateToken(ctx context.Context, req *connect.Request[posternv1.RotateTokenRequest]) (*connect.Response[posternv1.RotateTokenResponse], error) {
	return call(ctx, a, func(c Caller) (*posternv1.RotateTokenResponse, error) {
		overlap, ttl := defaultOverlap, time.Duration(0)
		if req.Msg.Overlap != nil {
			overlap = req.Msg.Overlap.AsDuration()
		}
		if req.Msg.Ttl != nil {
			if ttl = req.Msg.Ttl.AsDuration(); ttl < time.Minute || ttl > maxTokenTTL {
				return nil, proto.Errorf(proto.CodeInvalid, "a token's life must be between 1m and %s, not %s", maxTokenTTL, ttl)
			}
		}
		token, secret, until, err := a.cfg.Tokens.Rotate(ctx, c.Organization, req.Msg.Token, overlap, ttl)
		if err != nil {
			return nil, err
		}
		if err := a.audit(ctx, c, auditchain.Entry{Action: "token.rotate", Target: token.Id + " " + token.Name}); err != nil {
			return nil, err
		}
		return &posternv1.RotateTokenResponse{Token: token, Secret: secret, FormerUntil: timestamppb.New(until)}, nil
	})
}
