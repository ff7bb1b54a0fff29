package client

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

// maxReply bounds one reply of a Connect call, in bytes; 1,000 audit entries fit.
const maxReply = 128 << 20

// Config says where the control plane is and who asks.
type Config struct {
	// URL is https://HOST[:PORT][/PREFIX], or http:// in a lab.
	URL string
	// Token is asked before each request; nil sends none.
	Token func(context.Context) (Secret, error)
	// CAFile names a PEM file of certificates trusted besides the system's; empty
	// means none. Not looked at if HTTPClient is set.
	CAFile string
	// HTTPClient carries the requests; nil means one of the client's own. Its
	// redirect policy and the token's rules are added to it.
	HTTPClient *http.Client
	// UserAgent is sent with each request; empty means "postern-client/VERSION".
	UserAgent string
}

// Client calls the API.
type Client struct {
	Identity      posternv1connect.IdentityServiceClient
	Tokens        posternv1connect.TokenServiceClient
	Keys          posternv1connect.KeyServiceClient
	Agents        posternv1connect.AgentServiceClient
	Sources       posternv1connect.SourceServiceClient
	Queries       posternv1connect.QueryServiceClient
	Sessions      posternv1connect.SessionServiceClient
	Kernels       posternv1connect.KernelServiceClient
	Checkpoints   posternv1connect.KernelCheckpointServiceClient
	Notebooks     posternv1connect.NotebookServiceClient
	Secrets       posternv1connect.SecretServiceClient
	Moves         posternv1connect.KernelMoveServiceClient
	Files         posternv1connect.FileServiceClient
	Audit         posternv1connect.AuditServiceClient
	Organizations posternv1connect.OrganizationServiceClient
	CA            posternv1connect.CAServiceClient
	MasterKeys    posternv1connect.MasterKeyServiceClient
	FileKeys      posternv1connect.FileKeyServiceClient

	base *url.URL
	http *http.Client
}

// New returns a client. It makes no connection yet. It fails on a URL or CA file
// that cannot be used.
func New(cfg Config) (*Client, error) {
	base, err := ParseURL(cfg.URL)
	if err != nil {
		return nil, err
	}
	var inner http.RoundTripper
	hc := &http.Client{}
	if cfg.HTTPClient != nil {
		*hc = *cfg.HTTPClient
		inner = hc.Transport
		if inner == nil {
			inner = http.DefaultTransport
		}
	} else if inner, err = newTransport(cfg.CAFile); err != nil {
		return nil, err
	}
	agent := cfg.UserAgent
	if agent == "" {
		agent = "postern-client/" + proto.Software()
	}
	hc.Transport = &roundTripper{inner: inner, base: base, token: cfg.Token, userAgent: agent}
	hc.CheckRedirect = func(req *http.Request, _ []*http.Request) error {
		target := *req.URL
		target.Path, target.RawQuery = "", ""
		return proto.Errorf(proto.CodeUnavailable, "%s sends us to %s: use that URL if it is yours", base, target.String())
	}
	address := strings.TrimSuffix(base.String(), "/")
	option := connect.WithReadMaxBytes(maxReply)
	return &Client{
		Identity:      posternv1connect.NewIdentityServiceClient(hc, address, option),
		Tokens:        posternv1connect.NewTokenServiceClient(hc, address, option),
		Keys:          posternv1connect.NewKeyServiceClient(hc, address, option),
		Agents:        posternv1connect.NewAgentServiceClient(hc, address, option),
		Sources:       posternv1connect.NewSourceServiceClient(hc, address, option),
		Queries:       posternv1connect.NewQueryServiceClient(hc, address, option),
		Sessions:      posternv1connect.NewSessionServiceClient(hc, address, option),
		Kernels:       posternv1connect.NewKernelServiceClient(hc, address, option),
		Checkpoints:   posternv1connect.NewKernelCheckpointServiceClient(hc, address, option),
		Notebooks:     posternv1connect.NewNotebookServiceClient(hc, address, option),
		Secrets:       posternv1connect.NewSecretServiceClient(hc, address, option),
		Moves:         posternv1connect.NewKernelMoveServiceClient(hc, address, option),
		Files:         posternv1connect.NewFileServiceClient(hc, address, option),
		Audit:         posternv1connect.NewAuditServiceClient(hc, address, option),
		Organizations: posternv1connect.NewOrganizationServiceClient(hc, address, option),
		CA:            posternv1connect.NewCAServiceClient(hc, address, option),
		MasterKeys:    posternv1connect.NewMasterKeyServiceClient(hc, address, option),
		FileKeys:      posternv1connect.NewFileKeyServiceClient(hc, address, option),
		base:          base,
		http:          hc,
	}, nil
}

// URL is where the control plane is, in the form that ParseURL gives.
func (c *Client) URL() string { return c.base.String() }

// Close ends idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// ParseURL returns a control plane's URL in one form: scheme and host in lower
// case, no slash at the end.
func ParseURL(text string) (*url.URL, error) {
	u, err := url.Parse(strings.TrimSpace(text))
	switch {
	case text == "":
		return nil, fmt.Errorf("no URL of a control plane: run `postern login`, or set --url or POSTERN_URL")
	case err == nil && u.User != nil:
		return nil, fmt.Errorf("the URL of the control plane must not hold a user or password: use --token-file")
	case err != nil || (u.Scheme != "https" && u.Scheme != "http") || u.Host == "" || u.RawQuery != "" || u.Fragment != "":
		return nil, fmt.Errorf("%q is not the URL of a control plane: write https://HOST or https://HOST:PORT", text)
	}
	u.Host = strings.ToLower(u.Host)
	u.Path = strings.TrimRight(u.Path, "/")
	return u, nil
}
