package sandbox

import "golang.org/x/sys/unix"

// refusedHere are old calls of this architecture.
var refusedHere = []uintptr{unix.SYS_MODIFY_LDT, unix.SYS_IOPERM, unix.SYS_IOPL, unix.SYS_USELIB, unix.SYS_USTAT, unix.SYS_SYSFS}
