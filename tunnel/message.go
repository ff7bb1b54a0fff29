package tunnel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"
)

// A multiplexed lane is a sequence of frames. A frame that starts with byte 0 is
// yamux's (12 bytes of header; a data frame is followed by its body); a frame
// that starts with messageMark is a link message of ours:
//
//	u8 0xC1, u8 type, u16 length of the payload (at most 1024), payload
//
// Link messages stand between yamux frames, never inside one, and wait for no
// stream. Unknown types are ignored.
const (
	messageMark   = 0xC1
	messageHeader = 4
	maxMessage    = 1024
)

type messageType uint8

const (
	msgPing       messageType = 1 // u64 opaque: answer with a pong that carries the same
	msgPong       messageType = 2 // u64 of the ping
	msgOpenLane   messageType = 3 // acceptor to dialer: u32 token, u8 class
	msgLaneFailed messageType = 4 // dialer to acceptor: u32 token, u8 RefusalCode or 0, text
	msgGoAway     messageType = 5 // u32 reconnect after ms, u32 deadline ms, text
	msgBye        messageType = 6 // u8 byeCode, text: the sender ends the tunnel
	msgRetire     messageType = 7 // empty: the sender opens no more streams on this bulk lane; close it if it has none
)

// byeCode is why a peer ended a tunnel. Codes are append-only.
type byeCode uint8

const (
	byeClosed byeCode = iota
	byeReplaced
	byeRevoked
	byeDrained
)

func byeOf(err error) byeCode {
	switch {
	case errors.Is(err, ErrReplaced):
		return byeReplaced
	case errors.Is(err, ErrRevoked):
		return byeRevoked
	case errors.Is(err, ErrDrained):
		return byeDrained
	}
	return byeClosed
}

func (c byeCode) cause(text string) error {
	base := ErrPeerClosed
	switch c {
	case byeReplaced:
		base = ErrReplaced
	case byeRevoked:
		base = ErrRevoked
	case byeDrained:
		base = ErrDrained
	}
	if text == "" || text == base.Error() {
		return base
	}
	return fmt.Errorf("%w: %s", base, text)
}

// message is a decoded link message; which fields count depends on the type.
type message struct {
	typ            messageType
	nonce          uint64
	token          uint32
	class          Class
	code           uint8
	reconnectAfter time.Duration
	deadline       time.Duration
	text           string
}

func (m *message) append(b []byte) []byte {
	start := len(b)
	b = append(b, messageMark, byte(m.typ), 0, 0)
	switch m.typ {
	case msgPing, msgPong:
		b = binary.BigEndian.AppendUint64(b, m.nonce)
	case msgOpenLane:
		b = binary.BigEndian.AppendUint32(b, m.token)
		b = append(b, byte(m.class))
	case msgLaneFailed:
		b = binary.BigEndian.AppendUint32(b, m.token)
		b = append(b, m.code)
		b = append(b, oneLine(m.text, maxRefusal)...)
	case msgGoAway:
		b = binary.BigEndian.AppendUint32(b, millis(m.reconnectAfter))
		b = binary.BigEndian.AppendUint32(b, millis(m.deadline))
		b = append(b, oneLine(m.text, maxRefusal)...)
	case msgBye:
		b = append(b, m.code)
		b = append(b, oneLine(m.text, maxRefusal)...)
	}
	binary.BigEndian.PutUint16(b[start+2:], uint16(len(b)-start-messageHeader))
	return b
}

// decode reads the payload of a message of m.typ. Longer payloads than expected
// are those of later versions: the rest is ignored.
func (m *message) decode(b []byte) error {
	need := 0
	switch m.typ {
	case msgPing, msgPong:
		need = 8
	case msgOpenLane, msgLaneFailed:
		need = 5
	case msgGoAway:
		need = 8
	case msgBye:
		need = 1
	}
	if len(b) < need || len(b) > maxMessage {
		return fmt.Errorf("%w: link message %d of %d bytes", ErrProtocol, m.typ, len(b))
	}
	switch m.typ {
	case msgPing, msgPong:
		m.nonce = binary.BigEndian.Uint64(b)
	case msgOpenLane:
		m.token, m.class = binary.BigEndian.Uint32(b), Class(b[4])
		if m.class != Bulk && m.class != Solo {
			return fmt.Errorf("%w: open-lane request for class %d", ErrProtocol, m.class)
		}
	case msgLaneFailed:
		m.token, m.code = binary.BigEndian.Uint32(b), b[4]
		m.text = oneLine(string(b[5:]), maxRefusal)
	case msgGoAway:
		m.reconnectAfter = time.Duration(binary.BigEndian.Uint32(b)) * time.Millisecond
		m.deadline = time.Duration(binary.BigEndian.Uint32(b[4:])) * time.Millisecond
		m.text = oneLine(string(b[8:]), maxRefusal)
	case msgBye:
		m.code = b[0]
		m.text = oneLine(string(b[1:]), maxRefusal)
	}
	return nil
}

func millis(d time.Duration) uint32 {
	return uint32(min(max(d.Milliseconds(), 0), 1<<32-1))
}
