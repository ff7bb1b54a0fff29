package lazy

import (
	"encoding/binary"
	"errors"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctls of userfaultfd(2): linux/userfaultfd.h.
const (
	uffdAPI  = 0xc018aa3f
	uffdCopy = 0xc028aa03
	uffdZero = 0xc020aa04
	uffdWake = 0x8010aa02

	apiVersion = 0xaa
)

// Events that CRIU asks for: fork, remap, remove and unmap, besides faults.
const (
	eventFault  = 0x12
	eventFork   = 0x13
	eventRemap  = 0x14
	eventRemove = 0x15
	eventUnmap  = 0x16

	features = 1<<1 | 1<<2 | 1<<3 | 1<<6
)

const msgLen = 32

// lastPages is an address that can be mapped, and that Linux maps nothing at by itself: 64 KiB
// below the end of x86's user space.
const lastPages = 0x7fffffff0000

// event is a uffd_msg: for a fault a is the address, for a fork the new descriptor, for a
// remap from, to and length, else start and end.
type event struct {
	kind    byte
	a, b, c uint64
}

func parse(b []byte) event {
	e := event{kind: b[0], a: binary.NativeEndian.Uint64(b[8:]), b: binary.NativeEndian.Uint64(b[16:]), c: binary.NativeEndian.Uint64(b[24:])}
	switch e.kind {
	case eventFault:
		e.a = e.b
	case eventFork:
		e.a = uint64(binary.NativeEndian.Uint32(b[8:]))
	}
	return e
}

func ioctl(fd int, request uintptr, arg unsafe.Pointer) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg))
	if errno != 0 {
		return errno
	}
	return nil
}

// copyPages puts from at to. n is how much of it came, also with an error.
func copyPages(fd int, to uint64, from []byte) (n int, err error) {
	arg := struct {
		dst, src, length, mode uint64
		copied                 int64
	}{dst: to, src: uint64(uintptr(unsafe.Pointer(&from[0]))), length: uint64(len(from))}
	err = ioctl(fd, uffdCopy, unsafe.Pointer(&arg))
	return int(max(arg.copied, 0)), err
}

// zeroPages puts zeros at to.
func zeroPages(fd int, to, length uint64) error {
	arg := struct {
		start, length, mode uint64
		zeroed              int64
	}{start: to, length: length}
	return ioctl(fd, uffdZero, unsafe.Pointer(&arg))
}

// wake has threads that wait for memory look again.
func wake(fd int, start, length uint64) {
	arg := struct{ start, length uint64 }{start, length}
	_ = ioctl(fd, uffdWake, unsafe.Pointer(&arg))
}

// Available reports why this host has no userfaultfd that does; nil: it has.
func Available() error {
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0)
	if errno != 0 {
		return errno
	}
	defer unix.Close(int(fd)) //nolint:errcheck // nothing is registered with it
	arg := struct{ api, features, ioctls uint64 }{api: apiVersion, features: features}
	if err := ioctl(int(fd), uffdAPI, unsafe.Pointer(&arg)); err != nil {
		return errors.New("it tells nothing of forks and unmapped memory, or lets nobody know: " + err.Error())
	}
	return nil
}
