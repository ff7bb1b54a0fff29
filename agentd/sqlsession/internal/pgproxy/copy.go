package pgproxy

import (
	"errors"
	"os"
)

// copyIn passes on what the client sends for a COPY FROM STDIN, until it is done or
// the server has had enough. n bytes are the server's CopyInResponse.
func (p *Proxy) copyIn(n int) error {
	if err := p.through(n); err != nil {
		return p.eof(err)
	}
	p.pass()
	p.out.flush()
	watch := p.watch()
	watching := true
	defer func() {
		if watching {
			_ = p.unwatch(watch)
		}
	}()
	// heard takes what the server said; over tells that it was an error.
	heard := func(err error) (over bool, _ error) {
		watching = false
		if errors.Is(err, os.ErrDeadlineExceeded) {
			// It is time to tell that the statement runs.
			if err := p.quiet(); err != nil {
				return false, err
			}
			p.out.flush()
			watch, watching = p.watch(), true
			return false, nil
		}
		if err != nil {
			return false, p.eof(err)
		}
		over, err = p.duringCopy()
		if err == nil && !over {
			watch, watching = p.watch(), true
		}
		return over, err
	}
	if p.expects[0].kind == 'E' {
		// The server takes no notice of a Sync that came before the data: the client sends
		// another behind it.
		p.expects = p.expects[:1]
	}
	p.copying = true
	defer func() { p.copying = false }()
	var head [5]byte
	for {
		for got := 0; got < len(head); {
			k, err := p.in.take(head[got:])
			if err != nil {
				return errEnded
			}
			p.noteTaken(k)
			if got += k; k > 0 {
				continue
			}
			p.out.flush()
			select {
			case <-p.in.wake:
			case err := <-watch:
				if over, err := heard(err); over || err != nil {
					return p.leftOver(head[:got], err)
				}
			}
		}
		select {
		case err := <-watch:
			if over, err := heard(err); over || err != nil {
				return p.leftOver(head[:], err)
			}
		default:
		}
		size := sizeOf(head)
		if size < 0 {
			return protocolError("a message of type %q has an impossible length", head[0])
		}
		switch head[0] {
		case 'd':
			if err := p.write(head[:]); err != nil {
				return p.eof(err)
			}
			if err := p.stream(size); err != nil {
				return err
			}
		case 'c', 'f':
			if err := p.takeBody(head[0], size); err != nil {
				return err
			}
			b := p.message(head[0], p.body)
			if p.expects[0].kind == 'E' {
				b = appendMessage(b, 'H') // else the server says nothing before the client's Sync
			}
			return p.write(b)
		case 'H', 'S': // of no meaning here
			if size != 0 {
				return protocolError("a Flush or Sync with a body")
			}
		case 'X':
			return errEnded
		default:
			return protocolError("a message of type %q during COPY FROM STDIN", head[0])
		}
	}
}

// leftOver keeps the beginning of a message of the client's that was read when the
// COPY came to its end.
func (p *Proxy) leftOver(head []byte, err error) error {
	if err == nil {
		p.in.putBack(head)
		p.taken -= len(head)
	}
	return err
}

func sizeOf(head [5]byte) int {
	return int(int32(uint32(head[1])<<24|uint32(head[2])<<16|uint32(head[3])<<8|uint32(head[4]))) - 4
}

// noteTaken counts what was taken of the client's bytes.
func (p *Proxy) noteTaken(n int) {
	if p.taken += n; p.taken >= creditStep {
		p.out.credit(p.taken)
		p.taken = 0
	}
}

// duringCopy takes what the server says aside; over tells that something else has
// come, which ends the COPY.
func (p *Proxy) duringCopy() (over bool, _ error) {
	for p.w-p.r >= 5 {
		t, size, err := p.header()
		if err != nil {
			return false, err
		}
		known, err := p.aside(t, size)
		if err != nil {
			return false, err
		}
		if !known {
			return true, nil
		}
		p.pass()
	}
	return false, nil
}
