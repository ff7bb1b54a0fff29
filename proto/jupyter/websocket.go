package jupyter

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"unicode/utf8"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// SubprotocolV1 is the WebSocket subprotocol of EncodeV1's form; a client that
// asks for none speaks the legacy form.
const SubprotocolV1 = "v1.kernel.websocket.jupyter.org"

// legacy is the JSON of the legacy form. msg_id and msg_type repeat the header's.
type legacy struct {
	Header       json.RawMessage   `json:"header"`
	ID           string            `json:"msg_id"`
	Type         string            `json:"msg_type"`
	ParentHeader json.RawMessage   `json:"parent_header"`
	Metadata     json.RawMessage   `json:"metadata"`
	Content      json.RawMessage   `json:"content"`
	Buffers      []json.RawMessage `json:"buffers"`
	Channel      string            `json:"channel"`
}

// EncodeLegacy is a message in the legacy form. binary says that it goes as a
// binary message (it has buffers), else as a text. ErrMalformed means that a part
// of m is not the JSON it should be.
func EncodeLegacy(m *posternv1.KernelMessage) (data []byte, isBinary bool, err error) {
	h, err := ParseHeader(m.Header)
	if err != nil {
		return nil, false, err
	}
	channel, _ := json.Marshal(m.Channel) //nolint:errchkjson // a string has a JSON
	id, _ := json.Marshal(h.ID)           //nolint:errchkjson // the same
	kind, _ := json.Marshal(h.Type)       //nolint:errchkjson // the same
	parts := [4][]byte{dict(m.Header), dict(m.ParentHeader), dict(m.Metadata), dict(m.Content)}
	size := 160 + len(channel) + len(id) + len(kind)
	for i, p := range parts {
		if !json.Valid(p) {
			return nil, false, fmt.Errorf("%w: a part of it is no JSON", ErrMalformed)
		}
		if !utf8.Valid(p) {
			parts[i] = []byte(replaceInvalid(p))
		}
		size += len(parts[i])
	}
	start := 0
	if len(m.Buffers) > 0 {
		if len(m.Buffers) > MaxBuffers {
			return nil, false, fmt.Errorf("%w: %d buffers", ErrTooLarge, len(m.Buffers))
		}
		start = 4 * (2 + len(m.Buffers))
		for _, b := range m.Buffers {
			size += len(b)
		}
	}
	if start+size > MaxMessage {
		return nil, false, fmt.Errorf("%w: %d bytes", ErrTooLarge, start+size)
	}
	out := make([]byte, start, start+size)
	for _, p := range []struct {
		key  string
		text []byte
	}{
		{`{"header":`, parts[0]},
		{`,"msg_id":`, id},
		{`,"msg_type":`, kind},
		{`,"parent_header":`, parts[1]},
		{`,"metadata":`, parts[2]},
		{`,"content":`, parts[3]},
		{`,"buffers":[],"channel":`, channel},
	} {
		out = append(append(out, p.key...), p.text...)
	}
	out = append(out, '}')
	if len(m.Buffers) == 0 {
		return out, false, nil
	}
	binary.BigEndian.PutUint32(out, uint32(1+len(m.Buffers)))
	binary.BigEndian.PutUint32(out[4:], uint32(start))
	for i, b := range m.Buffers {
		binary.BigEndian.PutUint32(out[8+4*i:], uint32(len(out)))
		out = append(out, b...)
	}
	return out, true, nil
}

// replaceInvalid makes bytes that are no UTF-8 into U+FFFD: a WebSocket's text must
// be UTF-8, and Python can print what is not.
func replaceInvalid(p []byte) string { return string([]rune(string(p))) }

// DecodeLegacy reads a message of the legacy form. A message without a channel is
// for shell, as Jupyter's servers have it.
func DecodeLegacy(data []byte, isBinary bool) (*posternv1.KernelMessage, error) {
	if len(data) > MaxMessage {
		return nil, fmt.Errorf("%w: %d bytes", ErrTooLarge, len(data))
	}
	text := data
	var buffers [][]byte
	if isBinary {
		if len(data) < 4 {
			return nil, fmt.Errorf("%w: it is cut", ErrMalformed)
		}
		n := binary.BigEndian.Uint32(data)
		if n == 0 || uint64(n)*4+4 > uint64(len(data)) {
			return nil, fmt.Errorf("%w: %d offsets", ErrMalformed, n)
		}
		if n > 1+MaxBuffers {
			return nil, fmt.Errorf("%w: %d buffers", ErrTooLarge, n-1)
		}
		offsets := make([]int, n+1)
		for i := range n {
			offsets[i] = int(binary.BigEndian.Uint32(data[4+4*i:]))
		}
		offsets[n] = len(data)
		parts, err := cut(data, offsets, int(n)*4+4)
		if err != nil {
			return nil, err
		}
		text, buffers = parts[0], parts[1:]
	}
	var l legacy
	if err := json.Unmarshal(text, &l); err != nil {
		return nil, fmt.Errorf("%w: it is not the JSON of a message", ErrMalformed)
	}
	if l.Channel == "" {
		l.Channel = Shell
	}
	if len(buffers) == 0 {
		buffers = nil
	}
	return &posternv1.KernelMessage{
		Channel: l.Channel, Header: dict(l.Header), ParentHeader: dict(l.ParentHeader), Metadata: dict(l.Metadata), Content: dict(l.Content), Buffers: buffers,
	}, nil
}

// cut cuts data at offsets, the last of which is its end; the first part begins at
// start or later.
func cut(data []byte, offsets []int, start int) ([][]byte, error) {
	parts := make([][]byte, len(offsets)-1)
	at := start
	for i := range parts {
		from, to := offsets[i], offsets[i+1]
		if from < at || to < from || to > len(data) {
			return nil, fmt.Errorf("%w: its offsets are not in order", ErrMalformed)
		}
		parts[i], at = data[from:to:to], to
	}
	return parts, nil
}

// v1Parts are the parts of the v1 form before the buffers: channel and four dicts.
const v1Parts = 5

// EncodeV1 is a message in the v1 form, which is always binary:
//
//	number of offsets  8 bytes, little-endian, as all that follow
//	offsets            of channel, header, parent header, metadata, content, each buffer, and of the end
//	the parts
func EncodeV1(m *posternv1.KernelMessage) ([]byte, error) {
	parts := make([][]byte, 0, v1Parts+len(m.Buffers))
	parts = append(parts, []byte(m.Channel), dict(m.Header), dict(m.ParentHeader), dict(m.Metadata), dict(m.Content))
	parts = append(parts, m.Buffers...)
	if len(m.Buffers) > MaxBuffers {
		return nil, fmt.Errorf("%w: %d buffers", ErrTooLarge, len(m.Buffers))
	}
	start := 8 * (2 + len(parts))
	size := start
	for _, p := range parts {
		size += len(p)
	}
	if size > MaxMessage {
		return nil, fmt.Errorf("%w: %d bytes", ErrTooLarge, size)
	}
	out := make([]byte, 0, size)
	out = binary.LittleEndian.AppendUint64(out, uint64(len(parts)+1))
	at := start
	for _, p := range parts {
		out = binary.LittleEndian.AppendUint64(out, uint64(at))
		at += len(p)
	}
	out = binary.LittleEndian.AppendUint64(out, uint64(at))
	for _, p := range parts {
		out = append(out, p...)
	}
	return out, nil
}

// DecodeV1 reads a message of the v1 form.
func DecodeV1(data []byte) (*posternv1.KernelMessage, error) {
	if len(data) > MaxMessage {
		return nil, fmt.Errorf("%w: %d bytes", ErrTooLarge, len(data))
	}
	if len(data) < 8 {
		return nil, fmt.Errorf("%w: it is cut", ErrMalformed)
	}
	n := binary.LittleEndian.Uint64(data)
	if n < v1Parts+1 || n > uint64(len(data)/8-1) {
		return nil, fmt.Errorf("%w: %d offsets", ErrMalformed, n)
	}
	if n > v1Parts+1+MaxBuffers {
		return nil, fmt.Errorf("%w: %d buffers", ErrTooLarge, n-v1Parts-1)
	}
	offsets := make([]int, n)
	for i := range offsets {
		o := binary.LittleEndian.Uint64(data[8+8*i:])
		if o > uint64(len(data)) {
			return nil, fmt.Errorf("%w: an offset beyond its end", ErrMalformed)
		}
		offsets[i] = int(o)
	}
	if offsets[n-1] != len(data) {
		return nil, fmt.Errorf("%w: bytes after its end", ErrMalformed)
	}
	parts, err := cut(data, offsets, 8+8*int(n))
	if err != nil {
		return nil, err
	}
	if !utf8.Valid(parts[0]) || len(parts[0]) > 32 {
		return nil, fmt.Errorf("%w: its channel is no name", ErrMalformed)
	}
	m := &posternv1.KernelMessage{Channel: string(parts[0]), Header: parts[1], ParentHeader: parts[2], Metadata: parts[3], Content: parts[4]}
	if len(parts) > v1Parts {
		m.Buffers = parts[v1Parts:]
	}
	return m, nil
}
