package pgtree

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// bodyTimeout bounds the time in which a session must send a text that it
	// has announced, and take the answer: others wait.
	bodyTimeout = 5 * time.Second
	// maxMessage bounds the text of a syntax error in bytes.
	maxMessage = 1 << 10
	// StatsSize is the length of what a parser process tells agentd: two
	// numbers of eight bytes, texts parsed and nanoseconds that it took, so far.
	StatsSize = 16
	// statsEvery is how often it tells, and when it is ready.
	statsEvery = time.Second
)

// answer kinds.
const (
	kindTree    = 't'
	kindSyntax  = 'e'
	kindComplex = 'x'
)

// ErrBroken is returned by Serve when a text broke the parser: the process
// must end.
var ErrBroken = errBroken

// Serve starts the parser and answers the connections whose descriptors come
// over control, until control ends (nil) or a text broke the parser
// (ErrBroken). It writes its statistics to control: the first once the parser
// is ready. Memory: one text (MaxText) and one tree at a time, and for each
// connection 16 KiB while it asks.
func Serve(control *net.UnixConn) error {
	// The first text takes a second and a quarter of a gigabyte.
	if _, err := parse("SELECT 1"); err != nil {
		return fmt.Errorf("start the parser: %w", err)
	}
	debug.FreeOSMemory()
	s := &server{ended: make(chan error, 1)}
	go s.accept(control)
	go s.report(control)
	return <-s.ended
}

type server struct {
	parsed, nanos atomic.Uint64
	ended         chan error // the first entry counts
	big           sync.Mutex // held for a text that is large from its arrival to its answer
}

func (s *server) end(err error) {
	select {
	case s.ended <- err:
	default:
	}
}

func (s *server) report(control *net.UnixConn) {
	last := uint64(1)
	for {
		if parsed := s.parsed.Load(); parsed != last {
			last = parsed
			b := binary.BigEndian.AppendUint64(nil, parsed)
			b = binary.BigEndian.AppendUint64(b, s.nanos.Load())
			if _, err := control.Write(b); err != nil {
				s.end(nil)
				return
			}
		}
		time.Sleep(statsEvery)
	}
}

func (s *server) accept(control *net.UnixConn) {
	for {
		f, _, err := ReceiveFile(control)
		if err != nil {
			s.end(nil) // agentd is gone
			return
		}
		if f == nil {
			continue
		}
		conn, err := net.FileConn(f)
		_ = f.Close()
		if err != nil {
			continue
		}
		go s.serve(conn)
	}
}

// serve answers one session until it hangs up or breaks the protocol.
func (s *server) serve(conn net.Conn) {
	defer func() { _ = conn.Close() }()
	var header [4]byte
	for {
		if _, err := io.ReadFull(conn, header[:]); err != nil {
			return
		}
		size := binary.BigEndian.Uint32(header[:])
		if size > MaxText {
			return
		}
		_ = conn.SetDeadline(time.Now().Add(bodyTimeout))
		if !s.answer(conn, int(size)) {
			return
		}
		_ = conn.SetDeadline(time.Time{})
	}
}

func (s *server) answer(conn net.Conn, size int) bool {
	if size > smallText {
		s.big.Lock()
		defer s.big.Unlock()
		_ = conn.SetDeadline(time.Now().Add(bodyTimeout))
	}
	text := make([]byte, size)
	if _, err := io.ReadFull(conn, text); err != nil {
		return false
	}
	began := time.Now()
	raw, err := parse(string(text))
	s.nanos.Add(uint64(time.Since(began)))
	s.parsed.Add(1)
	_ = conn.SetDeadline(time.Now().Add(bodyTimeout))
	var complaint *SyntaxError
	switch {
	case err == nil:
		_, err = conn.Write(reply(kindTree, raw))
	case errors.As(err, &complaint):
		payload := binary.BigEndian.AppendUint32(nil, uint32(complaint.Position))
		payload = append(payload, complaint.Message[:min(len(complaint.Message), maxMessage)]...)
		_, err = conn.Write(reply(kindSyntax, payload))
	default:
		_, _ = conn.Write(reply(kindComplex, nil))
		if !errors.Is(err, errTooComplex) {
			s.end(err)
			return false
		}
		err = nil
	}
	return err == nil
}

func reply(kind byte, payload []byte) []byte {
	b := make([]byte, 5, 5+len(payload))
	b[0] = kind
	binary.BigEndian.PutUint32(b[1:], uint32(len(payload)))
	return append(b, payload...)
}

// SendFile sends one byte with a descriptor, which stays the caller's; nil sends
// the byte alone.
func SendFile(conn *net.UnixConn, b byte, f *os.File) error {
	var rights []byte
	if f != nil {
		rights = syscall.UnixRights(int(f.Fd()))
	}
	n, oob, err := conn.WriteMsgUnix([]byte{b}, rights, nil)
	if err == nil && (n != 1 || oob != len(rights)) {
		err = io.ErrShortWrite
	}
	return err
}

// ReceiveFile is the reverse of SendFile; the file is nil when none came with the
// byte. The caller closes it.
func ReceiveFile(conn *net.UnixConn) (*os.File, byte, error) {
	var (
		b   [1]byte
		oob [64]byte // room for one descriptor: more are cut off by the kernel
	)
	n, oobn, _, _, err := conn.ReadMsgUnix(b[:], oob[:syscall.CmsgSpace(4)])
	if err == nil && n == 0 {
		err = io.EOF
	}
	if err != nil {
		return nil, 0, err
	}
	messages, err := syscall.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return nil, 0, err
	}
	var f *os.File
	for _, m := range messages {
		fds, err := syscall.ParseUnixRights(&m)
		if err != nil {
			continue
		}
		for _, fd := range fds {
			syscall.CloseOnExec(fd)
			if f != nil {
				_ = syscall.Close(fd)
				continue
			}
			f = os.NewFile(uintptr(fd), "socket")
		}
	}
	return f, b[0], nil
}
