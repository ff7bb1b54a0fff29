package link

import (
	"context"
	"crypto/tls"
	"net/http"
	"net/url"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
	"github.com/postern-dev/postern/tunnel"
)

// RegisterConfig is what Register needs.
type RegisterConfig struct {
	// URL of the tunnel endpoint.
	URL string
	// TLS checks the control plane's certificate against the registration key;
	// nothing is sent before it did.
	TLS *tls.Config
	// Proxy and Carrier are the tunnel's; may be nil.
	Proxy   func(*url.URL) (*url.URL, error)
	Carrier func(tunnel.CarrierConfig) (tunnel.Carrier, error)
	Request *posternv1.RegisterRequest
}

// Register trades a registration key for an identity, over a tunnel of its own
// that is closed again. ctx bounds all of it.
func Register(ctx context.Context, cfg RegisterConfig) (*posternv1.RegisterResponse, error) {
	t, err := tunnel.Dial(ctx, tunnel.DialConfig{URL: cfg.URL, TLS: cfg.TLS, Carrier: cfg.Carrier, Proxy: cfg.Proxy})
	if err != nil {
		return nil, Classify(err)
	}
	defer t.Close(nil) //nolint:errcheck // it served its turn
	cfg.Request.Version = proto.Version()
	cfg.Request.HostTime = timestamppb.Now()
	c := posternv1connect.NewLinkServiceClient(&http.Client{Transport: t.Transport(tunnel.Control)}, "http://controlplane")
	response, err := c.Register(ctx, connect.NewRequest(cfg.Request))
	if err != nil {
		return nil, callError("register", t, err)
	}
	return response.Msg, nil
}
