package fuseserver

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// ErrNoPassthrough is returned when the kernel or the mount cannot read and write a file
// by itself: serve it by requests then.
var ErrNoPassthrough = errors.New("no FUSE passthrough here")

// Conn is what a file system may ask of the kernel. It is safe for concurrent use, also
// after the connection has ended. Its Notify methods may wait for locks that the kernel
// holds during requests on the same directory or file: never call them from a request's
// handler, nor with locks that handlers take.
type Conn struct {
	dev     *os.File
	raw     syscall.RawConn
	enabled bool // backings; written before the first request

	mu       sync.Mutex
	backings *backings
}

func newConn(dev *os.File, backings *backings) (*Conn, error) {
	raw, err := dev.SyscallConn()
	if err != nil {
		return nil, err
	}
	return &Conn{dev: dev, raw: raw, backings: backings}, nil
}

// write sends one message. It is atomic in the kernel.
func (c *Conn) write(message []byte) error {
	var err error
	if cerr := c.raw.Control(func(fd uintptr) {
		for {
			_, err = unix.Write(int(fd), message)
			if err != unix.EINTR {
				return
			}
		}
	}); cerr != nil {
		return unix.ENODEV // closed
	}
	return err
}

func (c *Conn) notify(message []byte) fuse.Status {
	return fuse.ToStatus(c.write(message))
}

// EntryNotify makes the kernel forget what a name stands for. ENOENT: it did not know.
func (c *Conn) EntryNotify(parent uint64, name string) fuse.Status {
	return c.notify(named(notification(notifyInvalEntry, parent), name))
}

// DeleteNotify tells the kernel that a name is gone, also to those that watch or are in
// the directory. ENOENT: it did not know.
func (c *Conn) DeleteNotify(parent, child uint64, name string) fuse.Status {
	return c.notify(named(notification(notifyDelete, parent, child), name))
}

// InodeNotify makes the kernel forget a node's attributes and, from off on, length bytes
// of its content; 0 means to the end, a negative off the attributes alone.
func (c *Conn) InodeNotify(node uint64, off, length int64) fuse.Status {
	return c.notify(notification(notifyInvalInode, node, uint64(off), uint64(length)))
}

// resend makes the kernel send again what was read and not answered.
func (c *Conn) resend() error {
	if err := c.write(notification(notifyResend)); err != nil {
		return fmt.Errorf("ask the kernel for lost requests: %w", err)
	}
	return nil
}

// Passthrough tells whether OpenBacking can work on this connection.
func (c *Conn) Passthrough() bool { return c.enabled }

// OpenBacking makes the kernel read and write file fd for node, and returns the id to
// answer OPEN or CREATE with (FOPEN_PASSTHROUGH, BackingID). All opens of a node share
// one backing: fd is used only for the first, and while any is open every one must be
// passed through to it. key names the open; use the request's unique without ResentBit,
// and keep it as the file handle: a request that is sent again then counts once, and again
// says that it was. It returns ErrNoPassthrough, or the kernel's errno.
func (c *Conn) OpenBacking(node, key uint64, fd int) (id int32, again bool, err error) {
	if !c.enabled {
		return 0, false, ErrNoPassthrough
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if id, ok := c.backings.id(node); ok {
		if c.backings.has(node, key) {
			return id, true, nil
		}
		return id, false, c.backings.add(node, key, id)
	}
	if id, err = c.ioctl(backingOpen, unsafe.Pointer(&fuse.BackingMap{Fd: int32(fd)})); err != nil {
		return 0, false, fmt.Errorf("register a backing file: %w", err)
	}
	if err := c.backings.add(node, key, id); err != nil {
		_, cerr := c.ioctl(backingClose, unsafe.Pointer(&id))
		return 0, false, errors.Join(err, cerr)
	}
	return id, false, nil
}

// CloseBacking ends an open, at RELEASE; the last one of a node ends its backing. An
// open that is not known is no error.
func (c *Conn) CloseBacking(node, key uint64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	id, last, err := c.backings.remove(node, key)
	if err != nil || !last {
		return err
	}
	if _, err := c.ioctl(backingClose, unsafe.Pointer(&id)); err != nil {
		return fmt.Errorf("release a backing file: %w", err)
	}
	return nil
}

// Backings tells the nodes that have a backing, with the number of their opens: after a
// takeover, those that the lives before have left.
func (c *Conn) Backings() map[uint64]int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.backings.counts()
}

func (c *Conn) ioctl(request uintptr, argument unsafe.Pointer) (int32, error) {
	var result uintptr
	var errno syscall.Errno
	if err := c.raw.Control(func(fd uintptr) {
		result, _, errno = unix.Syscall(unix.SYS_IOCTL, fd, request, uintptr(argument))
	}); err != nil {
		return 0, unix.ENODEV
	}
	if errno != 0 {
		return 0, errno
	}
	return int32(result), nil
}
