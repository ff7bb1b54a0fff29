package fuseserver

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Control is the kernel's list of FUSE connections, /sys/fs/fuse/connections, through a
// mount that nobody else sees: the host's own may be missing. It never speaks to a
// server, so it works while one hangs. It is safe for concurrent use.
type Control struct{ dir *os.File }

// ErrNoConnection is returned for a connection that has ended.
var ErrNoConnection = errors.New("no such FUSE connection")

// OpenControl needs CAP_SYS_ADMIN. The caller closes it.
func OpenControl() (*Control, error) {
	ctx, err := unix.Fsopen("fusectl", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("fsopen fusectl: %w", err)
	}
	defer unix.Close(ctx) //nolint:errcheck // nothing was written
	if err := unix.FsconfigCreate(ctx); err != nil {
		return nil, fmt.Errorf("fusectl: %w", err)
	}
	fd, err := unix.Fsmount(ctx, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("mount fusectl: %w", err)
	}
	return &Control{dir: os.NewFile(uintptr(fd), "fusectl")}, nil
}

// Close closes it.
func (c *Control) Close() error { return c.dir.Close() }

func (c *Control) open(minor uint32, name string, flags int) (*os.File, error) {
	fd, err := unix.Openat(int(c.dir.Fd()), strconv.FormatUint(uint64(minor), 10)+"/"+name, flags|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("connection %d: %w", minor, ErrNoConnection)
	}
	if err != nil {
		return nil, fmt.Errorf("connection %d: %w", minor, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// Waiting is the number of requests that are not answered yet, read by a server or not.
func (c *Control) Waiting(minor uint32) (int, error) {
	f, err := c.open(minor, "waiting", unix.O_RDONLY)
	if err != nil {
		return 0, err
	}
	defer f.Close() //nolint:errcheck // it was read
	text, err := io.ReadAll(io.LimitReader(f, 64))
	if err != nil {
		return 0, fmt.Errorf("connection %d: %w", minor, err)
	}
	return strconv.Atoi(strings.TrimSpace(string(text)))
}

// Abort ends a connection at once: every request, now and later, fails with ENOTCONN,
// and whoever waited wakes up. It is no error if it has ended already.
func (c *Control) Abort(minor uint32) error {
	f, err := c.open(minor, "abort", unix.O_WRONLY)
	if errors.Is(err, ErrNoConnection) {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = f.WriteString("1")
	return errors.Join(err, f.Close())
}
