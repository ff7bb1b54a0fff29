package tunnel

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Protocol versions that this package speaks. A peer with another major version
// is refused; a minor version adds fields at the end of messages, which older
// peers ignore.
const (
	protocolMajor = 1
	protocolMinor = 0
)

// tunnelHeader names, in the request for a WebSocket, the tunnel that a further
// lane is for. It gives no right but not to wait behind strangers' handshakes.
const tunnelHeader = "Postern-Tunnel"

// ALPN is the application protocol of the inner TLS handshake.
const ALPN = "postern/1"

const (
	idSize     = 16
	maxHello   = 512
	maxAnswer  = 1024
	maxRefusal = 512 // bytes of text in an answer
	minHello   = 2 + idSize + 2 + 4 + 4
	minAnswer  = 3 + 4
)

// hello is the first message on a lane, sent by the dialer after the inner TLS
// handshake:
//
//	u16 length of what follows, at most 512
//	u8 major, u8 minor
//	16 bytes tunnel id
//	u8 class (0 control, 1 bulk, 2 solo)
//	u8 opener of a solo lane's stream (0 dialer, 1 acceptor)
//	u32 round trip in microseconds as the dialer measured it
//	u32 token of the open-lane request that this lane answers, else 0
//	more fields of later minor versions: ignored
type hello struct {
	major, minor uint8
	id           [idSize]byte
	class        Class
	opener       uint8
	rtt          time.Duration
	token        uint32
}

// The two values of hello.opener.
const (
	openerDialer   = 0
	openerAcceptor = 1
)

func (h *hello) append(b []byte) []byte {
	b = binary.BigEndian.AppendUint16(b, minHello)
	b = append(b, h.major, h.minor)
	b = append(b, h.id[:]...)
	b = append(b, byte(h.class), h.opener)
	b = binary.BigEndian.AppendUint32(b, micros(h.rtt))
	return binary.BigEndian.AppendUint32(b, h.token)
}

// decode reads the message behind its length.
func (h *hello) decode(b []byte) error {
	if len(b) < minHello {
		return fmt.Errorf("%w: hello of %d bytes", ErrProtocol, len(b))
	}
	h.major, h.minor = b[0], b[1]
	copy(h.id[:], b[2:])
	b = b[2+idSize:]
	h.class, h.opener = Class(b[0]), b[1]
	h.rtt = time.Duration(binary.BigEndian.Uint32(b[2:])) * time.Microsecond
	h.token = binary.BigEndian.Uint32(b[6:])
	if h.class > Solo || h.opener > openerAcceptor {
		return fmt.Errorf("%w: hello with class %d, opener %d", ErrProtocol, h.class, h.opener)
	}
	return nil
}

// RefusalCode is why an acceptor refused a lane. Codes are append-only.
type RefusalCode uint8

// The refusals of a hello.
const (
	RefusedNot         RefusalCode = iota // accepted
	RefusedMalformed                      // the hello could not be read
	RefusedVersion                        // another major version
	RefusedUnknown                        // no such tunnel to join; dial a new one
	RefusedIdentity                       // the lane's certificate is not the tunnel's
	RefusedLimit                          // too many lanes or tunnels; retry later
	RefusedDraining                       // the acceptor is shutting down; retry elsewhere or later
	RefusedNotAdmitted                    // the acceptor's Admit said no; the text says why
)

// String returns a word for metrics and logs.
func (c RefusalCode) String() string {
	switch c {
	case RefusedNot:
		return "none"
	case RefusedMalformed:
		return "malformed"
	case RefusedVersion:
		return "version"
	case RefusedUnknown:
		return "unknown_tunnel"
	case RefusedIdentity:
		return "identity"
	case RefusedLimit:
		return "limit"
	case RefusedDraining:
		return "draining"
	case RefusedNotAdmitted:
		return "not_admitted"
	}
	return "other"
}

// Refusal is an answer that says no. ServerConfig.Admit returns one to choose
// the code; its Text reaches the dialer.
type Refusal struct {
	Code RefusalCode
	Text string // public, one line, at most 512 bytes
}

func (r *Refusal) Error() string {
	if r.Text == "" {
		return "refused: " + r.Code.String()
	}
	return "refused: " + r.Text
}

// answer is the acceptor's reply to a hello:
//
//	u16 length of what follows, at most 1024
//	u8 major, u8 minor, u8 code (0 is yes)
//	u32 streams that the acceptor holds open at once for this tunnel
//	u16 length of a text for people, at most 512, and the text (UTF-8, one line)
//	more fields of later minor versions: ignored
type answer struct {
	major, minor uint8
	code         RefusalCode
	maxStreams   uint32
	text         string
}

func (a *answer) append(b []byte) []byte {
	text := oneLine(a.text, maxRefusal)
	b = binary.BigEndian.AppendUint16(b, uint16(minAnswer+2+len(text)))
	b = append(b, a.major, a.minor, byte(a.code))
	b = binary.BigEndian.AppendUint32(b, a.maxStreams)
	b = binary.BigEndian.AppendUint16(b, uint16(len(text)))
	return append(b, text...)
}

func (a *answer) decode(b []byte) error {
	if len(b) < minAnswer+2 {
		return fmt.Errorf("%w: answer of %d bytes", ErrProtocol, len(b))
	}
	a.major, a.minor, a.code = b[0], b[1], RefusalCode(b[2])
	a.maxStreams = binary.BigEndian.Uint32(b[3:])
	n := int(binary.BigEndian.Uint16(b[minAnswer:]))
	b = b[minAnswer+2:]
	if n > maxRefusal || n > len(b) {
		return fmt.Errorf("%w: answer with a text of %d bytes", ErrProtocol, n)
	}
	a.text = oneLine(string(b[:n]), maxRefusal)
	return nil
}

// readMessage reads one length-prefixed message of at most max bytes. It reads
// no byte beyond it.
func readMessage(r io.Reader, max int) ([]byte, error) {
	var l [2]byte
	if _, err := io.ReadFull(r, l[:]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(l[:]))
	if n > max {
		return nil, fmt.Errorf("%w: message of %d bytes", ErrProtocol, n)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	return b, nil
}

func micros(d time.Duration) uint32 {
	return uint32(min(max(d.Microseconds(), 0), 1<<32-1))
}

// oneLine makes text of a peer safe to log: valid UTF-8 without control
// characters, at most max bytes.
func oneLine(s string, max int) string {
	s = strings.ToValidUTF8(s, "?")
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, s)
	if len(s) > max {
		s = s[:max]
		for !utf8.ValidString(s) {
			s = s[:len(s)-1]
		}
	}
	return s
}

func formatID(id [idSize]byte) string { return hex.EncodeToString(id[:]) }
