package runsock

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// Listen listens on a socket in a directory that belongs to a user, for that user
// alone. Nothing that the user puts in the socket's place is followed or changed. Close
// leaves the file: see Remove.
func Listen(dir, name string, uid uint32) (*net.UnixListener, error) {
	// Through the directory's descriptor: the path may be longer than a socket's may be.
	at, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", dir, err)
	}
	defer unix.Close(at) //nolint:errcheck // it was only looked at
	if err := unix.Unlinkat(at, name, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("%s: remove the old %s: %w", dir, name, err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: fmt.Sprintf("/proc/self/fd/%d/%s", at, name), Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", dir, err)
	}
	// The directory's descriptor is not kept; the next Listen removes the file.
	l.SetUnlinkOnClose(false)
	if err := give(at, name, uid); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", dir, err), l.Close())
	}
	return l, nil
}

// Remove removes a socket that nobody listens on any more, whatever it is by now; it may
// be gone.
func Remove(dir, name string) error {
	at, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	defer unix.Close(at) //nolint:errcheck // it was only looked at
	if err := unix.Unlinkat(at, name, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("%s: remove %s: %w", dir, name, err)
	}
	return nil
}

// give makes the socket a user's, if it is a socket still.
func give(at int, name string, uid uint32) error {
	fd, err := unix.Openat(at, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd) //nolint:errcheck // it was only looked at
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK || st.Uid != uint32(os.Geteuid()) || st.Nlink != 1 {
		return fmt.Errorf("%s was put in another's place", name)
	}
	if os.Geteuid() != 0 {
		return nil
	}
	if err := unix.Fchownat(fd, "", int(uid), int(uid), unix.AT_EMPTY_PATH); err != nil {
		return err
	}
	return os.Chmod(fmt.Sprintf("/proc/self/fd/%d", fd), 0o600)
}

// PeerUID is whose process is at the other end.
func PeerUID(conn *net.UnixConn) (uint32, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var failed error
	if err := raw.Control(func(fd uintptr) { cred, failed = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return 0, err
	}
	if failed != nil {
		return 0, failed
	}
	return cred.Uid, nil
}
