package pgwire

import "encoding/binary"

// meter follows one direction of a session from message to message, by their headers
// alone. It is for one goroutine.
type meter struct {
	// begun is called with the type of each message; ended with the type and the first
	// byte of the body when the last of it has passed. Either may be nil.
	begun func(kind byte)
	ended func(kind, first byte)

	head  [5]byte
	have  int   // bytes of head
	left  int64 // bytes of the body to come
	fresh bool  // the body's first byte is to come
	kind  byte
	first byte
	// lost is set when a header made no sense: no edge is known any more.
	lost bool
}

// edge reports whether what has passed ends with a message.
func (m *meter) edge() bool { return !m.lost && m.have == 0 && m.left == 0 }

// add notes bytes that pass.
func (m *meter) add(p []byte) {
	for len(p) > 0 && !m.lost {
		if m.left > 0 {
			if m.fresh {
				m.first, m.fresh = p[0], false
			}
			n := min(m.left, int64(len(p)))
			m.left -= n
			p = p[n:]
			if m.left == 0 && m.ended != nil {
				m.ended(m.kind, m.first)
			}
			continue
		}
		var length uint32
		if m.have == 0 && len(p) >= 5 {
			m.kind, length = p[0], binary.BigEndian.Uint32(p[1:])
			p = p[5:]
		} else {
			n := copy(m.head[m.have:], p)
			m.have += n
			p = p[n:]
			if m.have < 5 {
				return
			}
			m.kind, length, m.have = m.head[0], binary.BigEndian.Uint32(m.head[1:]), 0
		}
		if length < 4 {
			m.lost = true
			return
		}
		m.left, m.fresh, m.first = int64(length)-4, true, 0
		if m.begun != nil {
			m.begun(m.kind)
		}
		if m.left == 0 && m.ended != nil {
			m.ended(m.kind, 0)
		}
	}
}
