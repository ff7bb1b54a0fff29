package fdkeeper

import "syscall"

// newSession makes a process leave the keeper's session: no terminal's signal reaches it.
func newSession() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setsid: true} }
