package sandbox

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A kernel's network namespace is made by the starter and held by a descriptor,
// not by the tree: CRIU then leaves it alone (it is external to the images), no
// tool of iproute2 or nftables is needed at a dump or a restore, and a restored
// kernel gets a fresh one of the same shape.

// newNetNS makes a network namespace whose loopback device is up.
func newNetNS() (*os.File, error) {
	var f *os.File
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make a network namespace: %w", err)
		}
		if err := loopbackUp(); err != nil {
			return err
		}
		var err error
		f, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	return f, err
}

// inNetNS runs do on a thread in the namespace. Sockets made there belong to it;
// goroutines that do starts are not in it.
func inNetNS(ns *os.File, do func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter the kernel's network namespace: %w", err)
		}
		return do()
	})
}

// onThread runs do on a thread of its own, which ends afterwards. It waits.
func onThread(do func() error) error {
	result := make(chan error, 1)
	var run func()
	run = func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The main thread can't end. Hold it while another one works.
			done := make(chan struct{})
			go func() {
				defer close(done)
				run()
			}()
			<-done
			runtime.UnlockOSThread()
			return
		}
		// Not unlocked: the thread ends with the goroutine, and what was changed
		// about it with it.
		finished := false
		defer func() {
			if !finished {
				result <- errors.New("the function left its thread")
			}
		}()
		err := do()
		finished = true
		result <- err
	}
	go run()
	return <-result
}

// loopbackUp takes up lo in the calling thread's namespace.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd) //nolint:errcheck // nothing was written
	var req struct {
		name  [unix.IFNAMSIZ]byte
		flags uint16
		_     [22]byte
	}
	copy(req.name[:], "lo")
	req.flags = unix.IFF_UP | unix.IFF_RUNNING
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCSIFFLAGS, uintptr(unsafe.Pointer(&req))); errno != 0 {
		return fmt.Errorf("take up the kernel's loopback device: %w", errno)
	}
	return nil
}

// netNSInode is the number in net:[NUMBER].
func netNSInode(f *os.File) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return 0, err
	}
	return st.Ino, nil
}
