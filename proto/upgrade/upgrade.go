package upgrade

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
)

// Kind is one kind of streams.
type Kind struct {
	// Path is where the host takes them.
	Path string
	// Protocol is the word of the HTTP upgrade.
	Protocol string
	// MaxRequest bounds an encoded request in bytes.
	MaxRequest int
}

// Doer sends requests to one agent: the control plane's way into a tunnel.
type Doer interface {
	Do(*http.Request) (*http.Response, error)
}

// Dial asks the host for a stream. ctx bounds the opening alone: the stream lives
// until it is closed. A refusal is a *proto.Error.
func (k Kind) Dial(ctx context.Context, agent Doer, request gproto.Message) (io.ReadWriteCloser, error) {
	body, err := gproto.Marshal(request)
	if err != nil {
		return nil, err
	}
	if len(body) > k.MaxRequest {
		return nil, proto.Errorf(proto.CodeBodyTooLarge, "the request takes %d bytes, more than %d", len(body), k.MaxRequest)
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://agent"+k.Path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	r.Header.Set("Content-Type", "application/protobuf")
	r.Header.Set("Connection", "Upgrade")
	r.Header.Set("Upgrade", k.Protocol)
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

// ReadRequest reads a request into message on the host and checks its form, before
// anything is answered. Its error is a *proto.Error for the caller.
func (k Kind) ReadRequest(w http.ResponseWriter, r *http.Request, message gproto.Message) error {
	if !strings.EqualFold(r.Header.Get("Upgrade"), k.Protocol) {
		return proto.Errorf(proto.CodeInvalid, "the request does not ask for an upgrade to %s", k.Protocol)
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, int64(k.MaxRequest)))
	var large *http.MaxBytesError
	if errors.As(err, &large) {
		return proto.Errorf(proto.CodeBodyTooLarge, "the request takes more than %d bytes", k.MaxRequest)
	} else if err != nil {
		return proto.Errorf(proto.CodeInvalid, "the request ended early")
	}
	if gproto.Unmarshal(body, message) != nil {
		return proto.Errorf(proto.CodeInvalid, "the request is not a %s", message.ProtoReflect().Descriptor().Name())
	}
	return nil
}

// Accept answers 101 and takes the connection over: the rest of it is frames. The
// caller closes it. Nothing may have been answered before.
func (k Kind) Accept(w http.ResponseWriter) (net.Conn, error) {
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, fmt.Errorf("take over the stream: %w", err)
	}
	_, err = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+k.Protocol+"\r\n\r\n")
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
