package kernelstream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"

	gproto "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// Path is where the host takes streams.
	Path = "/postern/v1/kernel-channels"
	// Protocol is the word of the HTTP upgrade.
	Protocol = "postern-kernel/1"
	// MaxRequest bounds an encoded KernelChannelsRequest in bytes.
	MaxRequest = 64 << 10
)

// Doer sends requests to one agent: the control plane's way into a tunnel.
type Doer interface {
	Do(*http.Request) (*http.Response, error)
}

// Dial asks the host for a kernel's channels. ctx bounds the opening alone: the
// stream lives until it is closed. A refusal is a *proto.Error.
func Dial(ctx context.Context, agent Doer, request *posternv1.KernelChannelsRequest) (io.ReadWriteCloser, error) {
	body, err := gproto.Marshal(request)
	if err != nil {
		return nil, err
	}
	if len(body) > MaxRequest {
		return nil, proto.Errorf(proto.CodeBodyTooLarge, "the request takes %d bytes, more than %d", len(body), MaxRequest)
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://agent"+Path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	r.Header.Set("Content-Type", "application/protobuf")
	r.Header.Set("Connection", "Upgrade")
	r.Header.Set("Upgrade", Protocol)
	response, err := agent.Do(r)
	if err != nil {
		return nil, err
	}
	if response.StatusCode != http.StatusSwitchingProtocols {
		defer func() { _ = response.Body.Close() }()
		return nil, proto.ReadHTTPError(response)
	}
	stream, ok := response.Body.(io.ReadWriteCloser)
	if !ok {
		_ = response.Body.Close()
		return nil, errors.New("the upgraded connection cannot be written to")
	}
	return stream, nil
}

// ReadRequest reads and checks the form of a request on the host, before anything
// is answered. Its error is a *proto.Error for the caller.
func ReadRequest(w http.ResponseWriter, r *http.Request) (*posternv1.KernelChannelsRequest, error) {
	if !strings.EqualFold(r.Header.Get("Upgrade"), Protocol) {
		return nil, proto.Errorf(proto.CodeInvalid, "the request does not ask for an upgrade to %s", Protocol)
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, MaxRequest))
	var large *http.MaxBytesError
	if errors.As(err, &large) {
		return nil, proto.Errorf(proto.CodeBodyTooLarge, "the request takes more than %d bytes", MaxRequest)
	} else if err != nil {
		return nil, proto.Errorf(proto.CodeInvalid, "the request ended early")
	}
	request := &posternv1.KernelChannelsRequest{}
	if gproto.Unmarshal(body, request) != nil {
		return nil, proto.Errorf(proto.CodeInvalid, "the request is not a KernelChannelsRequest")
	}
	return request, nil
}

// Accept answers 101 and takes the connection over: the rest of it is frames. The
// caller closes it. Nothing may have been answered before.
func Accept(w http.ResponseWriter) (net.Conn, error) {
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, fmt.Errorf("take over the stream: %w", err)
	}
	_, err = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+Protocol+"\r\n\r\n")
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	if n := buffered.Reader.Buffered(); n > 0 {
		early, _ := buffered.Reader.Peek(n)
		return &prefixed{Conn: conn, early: bytes.Clone(early)}, nil
	}
	return conn, nil
}

// prefixed is a connection of which some bytes were read too early.
type prefixed struct {
	net.Conn
	early []byte
}

func (c *prefixed) Read(p []byte) (int, error) {
	if len(c.early) > 0 {
		n := copy(p, c.early)
		c.early = c.early[n:]
		return n, nil
	}
	return c.Conn.Read(p)
}
