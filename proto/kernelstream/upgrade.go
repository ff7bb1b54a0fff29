package kernelstream

import (
	"context"
	"io"
	"net"
	"net/http"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/upgrade"
)

const (
	// Path is where the host takes streams.
	Path = "/postern/v1/kernel-channels"
	// Protocol is the word of the HTTP upgrade.
	Protocol = "postern-kernel/1"
	// MaxRequest bounds an encoded KernelChannelsRequest in bytes.
	MaxRequest = 64 << 10
)

var kind = upgrade.Kind{Path: Path, Protocol: Protocol, MaxRequest: MaxRequest}

// Doer sends requests to one agent: the control plane's way into a tunnel.
type Doer = upgrade.Doer

// Dial asks the host for a kernel's channels. ctx bounds the opening alone: the
// stream lives until it is closed. A refusal is a *proto.Error.
func Dial(ctx context.Context, agent Doer, request *posternv1.KernelChannelsRequest) (io.ReadWriteCloser, error) {
	return kind.Dial(ctx, agent, request)
}

// ReadRequest reads and checks the form of a request on the host, before anything
// is answered. Its error is a *proto.Error for the caller.
func ReadRequest(w http.ResponseWriter, r *http.Request) (*posternv1.KernelChannelsRequest, error) {
	request := &posternv1.KernelChannelsRequest{}
	if err := kind.ReadRequest(w, r, request); err != nil {
		return nil, err
	}
	return request, nil
}

// Accept answers 101 and takes the connection over: the rest of it is frames. The
// caller closes it. Nothing may have been answered before.
func Accept(w http.ResponseWriter) (net.Conn, error) { return kind.Accept(w) }
