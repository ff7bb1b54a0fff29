package tunnel

import (
	"encoding/binary"
	"fmt"
)

// Read gives yamux its frames and keeps ours.
func (m *mux) Read(p []byte) (int, error) {
	for {
		if len(m.spillB) > 0 {
			n := copy(p, m.spillB)
			m.spillB = m.spillB[n:]
			return n, nil
		}
		if m.body > 0 && m.into != nil {
			if err := m.readBody(); err != nil {
				m.lane.fail(lostError(err))
				return 0, err
			}
			continue
		}
		dst := p
		if len(p) < len(m.spill) { // yamux never does; filter needs room for a held header
			dst = m.spill[:]
		}
		n, err := m.inner.Read(dst[yamuxHeader:])
		if n > 0 {
			out, ferr := m.filter(dst, dst[yamuxHeader:yamuxHeader+n])
			if ferr != nil {
				m.lane.fail(ferr)
				return 0, ferr
			}
			if len(p) < len(m.spill) {
				m.spillB = m.spill[:out]
				out = 0
			}
			if out > 0 {
				return out, nil
			}
		}
		if err != nil {
			m.lane.fail(lostError(err))
			return 0, err
		}
	}
}

// readBody reads the rest of a data frame's body straight into its inbox.
func (m *mux) readBody() error {
	q := &m.into.inbox
	for m.body > 0 {
		n, err := m.inner.Read(q.space(int(min(m.body, largeBlock))))
		q.commit(n)
		if m.body -= uint64(n); err != nil {
			return err
		}
	}
	return nil
}

// filter moves those bytes of in that are for yamux to the front of dst and
// returns how many. A header is given away only when it is whole and judged;
// dst has yamuxHeader bytes before in for one held from before.
func (m *mux) filter(dst, in []byte) (int, error) {
	out := 0
	for len(in) > 0 {
		if m.body > 0 {
			n := int(min(m.body, uint64(len(in))))
			switch {
			case m.msgTyp != 0:
				m.msg = append(m.msg, in[:n]...)
			case m.into != nil:
				m.into.inbox.put(in[:n])
			}
			in = in[n:]
			if m.body -= uint64(n); m.body == 0 && m.msgTyp != 0 {
				if err := m.endMessage(); err != nil {
					return 0, err
				}
			}
			continue
		}
		m.rhdr[m.rn] = in[0]
		m.rn++
		in = in[1:]
		switch m.rhdr[0] {
		case messageMark:
			if m.rn < messageHeader {
				continue
			}
			m.rn, m.into = 0, nil
			m.body = uint64(binary.BigEndian.Uint16(m.rhdr[2:]))
			m.msgTyp = messageType(m.rhdr[1])
			if m.body > maxMessage || m.msgTyp == 0 {
				return 0, fmt.Errorf("%w: link message %d of %d bytes", ErrProtocol, m.msgTyp, m.body)
			}
			if m.body == 0 {
				if err := m.endMessage(); err != nil {
					return 0, err
				}
			}
		case 0:
			if take := min(yamuxHeader-m.rn, len(in)); take > 0 {
				copy(m.rhdr[m.rn:], in[:take])
				m.rn += take
				in = in[take:]
			}
			if m.rn < yamuxHeader {
				continue
			}
			m.rn = 0
			pass, err := m.inboundHeader()
			if err != nil {
				return 0, err
			}
			if pass {
				out += copy(dst[out:], m.rhdr[:])
			}
		default:
			return 0, fmt.Errorf("%w: frame starts with %#x", ErrProtocol, m.rhdr[0])
		}
	}
	return out, nil
}

// endMessage handles a whole link message.
func (m *mux) endMessage() error {
	msg := message{typ: m.msgTyp}
	b := m.msg
	m.msgTyp = 0
	if m.msg = m.msg[:0]; cap(m.msg) > 64 {
		m.msg = nil
	}
	if err := msg.decode(b); err != nil {
		return err
	}
	return m.lane.received(&msg)
}

// inboundHeader judges the yamux header in rhdr: whether yamux may see it, which
// then has no body. It sets body and into.
func (m *mux) inboundHeader() (pass bool, err error) {
	typ, flags := m.rhdr[1], binary.BigEndian.Uint16(m.rhdr[2:])
	id, length := binary.BigEndian.Uint32(m.rhdr[4:]), binary.BigEndian.Uint32(m.rhdr[8:])
	switch typ {
	case yamuxPing:
		return false, nil
	case yamuxGoAway:
		return false, fmt.Errorf("%w: yamux go-away %d", ErrProtocol, length)
	case yamuxData, yamuxWindow:
	default:
		return false, fmt.Errorf("%w: yamux frame type %d", ErrProtocol, typ)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.into = nil
	if typ == yamuxData {
		m.body = uint64(length)
	}
	s := m.streams[id]
	if flags&flagSYN != 0 {
		switch {
		case s != nil:
			return false, fmt.Errorf("%w: stream %d opened twice", ErrProtocol, id)
		case id == 0 || (id%2 == 1) == m.lane.openerOdd():
			return false, fmt.Errorf("%w: stream %d has the wrong parity", ErrProtocol, id)
		case m.closed:
			return false, nil
		case !m.lane.tunnel.admitStream():
			m.lane.tunnel.metrics.streamsRefused.Inc()
			return false, m.queueLocked(appendYamux(nil, yamuxWindow, flagRST, id, 0))
		}
		s = newStream(m.lane, id, true)
		m.streams[id] = s
		m.inbound++
	}
	if s == nil {
		return false, nil // late: we reset it, or both sides closed it
	}
	if typ == yamuxData {
		if err := s.flow.receive(length); err != nil {
			return false, err
		}
	}
	if typ == yamuxWindow && length > 0 {
		s.credit = min(s.credit+int64(length), 1<<40)
		s.wakeWriter()
	}
	closed := s.closed.Load()
	if typ == yamuxData && !closed {
		m.into = s
	}
	if flags&(flagFIN|flagRST) != 0 {
		if s.ended.Load() && flags&flagRST == 0 {
			return false, fmt.Errorf("%w: stream %d ended twice", ErrProtocol, id)
		}
		if flags&flagRST == 0 && typ == yamuxData && length > 0 {
			return false, fmt.Errorf("%w: stream %d ended with a body", ErrProtocol, id)
		}
		s.peerEnded(flags&flagRST != 0)
		if closed || flags&flagRST != 0 {
			m.removeLocked(s)
		}
	}
	binary.BigEndian.PutUint32(m.rhdr[8:], 0)
	return flags != 0, nil
}
