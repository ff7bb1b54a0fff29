package kernelmove

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/upgrade"
)

const (
	// IDPrefix begins every move's id.
	IDPrefix = "mov_"
	// MaxResult bounds the result, MaxAnswer an answer, in bytes.
	MaxResult = 64 << 10
	MaxAnswer = 128 << 10
)

// The streams: Export is A's, Import B's. Both take a MoveRequest.
var (
	Export = Stream{upgrade.Kind{Path: "/postern/v1/kernel-export", Protocol: "postern-move/1", MaxRequest: 64 << 10}}
	Import = Stream{upgrade.Kind{Path: "/postern/v1/kernel-import", Protocol: "postern-move/1", MaxRequest: 64 << 10}}
)

// Stream is one of the two streams.
type Stream struct{ kind upgrade.Kind }

// Path is where the host takes it.
func (s Stream) Path() string { return s.kind.Path }

// Dial asks a host for it. ctx bounds the opening alone: the stream lives until it is
// closed. A refusal is a *proto.Error.
func (s Stream) Dial(ctx context.Context, agent upgrade.Doer, r *posternv1.MoveRequest) (io.ReadWriteCloser, error) {
	return s.kind.Dial(ctx, agent, r)
}

// ReadRequest reads and checks the form of a request on the host, before anything is
// answered. Its error is a *proto.Error for the caller.
func (s Stream) ReadRequest(w http.ResponseWriter, r *http.Request) (*posternv1.MoveRequest, error) {
	m := &posternv1.MoveRequest{}
	if err := s.kind.ReadRequest(w, r, m); err != nil {
		return nil, err
	}
	return m, nil
}

// Accept answers 101 and takes the connection over. The caller closes it.
func (s Stream) Accept(w http.ResponseWriter) (net.Conn, error) { return s.kind.Accept(w) }

// WriteResult writes B's answer: nil, or why it does not have the kernel.
func WriteResult(w io.Writer, err error) error {
	text := []byte("{}")
	if err != nil {
		var merr error
		if text, merr = protojson.Marshal(proto.Detail(err)); merr != nil || len(text) > MaxResult {
			text = []byte(`{"code":"INTERNAL","message":"the import failed, and why can't be told"}`)
		}
	}
	_, werr := w.Write(frame('R', text))
	return werr
}

func frame(letter byte, text []byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{letter}, uint32(len(text))), text...)
}

// Answers is what B writes for A. Each Write is one answer.
type Answers struct{ W io.Writer }

// Write implements io.Writer.
func (a Answers) Write(p []byte) (int, error) {
	if len(p) > MaxAnswer {
		return 0, fmt.Errorf("an answer of %d bytes", len(p))
	}
	if _, err := a.W.Write(frame('A', p)); err != nil {
		return 0, err
	}
	return len(p), nil
}

// ReadResult passes answers on and reads B's result: nil if it has the kernel, a
// *proto.Error if it has not, and another error, which says nothing of what B has, if the
// stream broke.
func ReadResult(r io.Reader, answers io.Writer) error {
	var text []byte
	for {
		var head [5]byte
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return fmt.Errorf("the other host's answer: %w", err)
		}
		n, most := binary.BigEndian.Uint32(head[1:]), uint32(MaxAnswer)
		if head[0] == 'R' {
			most = MaxResult
		}
		if n > most || head[0] != 'A' && head[0] != 'R' {
			return fmt.Errorf("the other host's answer of kind %q has %d bytes", head[0], n)
		}
		text = append(text[:0], make([]byte, n)...)
		if _, err := io.ReadFull(r, text); err != nil {
			return fmt.Errorf("the other host's answer: %w", err)
		}
		if head[0] == 'R' {
			break
		}
		if _, err := answers.Write(text); err != nil {
			return fmt.Errorf("an answer to the first host: %w", err)
		}
	}
	d := &posternv1.ErrorDetail{}
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(text, d); err != nil {
		return fmt.Errorf("the other host's answer: %w", err)
	}
	if d.Code == 0 && d.Message == "" {
		return nil
	}
	return proto.FromDetail(d)
}
