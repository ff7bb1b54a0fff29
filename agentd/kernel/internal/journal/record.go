package journal

import (
	"encoding/binary"
	"errors"
	"hash/crc32"

	"google.golang.org/protobuf/encoding/protowire"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// The kinds of records.
const (
	kindMessage  = 'm' // a message of the kernel
	kindSnapshot = 's' // JSON: snapshot; the first record of each segment
	kindConfirm  = 'c' // the client confirmed everything up to the sequence number in the payload (8 bytes)
	kindSent     = 'q' // JSON: Request, which was sent for the client
	kindAnswered = 'a' // the request with the id in the payload is done with
)

const (
	headerSize = 18
	// maxRecord bounds a record's length field: a message and what is around it.
	maxRecord = 64<<20 + 256<<10
	// inlineBytes is up to which size a part of a message is copied rather than
	// written by itself.
	inlineBytes = 16 << 10
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// header is a record's header.
type header struct {
	length   uint32
	sum      uint32
	sequence uint64
	kind     byte
	client   int
}

var errTorn = errors.New("torn record")

func parseHeader(b []byte) (header, error) {
	h := header{
		length: binary.LittleEndian.Uint32(b), sum: binary.LittleEndian.Uint32(b[4:]), sequence: binary.LittleEndian.Uint64(b[8:]),
		kind: b[16], client: int(b[17]),
	}
	switch h.kind {
	case kindMessage, kindSnapshot, kindConfirm, kindSent, kindAnswered:
	default:
		return h, errTorn
	}
	if h.length > maxRecord || uint32(h.client) > h.length {
		return h, errTorn
	}
	return h, nil
}

// pieces are a record's bytes, to be written one after the other.
func pieces(sequence uint64, kind byte, client string, payload [][]byte) [][]byte {
	first := make([]byte, headerSize, headerSize+len(client)+512)
	binary.LittleEndian.PutUint64(first[8:], sequence)
	first[16], first[17] = kind, byte(len(client))
	first = append(first, client...)
	length := len(client)
	for _, p := range payload {
		length += len(p)
	}
	out := [][]byte{nil}
	if len(payload) > 0 && len(payload[0]) <= inlineBytes {
		first = append(first, payload[0]...)
		payload = payload[1:]
	}
	out = append(out, payload...)
	out[0] = first
	binary.LittleEndian.PutUint32(first, uint32(length))
	sum := crc32.Update(0, castagnoli, first[8:])
	for _, p := range out[1:] {
		sum = crc32.Update(sum, castagnoli, p)
	}
	binary.LittleEndian.PutUint32(first[4:], sum)
	return out
}

// encode is m as protobuf in pieces, which share the memory of its large parts.
func encode(m *posternv1.KernelMessage) [][]byte {
	var out [][]byte
	var b []byte
	add := func(field protowire.Number, part []byte) {
		if len(part) == 0 && field != 6 {
			return
		}
		b = protowire.AppendTag(b, field, protowire.BytesType)
		b = protowire.AppendVarint(b, uint64(len(part)))
		if len(part) <= inlineBytes {
			b = append(b, part...)
			return
		}
		out = append(out, b, part)
		b = nil
	}
	add(1, []byte(m.Channel))
	add(2, m.Header)
	add(3, m.ParentHeader)
	add(4, m.Metadata)
	add(5, m.Content)
	for _, p := range m.Buffers {
		add(6, p)
	}
	return append(out, b)
}
