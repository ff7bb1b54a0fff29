package confine

import "golang.org/x/sys/unix"

// forbiddenHere are the older forms that newer architectures don't have.
var forbiddenHere = []uint32{
	unix.SYS_CREAT, unix.SYS_UNLINK, unix.SYS_RENAME, unix.SYS_RENAMEAT, unix.SYS_LINK, unix.SYS_SYMLINK, unix.SYS_MKDIR, unix.SYS_RMDIR, unix.SYS_MKNOD,
	unix.SYS_CHMOD, unix.SYS_CHOWN, unix.SYS_LCHOWN, unix.SYS_FORK, unix.SYS_VFORK,
}

// filesHere is the older form of files.
var filesHere = []uint32{unix.SYS_OPEN}
