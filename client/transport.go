package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

// newTransport speaks HTTP/1.1 alone: one result has a connection of its own, and
// HTTP/2's frames and windows only slow it down.
func newTransport(caFile string) (*http.Transport, error) {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	t := &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 15 * time.Second, KeepAlive: 15 * time.Second}).DialContext,
		TLSHandshakeTimeout:   15 * time.Second,
		ResponseHeaderTimeout: 0, // a statement may take its time before the first row
		MaxIdleConnsPerHost:   8,
		IdleConnTimeout:       60 * time.Second,
		DisableCompression:    true, // results say themselves how they are packed
		ReadBufferSize:        64 << 10,
		Protocols:             protocols,
	}
	if caFile == "" {
		return t, nil
	}
	pem, err := os.ReadFile(caFile)
	if err != nil {
		return nil, fmt.Errorf("read the CA file: %w", err)
	}
	roots, err := x509.SystemCertPool()
	if err != nil {
		roots = x509.NewCertPool()
	}
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("read the CA file: %s holds no certificate in PEM form", caFile)
	}
	t.TLSClientConfig = &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
	return t, nil
}

// readOnly are the calls that may be sent again when a kept connection turns out
// dead before the answer began.
var readOnly = []string{
	posternv1connect.IdentityServiceWhoAmIProcedure,
	posternv1connect.TokenServiceListTokensProcedure,
	posternv1connect.KeyServiceListKeysProcedure,
	posternv1connect.AgentServiceListAgentsProcedure,
	posternv1connect.AgentServiceGetAgentProcedure,
	posternv1connect.SourceServiceListSourcesProcedure,
	posternv1connect.QueryServiceListQueriesProcedure,
	posternv1connect.QueryServiceGetQueryProcedure,
	posternv1connect.KernelServiceListKernelSpecsProcedure,
	posternv1connect.KernelServiceListKernelsProcedure,
	posternv1connect.KernelServiceGetKernelProcedure,
	posternv1connect.KernelCheckpointServiceCheckKernelProcedure,
	posternv1connect.KernelCheckpointServiceListCheckpointsProcedure,
	posternv1connect.SecretServiceListSecretsProcedure,
	posternv1connect.FileServiceListWorkspacesProcedure,
	posternv1connect.FileServiceGetWorkspaceProcedure,
	posternv1connect.FileServiceGetFileProcedure,
	posternv1connect.FileServiceListFilesProcedure,
	posternv1connect.FileServiceMissingFileChunksProcedure,
	posternv1connect.FileServiceListFileVersionsProcedure,
	posternv1connect.FileServiceListTrashProcedure,
	posternv1connect.FileServiceListConflictsProcedure,
	posternv1connect.FileServiceListSnapshotsProcedure,
	posternv1connect.FileServiceGetFileStatusProcedure,
	posternv1connect.AuditServiceListAuditProcedure,
	posternv1connect.AuditServiceVerifyAuditProcedure,
	posternv1connect.OrganizationServiceListOrganizationsProcedure,
	posternv1connect.CAServiceShowCAProcedure,
	posternv1connect.MasterKeyServiceGetMasterKeyStatusProcedure,
	posternv1connect.FileKeyServiceGetFileKeyStatusProcedure,
}

// roundTripper adds the token and makes a *proto.Error of what goes wrong on the
// way to the server.
type roundTripper struct {
	inner     http.RoundTripper
	base      *url.URL
	token     func(context.Context) (Secret, error)
	userAgent string
}

// RoundTrip implements http.RoundTripper.
func (t *roundTripper) RoundTrip(req *http.Request) (*http.Response, error) {
	out := req.Clone(req.Context())
	out.Header.Set("User-Agent", t.userAgent)
	if t.token != nil && out.URL.Host == t.base.Host && out.URL.Scheme == t.base.Scheme {
		secret, err := t.token(req.Context())
		if err != nil {
			return nil, err
		}
		if !secret.IsZero() {
			out.Header.Set("Authorization", "Bearer "+secret.Reveal())
		}
	}
	procedure := strings.TrimPrefix(req.URL.Path, t.base.Path)
	if slices.Contains(readOnly, procedure) {
		// net/http sends such a request again by itself; without a value the
		// header stays here (http.Transport's documentation).
		out.Header["X-Idempotency-Key"] = nil
	}
	resp, err := t.inner.RoundTrip(out)
	if err != nil {
		return nil, t.unreachable(req.Context(), err)
	}
	if strings.HasPrefix(procedure, "/postern.v1.") {
		media, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
		if !strings.HasPrefix(media, "application/") && resp.StatusCode/100 != 3 {
			defer resp.Body.Close() //nolint:errcheck // nothing was written to it
			return nil, proto.ReadHTTPError(resp)
		}
	}
	return resp, nil
}

// CloseIdleConnections lets http.Client.CloseIdleConnections through.
func (t *roundTripper) CloseIdleConnections() {
	if c, ok := t.inner.(interface{ CloseIdleConnections() }); ok {
		c.CloseIdleConnections()
	}
}

// unreachable says what failed, where, and what to do.
func (t *roundTripper) unreachable(ctx context.Context, err error) error {
	if cause := ctx.Err(); cause != nil {
		return cause
	}
	advice := "check the URL, and that the control plane runs"
	var (
		unknown  x509.UnknownAuthorityError
		hostname x509.HostnameError
		dns      *net.DNSError
		record   tls.RecordHeaderError
	)
	switch {
	case errors.As(err, &unknown):
		advice = "name its CA's certificate with --ca-file if you trust it"
	case errors.As(err, &hostname):
		advice = "use a name that its certificate carries"
	case errors.As(err, &record):
		advice = "it does not speak TLS there: use http:// or another port"
	case errors.As(err, &dns):
		advice = "check the host's name"
	}
	var op *net.OpError
	cause := err
	switch {
	case errors.As(err, &op) && op.Op == "dial":
		cause = op.Err
	case errors.Is(err, io.EOF):
		// Not wrapped: package connect would make another error of it.
		cause, err = errors.New("it closed the connection"), nil
	}
	return &proto.Error{
		Code:    proto.CodeUnavailable,
		Message: strings.ReplaceAll(fmt.Sprintf("reach the control plane at %s: %v: %s", t.base, cause, advice), "\n", " "),
		Err:     err,
	}
}
