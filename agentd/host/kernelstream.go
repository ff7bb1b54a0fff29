package host

import (
	"encoding/binary"
	"errors"
	"io"
	"net/http"
	"sync"
	"time"

	gproto "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/jupyter"
	"github.com/postern-dev/postern/proto/kernelstream"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// maxChannelsClient bounds the name of a client, in bytes.
const maxChannelsClient = 128

// serveChannels carries a client's stream to and from a kernel's shim.
func (h *Host) serveChannels(w http.ResponseWriter, r *http.Request) {
	request, err := kernelstream.ReadRequest(w, r)
	if err != nil {
		proto.WriteHTTPError(w, err)
		return
	}
	began := time.Now()
	entry := kernelEntry(actionKernelAttach, request.KernelId, request.Principal)
	entry.SessionID = clip(request.Client)
	stream, err := h.openChannels(r, request)
	if err == nil {
		entry.DurationMillis = time.Since(began).Milliseconds()
		if err = h.record(entry); err != nil {
			_ = stream.Close()
		}
	} else {
		h.note(entry, began, err)
	}
	if err != nil {
		proto.WriteHTTPError(w, err)
		return
	}
	defer stream.Close() //nolint:errcheck // it is done with
	conn, err := kernelstream.Accept(w)
	if err != nil {
		h.logger.Warn("stream of a kernel not taken over", "kernel", request.KernelId, "err", err)
		return
	}
	defer conn.Close() //nolint:errcheck // it is done with
	if !h.hold(conn) {
		return
	}
	defer h.release(conn)
	var wg sync.WaitGroup
	wg.Go(func() {
		err := h.toKernel(request, conn, stream)
		var told *proto.Error
		if errors.As(err, &told) {
			h.logger.Warn("client of a kernel cut off", "kernel", request.KernelId, "err", err)
		}
		_ = stream.Close()
	})
	_, err = io.CopyBuffer(struct{ io.Writer }{conn}, struct{ io.Reader }{stream}, make([]byte, 64<<10))
	_ = conn.Close()
	_ = stream.Close()
	wg.Wait()
	h.logger.Debug("stream of a kernel ended", "kernel", request.KernelId, "duration_seconds", time.Since(began).Seconds(), "err", err)
}

func (h *Host) openChannels(r *http.Request, request *posternv1.KernelChannelsRequest) (io.ReadWriteCloser, error) {
	switch {
	case len(request.Client) > maxChannelsClient:
		return nil, proto.Errorf(proto.CodeInvalid, "the client's name has more than %d bytes", maxChannelsClient)
	case request.Principal.GetTokenId() == "":
		return nil, proto.Errorf(proto.CodeInvalid, "the request names no principal")
	}
	if _, err := h.kernelFor(r.Context(), request.KernelId, request.Principal, true); err != nil {
		return nil, err
	}
	if err := h.settle(); err != nil {
		return nil, err
	}
	return h.cfg.Kernels.Channels(r.Context(), request)
}

// hold remembers a stream, so that Drain ends it; false: agentd is stopping.
func (h *Host) hold(c io.Closer) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.draining {
		return false
	}
	h.streams[c] = struct{}{}
	return true
}

func (h *Host) release(c io.Closer) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.streams, c)
}

// toKernel passes a client's frames on. What makes the kernel run code is in the log
// before the kernel has it.
func (h *Host) toKernel(request *posternv1.KernelChannelsRequest, from io.Reader, to io.Writer) error {
	in := kernelstream.NewReader(from)
	var frame []byte
	for {
		payload, err := in.Raw()
		if err != nil {
			return err
		}
		f := &posternv1.KernelFrame{}
		if err := gproto.Unmarshal(payload, f); err != nil {
			return proto.Errorf(proto.CodeInvalid, "a frame is no KernelFrame")
		}
		if m := f.GetSend(); m != nil {
			if err := h.recordMessage(request, m); err != nil {
				return err
			}
		}
		frame = append(binary.BigEndian.AppendUint32(frame[:0], uint32(len(payload))), payload...)
		if _, err := to.Write(frame); err != nil {
			return err
		}
		if cap(frame) > 1<<20 {
			frame = nil
		}
	}
}

// recordMessage records a message that makes the kernel run code.
func (h *Host) recordMessage(request *posternv1.KernelChannelsRequest, m *posternv1.KernelMessage) error {
	header, err := jupyter.ParseHeader(m.Header)
	if err != nil {
		return proto.Errorf(proto.CodeInvalid, "%v", err)
	}
	if header.Type != "execute_request" && header.Type != "debug_request" {
		return nil
	}
	entry := kernelEntry(actionKernelExecute, request.KernelId, request.Principal)
	entry.SessionID, entry.QueryID = clip(request.Client), clip(header.ID)
	entry.Statement, entry.Outcome = code(m.Content), "sent"
	return h.recordSoon(entry)
}
