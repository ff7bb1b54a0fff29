package packet

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// MaxMessage bounds a message, in bytes.
	MaxMessage = 128 << 10
	// MaxFiles bounds the descriptors of a message.
	MaxFiles = 4
)

// Send sends one message; the files stay the caller's.
func Send(c *net.UnixConn, message any, files ...*os.File) error {
	text, err := json.Marshal(message)
	if err != nil {
		return err
	}
	if len(text) > MaxMessage {
		return fmt.Errorf("a message of %d bytes, at most %d can be sent", len(text), MaxMessage)
	}
	var rights []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		rights = unix.UnixRights(fds...)
	}
	_, _, err = c.WriteMsgUnix(text, rights, nil)
	return err
}

// Receive reads one message into a pointer; the files are the caller's to close.
func Receive(c *net.UnixConn, message any) (files []*os.File, err error) {
	buf := make([]byte, MaxMessage)
	rights := make([]byte, unix.CmsgSpace(MaxFiles*4))
	n, oobn, flags, _, err := c.ReadMsgUnix(buf, rights)
	if err != nil {
		return nil, err
	}
	files, err = parseRights(rights[:oobn])
	switch {
	case err != nil:
	case n == 0:
		err = net.ErrClosed
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
		err = errors.New("a message that is too long")
	default:
		err = json.Unmarshal(buf[:n], message)
	}
	if err != nil {
		CloseAll(files)
		return nil, err
	}
	return files, nil
}

func parseRights(b []byte) (files []*os.File, err error) {
	controls, err := unix.ParseSocketControlMessage(b)
	if err != nil {
		return nil, err
	}
	for _, c := range controls {
		fds, err := unix.ParseUnixRights(&c)
		if err != nil {
			continue // no descriptors
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	return files, nil
}

// CloseAll closes files.
func CloseAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// inDir calls f with a short path to a file in dir: addresses of unix sockets have at
// most 107 bytes.
func inDir(dir, name string, f func(path string) error) error {
	if path := filepath.Join(dir, name); len(path) < 100 {
		return f(path)
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close() //nolint:errcheck // it was only looked through
	return f(fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), name))
}

// Listen makes a socket, for its owner alone; one that is there is replaced. The caller
// makes sure that nobody else listens.
func Listen(dir, name string) (l *net.UnixListener, err error) {
	err = inDir(dir, name, func(path string) error {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		l, err = net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
		if err != nil {
			return err
		}
		l.SetUnlinkOnClose(false) // its path may be of /proc/self/fd
		return os.Chmod(path, 0o600)
	})
	return l, err
}

// Peer is the process at the other end; an error if it is neither root's nor of this
// process's user.
func Peer(c *net.UnixConn) (*unix.Ucred, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var cerr error
	err = raw.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(err, cerr); err != nil {
		return nil, err
	}
	if cred.Uid != 0 && int(cred.Uid) != os.Geteuid() {
		return nil, fmt.Errorf("user %d is a stranger here", cred.Uid)
	}
	return cred, nil
}

// Conn asks questions, one at a time. It is safe for concurrent use.
type Conn struct {
	mu   sync.Mutex
	conn *net.UnixConn
}

// Dial reaches a socket. fs.ErrNotExist and ECONNREFUSED mean that nobody listens.
func Dial(dir, name string) (*Conn, error) {
	var conn *net.UnixConn
	err := inDir(dir, name, func(path string) (err error) {
		conn, err = net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
		return err
	})
	if err != nil {
		return nil, err
	}
	return &Conn{conn: conn}, nil
}

// Close ends the conversation; a question under way fails.
func (c *Conn) Close() error { return c.conn.Close() }

// Call sends a question with files and reads its answer into a pointer; the files that
// come are the caller's. After an error the conversation is over.
func (c *Conn) Call(until time.Time, question, answer any, files ...*os.File) ([]*os.File, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	err := c.conn.SetDeadline(until)
	if err == nil {
		err = Send(c.conn, question, files...)
	}
	var got []*os.File
	if err == nil {
		got, err = Receive(c.conn, answer)
	}
	if err != nil {
		// An answer that comes later would be taken for the next one's.
		return nil, errors.Join(err, c.conn.Close())
	}
	return got, nil
}
