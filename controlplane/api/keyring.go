package api

import (
	"context"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// MasterKeys rotates the master key.
type MasterKeys interface {
	Status(ctx context.Context) (*posternv1.MasterKeyStatus, error)
	// Rotate begins a rotation, or changes nothing while one is under way.
	Rotate(ctx context.Context) (*posternv1.MasterKeyStatus, error)
	// Cancel calls a rotation off whose new key seals nothing yet; INVALID if there is none.
	Cancel(ctx context.Context) (*posternv1.MasterKeyStatus, error)
}

// FileKeys rotates the key of an organization's files.
type FileKeys interface {
	Status(ctx context.Context, organization string) (*posternv1.FileKeyStatus, error)
	// Rotate begins a rotation, or changes nothing while one is under way; force drops the old key over damaged objects, and
	// is INVALID if there is none.
	Rotate(ctx context.Context, organization string, force bool) (*posternv1.FileKeyStatus, error)
}

// RotateMasterKey implements MasterKeyService.
func (a *API) RotateMasterKey(ctx context.Context, _ *connect.Request[posternv1.RotateMasterKeyRequest]) (*connect.Response[posternv1.MasterKeyStatus], error) {
	return call(ctx, a, func(c Caller) (*posternv1.MasterKeyStatus, error) {
		if err := ruler(c); err != nil {
			return nil, err
		}
		// Before it is done: what cannot be recorded must not be.
		if err := a.audit(ctx, c, auditchain.Entry{Action: "masterkey.rotate", Target: "master key"}); err != nil {
			return nil, err
		}
		return a.cfg.MasterKeys.Rotate(ctx)
	})
}

// CancelMasterKeyRotation implements MasterKeyService.
func (a *API) CancelMasterKeyRotation(ctx context.Context, _ *connect.Request[posternv1.CancelMasterKeyRotationRequest]) (*connect.Response[posternv1.MasterKeyStatus], error) {
	return call(ctx, a, func(c Caller) (*posternv1.MasterKeyStatus, error) {
		if err := ruler(c); err != nil {
			return nil, err
		}
		if err := a.audit(ctx, c, auditchain.Entry{Action: "masterkey.cancel", Target: "master key"}); err != nil {
			return nil, err
		}
		return a.cfg.MasterKeys.Cancel(ctx)
	})
}

// GetMasterKeyStatus implements MasterKeyService.
func (a *API) GetMasterKeyStatus(ctx context.Context, _ *connect.Request[posternv1.GetMasterKeyStatusRequest]) (*connect.Response[posternv1.MasterKeyStatus], error) {
	return call(ctx, a, func(c Caller) (*posternv1.MasterKeyStatus, error) {
		if err := ruler(c); err != nil {
			return nil, err
		}
		return a.cfg.MasterKeys.Status(ctx)
	})
}

// RotateFileKey implements FileKeyService.
func (a *API) RotateFileKey(ctx context.Context, req *connect.Request[posternv1.RotateFileKeyRequest]) (*connect.Response[posternv1.FileKeyStatus], error) {
	return call(ctx, a, func(c Caller) (*posternv1.FileKeyStatus, error) {
		action := "filekey.rotate"
		if req.Msg.Force {
			action = "filekey.rotate --force"
		}
		if err := a.audit(ctx, c, auditchain.Entry{Action: action, Target: "key of files"}); err != nil {
			return nil, err
		}
		return a.cfg.FileKeys.Rotate(ctx, c.Organization, req.Msg.Force)
	})
}

// GetFileKeyStatus implements FileKeyService.
func (a *API) GetFileKeyStatus(ctx context.Context, _ *connect.Request[posternv1.GetFileKeyStatusRequest]) (*connect.Response[posternv1.FileKeyStatus], error) {
	return call(ctx, a, func(c Caller) (*posternv1.FileKeyStatus, error) {
		return a.cfg.FileKeys.Status(ctx, c.Organization)
	})
}
