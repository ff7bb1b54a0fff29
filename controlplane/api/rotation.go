package api

import (
	"context"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Rotation rotates the certificate authority.
type Rotation interface {
	Status(ctx context.Context) (*posternv1.CAStatus, error)
	// Rotate begins a rotation, or goes on with one; force drops the old authority at once, and
	// is INVALID if there is none.
	Rotate(ctx context.Context, force bool) (*posternv1.CAStatus, error)
}

// RotateCA implements CAService.
func (a *API) RotateCA(ctx context.Context, req *connect.Request[posternv1.RotateCARequest]) (*connect.Response[posternv1.CAStatus], error) {
	return call(ctx, a, func(c Caller) (*posternv1.CAStatus, error) {
		if err := ruler(c); err != nil {
			return nil, err
		}
		action := "ca.rotate"
		if req.Msg.Force {
			action = "ca.rotate --force"
		}
		// Before it is done: what cannot be recorded must not be.
		if err := a.audit(ctx, c, auditchain.Entry{Action: action, Target: "certificate authority"}); err != nil {
			return nil, err
		}
		return a.cfg.Rotation.Rotate(ctx, req.Msg.Force)
	})
}

// GetCAStatus implements CAService.
func (a *API) GetCAStatus(ctx context.Context, _ *connect.Request[posternv1.GetCAStatusRequest]) (*connect.Response[posternv1.CAStatus], error) {
	return call(ctx, a, func(c Caller) (*posternv1.CAStatus, error) {
		if err := ruler(c); err != nil {
			return nil, err
		}
		return a.cfg.Rotation.Status(ctx)
	})
}
