package api

import (
	"context"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// ruler fails unless the caller runs the installation.
func ruler(c Caller) error {
	if c.OrganizationName != defaultOrganization {
		return errNotHere
	}
	return nil
}

// CreateOrganization implements OrganizationService.
func (a *API) CreateOrganization(ctx context.Context, req *connect.Request[posternv1.CreateOrganizationRequest]) (*connect.Response[posternv1.CreateOrganizationResponse], error) {
	return call(ctx, a, func(c Caller) (*posternv1.CreateOrganizationResponse, error) {
		if err := ruler(c); err != nil {
			return nil, err
		}
		org, err := a.cfg.Store.CreateOrganization(ctx, req.Msg.Name, time.Now())
		if err != nil {
			return nil, err
		}
		_, secret, err := a.cfg.Tokens.Create(ctx, org.Id, "admin", "admin", defaultTokenTTL)
		if err != nil {
			return nil, err
		}
		if err := a.audit(ctx, c, auditchain.Entry{Action: "organization.create", Target: org.Id + " " + org.Name}); err != nil {
			return nil, err
		}
		return &posternv1.CreateOrganizationResponse{Organization: org, AdminToken: secret}, nil
	})
}

// ListOrganizations implements OrganizationService.
func (a *API) ListOrganizations(ctx context.Context, _ *connect.Request[posternv1.ListOrganizationsRequest]) (*connect.Response[posternv1.ListOrganizationsResponse], error) {
	return call(ctx, a, func(c Caller) (*posternv1.ListOrganizationsResponse, error) {
		if err := ruler(c); err != nil {
			return nil, err
		}
		all, err := a.cfg.Store.ListOrganizations(ctx)
		return &posternv1.ListOrganizationsResponse{Organizations: all}, err
	})
}

// SetOrganizationDisabled implements OrganizationService. Its agents' tunnels end
// at once and its tokens stop working.
func (a *API) SetOrganizationDisabled(ctx context.Context, req *connect.Request[posternv1.SetOrganizationDisabledRequest]) (*connect.Response[posternv1.SetOrganizationDisabledResponse], error) {
	return call(ctx, a, func(c Caller) (*posternv1.SetOrganizationDisabledResponse, error) {
		if err := ruler(c); err != nil {
			return nil, err
		}
		if req.Msg.Organization == c.Organization || req.Msg.Organization == defaultOrganization {
			return nil, proto.Errorf(proto.CodeInvalid, "the organization default runs the installation and cannot be disabled")
		}
		org, err := a.cfg.Store.SetOrganizationDisabled(ctx, req.Msg.Organization, req.Msg.Disabled, time.Now())
		if err != nil {
			return nil, err
		}
		action := "organization.enable"
		if req.Msg.Disabled {
			action = "organization.disable"
			a.cfg.Agents.DisconnectOrganization(org.Id)
		}
		if err := a.audit(ctx, c, auditchain.Entry{Action: action, Target: org.Id + " " + org.Name}); err != nil {
			return nil, err
		}
		return &posternv1.SetOrganizationDisabledResponse{Organization: org}, nil
	})
}

// ShowCA implements CAService.
func (a *API) ShowCA(ctx context.Context, _ *connect.Request[posternv1.ShowCARequest]) (*connect.Response[posternv1.ShowCAResponse], error) {
	return call(ctx, a, func(Caller) (*posternv1.ShowCAResponse, error) {
		all, err := a.cfg.CA.Authorities(ctx)
		return &posternv1.ShowCAResponse{Authorities: all}, err
	})
}
