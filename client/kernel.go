package client

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/coder/websocket"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/jupyter"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// maxUnanswered bounds the requests that are kept to be sent again.
	maxUnanswered = 256
	// maxSeen bounds the messages that are known to have come.
	maxSeen = 8192
	// reconnectFirst and reconnectMost are how long is waited between two attempts.
	reconnectFirst, reconnectMost = 100 * time.Millisecond, 2 * time.Second
	// reconnectTime is how long the control plane may be away before Receive gives up.
	reconnectTime = 5 * time.Minute
	// closeTime bounds the farewell.
	closeTime = 2 * time.Second
)

// KernelChannels are a kernel's channels. They outlive the connection: when it is
// lost, Receive opens another one, what was not answered is sent again (the host drops what
// it has), and what comes twice is left out. Receive belongs to one goroutine;
// Send may be called from others.
type KernelChannels struct {
	client  *Client
	address string
	session string

	mu         sync.Mutex
	ws         *websocket.Conn // nil: lost
	unanswered []*posternv1.KernelMessage
	ids        []string // of unanswered

	// Receive's own.
	seen  map[string]struct{}
	order []string
}

// KernelChannels opens a kernel's channels. ctx bounds the opening alone. session names the
// client, at most 120 bytes; two with one name are one, of which the newer counts.
func (c *Client) KernelChannels(ctx context.Context, agent, kernel, session string) (*KernelChannels, error) {
	k := &KernelChannels{
		client: c, session: session, seen: map[string]struct{}{},
		address: c.base.String() + "/jupyter/" + url.PathEscape(agent) + "/api/kernels/" + url.PathEscape(kernel) + "/channels?session_id=" + url.QueryEscape(session),
	}
	var err error
	k.ws, err = k.dial(ctx)
	return k, err
}

// Session is the client's name.
func (k *KernelChannels) Session() string { return k.session }

func (k *KernelChannels) dial(ctx context.Context) (*websocket.Conn, error) {
	ws, resp, err := websocket.Dial(ctx, k.address, &websocket.DialOptions{HTTPClient: k.client.http, Subprotocols: []string{jupyter.SubprotocolV1}})
	if err != nil {
		var public *proto.Error
		switch {
		case errors.As(err, &public):
			return nil, public
		case resp != nil:
			return nil, jupyterError(resp)
		}
		return nil, err
	}
	if ws.Subprotocol() != jupyter.SubprotocolV1 {
		ws.CloseNow() //nolint:errcheck // it is of no use
		return nil, proto.Errorf(proto.CodeVersionMismatch, "the control plane does not speak %s: upgrade it", jupyter.SubprotocolV1)
	}
	ws.SetReadLimit(jupyter.MaxMessage + 1<<20)
	return ws, nil
}

// jupyterError is what a status of the Jupyter API means.
func jupyterError(resp *http.Response) error {
	switch resp.StatusCode {
	case http.StatusNotFound:
		return proto.Errorf(proto.CodeNotFound, "the kernel is gone")
	case http.StatusForbidden, http.StatusUnauthorized:
		return proto.Errorf(proto.CodeRoleDenied, "the kernel's channels are refused: only the token that started it may use it")
	case http.StatusServiceUnavailable, http.StatusBadGateway, http.StatusGatewayTimeout:
		return proto.Errorf(proto.CodeAgentOffline, "the kernel's agent is offline, or the control plane is stopping: try again")
	}
	return proto.Errorf(proto.CodeInternal, "the control plane answered %s to a WebSocket: is there a proxy that does not pass WebSockets on?", resp.Status)
}

// Send sends a message to the kernel. While the connection is lost it is kept, and
// sent when there is another.
func (k *KernelChannels) Send(ctx context.Context, m *posternv1.KernelMessage) error {
	h, err := jupyter.Check(m)
	if err != nil {
		return &proto.Error{Code: proto.CodeInvalid, Message: err.Error()}
	}
	data, err := jupyter.EncodeV1(m)
	if err != nil {
		return &proto.Error{Code: proto.CodeInvalid, Message: err.Error()}
	}
	k.mu.Lock()
	if len(k.unanswered) >= maxUnanswered {
		k.unanswered, k.ids = k.unanswered[1:], k.ids[1:]
	}
	k.unanswered, k.ids = append(k.unanswered, m), append(k.ids, h.ID)
	ws := k.ws
	k.mu.Unlock()
	if ws == nil {
		return nil // it goes with the next connection
	}
	if err := ws.Write(ctx, websocket.MessageBinary, data); err != nil && ctx.Err() != nil {
		return ctx.Err()
	}
	return nil // Receive finds out that the connection is lost
}

// Receive returns the kernel's next message. io.EOF means that the kernel is gone.
func (k *KernelChannels) Receive(ctx context.Context) (*posternv1.KernelMessage, error) {
	for {
		k.mu.Lock()
		ws := k.ws
		k.mu.Unlock()
		_, data, err := ws.Read(ctx)
		if err != nil {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			if err := k.again(ctx, err); err != nil {
				return nil, err
			}
			continue
		}
		m, err := jupyter.DecodeV1(data)
		if err != nil {
			return nil, &proto.Error{Code: proto.CodeInternal, Message: "a message of the kernel is not understood", Err: err}
		}
		if k.fresh(m) {
			return m, nil
		}
	}
}

// fresh notes a message, and that its request has arrived; false if it came before.
func (k *KernelChannels) fresh(m *posternv1.KernelMessage) bool {
	h, err := jupyter.ParseHeader(m.Header)
	if err != nil || h.ID == "" {
		return true
	}
	parent, err := jupyter.ParseHeader(m.ParentHeader)
	// The id alone is not enough: a kernel that was taken back to a checkpoint counts its
	// messages from there, and so gives the same ids again.
	key := h.ID + "\x00" + h.Date + "\x00" + parent.ID
	if _, known := k.seen[key]; known {
		return false
	}
	k.seen[key] = struct{}{}
	k.order = append(k.order, key)
	if len(k.order) > maxSeen {
		delete(k.seen, k.order[0])
		k.order = k.order[1:]
	}
	if err == nil && parent.ID != "" {
		k.mu.Lock()
		if i := slices.Index(k.ids, parent.ID); i >= 0 {
			// Messages arrive in order: those before it are there, too, but for
			// another channel's.
			k.unanswered, k.ids = slices.Delete(k.unanswered, i, i+1), slices.Delete(k.ids, i, i+1)
		}
		k.mu.Unlock()
	}
	return true
}

// again opens another connection after one was lost.
func (k *KernelChannels) again(ctx context.Context, lost error) error {
	switch status := websocket.CloseStatus(lost); status {
	case websocket.StatusPolicyViolation, websocket.StatusInvalidFramePayloadData, websocket.StatusMessageTooBig, websocket.StatusNormalClosure:
		var closed websocket.CloseError
		errors.As(lost, &closed)
		code := proto.CodeInvalid
		switch status {
		case websocket.StatusPolicyViolation:
			code = proto.CodeRoleDenied
		case websocket.StatusNormalClosure:
			code = proto.CodeNotFound // the kernel is gone, or a newer client is there
		}
		return proto.Errorf(code, "the kernel's connection ended: %s", closed.Reason)
	}
	k.mu.Lock()
	k.ws.CloseNow() //nolint:errcheck // it is lost
	k.ws = nil
	k.mu.Unlock()
	deadline := time.Now().Add(reconnectTime)
	for wait := reconnectFirst; ; wait = min(2*wait, reconnectMost) {
		ws, err := k.dial(ctx)
		if err == nil {
			if err = k.resend(ctx, ws); err == nil {
				return nil
			}
			ws.CloseNow() //nolint:errcheck // it is lost already
		}
		switch code := proto.CodeOf(err); {
		case ctx.Err() != nil:
			return ctx.Err()
		case code == proto.CodeNotFound || code == proto.CodeRoleDenied || code == proto.CodeVersionMismatch:
			return err
		case time.Now().After(deadline):
			return fmt.Errorf("no connection to the kernel for %s: %w", reconnectTime, err)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// resend makes a connection the present one and sends what was not answered.
func (k *KernelChannels) resend(ctx context.Context, ws *websocket.Conn) error {
	k.mu.Lock()
	k.ws = ws
	again := slices.Clone(k.unanswered)
	k.mu.Unlock()
	for _, m := range again {
		data, err := jupyter.EncodeV1(m)
		if err != nil {
			return err
		}
		if err := ws.Write(ctx, websocket.MessageBinary, data); err != nil {
			return err
		}
	}
	return nil
}

// Close ends the connection; the kernel goes on.
func (k *KernelChannels) Close() {
	k.mu.Lock()
	ws := k.ws
	k.mu.Unlock()
	if ws == nil {
		return
	}
	timer := time.AfterFunc(closeTime, func() { ws.CloseNow() }) //nolint:errcheck // it is over
	defer timer.Stop()
	ws.Close(websocket.StatusNormalClosure, "") //nolint:errcheck // likewise
}
