package fuseserver

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Subtype is what /proc/mounts shows of our mounts: fuse.postern.
const Subtype = "postern"

// MountConfig is what the kernel is told when a superblock is made. The zero value is
// a file system for root alone, without permission checks of the kernel's.
type MountConfig struct {
	// Source and Subtype are shown in /proc/mounts: "SOURCE / fuse.SUBTYPE".
	Source, Subtype string
	// AllowOther lets every user in; without it only root.
	AllowOther bool
	// DefaultPermissions makes the kernel check modes and owners.
	DefaultPermissions bool
	// ReadOnly makes the superblock read-only.
	ReadOnly bool
	// MaxRead is the largest READ in bytes; 0: the kernel's own limit.
	MaxRead int
}

// Mounted is a new superblock: nothing of it is to be seen anywhere until its tree is
// moved somewhere. The caller owns both files.
type Mounted struct {
	// Dev is the connection's descriptor; the connection ends with its last copy.
	Dev *os.File
	// Tree is a detached mount of its root.
	Tree *os.File
	// Minor is the connection's number.
	Minor uint32
}

// Close closes both files; without copies elsewhere the connection ends.
func (m *Mounted) Close() error { return errors.Join(m.Tree.Close(), m.Dev.Close()) }

// NewMount opens /dev/fuse and makes a superblock on it, nosuid and nodev. It needs
// CAP_SYS_ADMIN. It sends nothing to the file system: the INIT request waits in Dev.
func NewMount(c MountConfig) (*Mounted, error) {
	// Not by os.OpenFile, which would make it non-blocking.
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/fuse: %w", err)
	}
	dev := os.NewFile(uintptr(fd), "/dev/fuse")
	tree, minor, err := makeTree(fd, c)
	if err != nil {
		return nil, errors.Join(err, dev.Close())
	}
	return &Mounted{Dev: dev, Tree: tree, Minor: minor}, nil
}

func makeTree(dev int, c MountConfig) (*os.File, uint32, error) {
	ctx, err := unix.Fsopen("fuse", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, 0, fmt.Errorf("fsopen fuse: %w", err)
	}
	defer unix.Close(ctx) //nolint:errcheck // nothing was written
	set := func(key, value string) {
		if err == nil {
			if err = unix.FsconfigSetString(ctx, key, value); err != nil {
				err = fmt.Errorf("mount option %s=%s: %w%s", key, value, err, mountLog(ctx))
			}
		}
	}
	flag := func(key string, on bool) {
		if err == nil && on {
			if err = unix.FsconfigSetFlag(ctx, key); err != nil {
				err = fmt.Errorf("mount option %s: %w%s", key, err, mountLog(ctx))
			}
		}
	}
	set("source", orDefault(c.Source, "postern"))
	set("subtype", orDefault(c.Subtype, Subtype))
	set("fd", strconv.Itoa(dev))
	set("rootmode", "40000")
	set("user_id", "0")
	set("group_id", "0")
	if c.MaxRead > 0 {
		set("max_read", strconv.Itoa(c.MaxRead))
	}
	flag("allow_other", c.AllowOther)
	flag("default_permissions", c.DefaultPermissions)
	flag("ro", c.ReadOnly)
	if err != nil {
		return nil, 0, err
	}
	if err := unix.FsconfigCreate(ctx); err != nil {
		return nil, 0, fmt.Errorf("make the superblock: %w%s", err, mountLog(ctx))
	}
	attributes := unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV
	if c.ReadOnly {
		attributes |= unix.MOUNT_ATTR_RDONLY
	}
	fd, err := unix.Fsmount(ctx, unix.FSMOUNT_CLOEXEC, attributes)
	if err != nil {
		return nil, 0, fmt.Errorf("fsmount: %w%s", err, mountLog(ctx))
	}
	tree := os.NewFile(uintptr(fd), "fuse tree")
	// AT_STATX_DONT_SYNC asks the kernel alone: nobody serves yet.
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, 0, &st); err != nil {
		return nil, 0, errors.Join(fmt.Errorf("find the connection's number: %w", err), tree.Close())
	}
	return tree, st.Dev_minor, nil
}

// mountLog is what the kernel says about the failure, with a leading ": ".
func mountLog(ctx int) string {
	buf := make([]byte, 1024)
	var lines []string
	for range 8 {
		n, err := unix.Read(ctx, buf)
		if err != nil || n <= 0 {
			break
		}
		lines = append(lines, strings.TrimSpace(string(buf[:n])))
	}
	if len(lines) == 0 {
		return ""
	}
	return ": " + strings.Join(lines, "; ")
}

func orDefault(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}
