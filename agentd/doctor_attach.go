package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/attach/fuseserver"
	"github.com/postern-dev/postern/agentd/config"
	"github.com/postern-dev/postern/agentd/control"
	"github.com/postern-dev/postern/agentd/doctor"
)

// examineAttachments says whether workspaces can be mounted here; only where the
// configuration asks for mounts a fault fails the whole. It leaves nothing behind: the
// superblock that it makes is seen by nobody and ends with it.
func examineAttachments(r *doctor.Report, c *config.Config, status control.Status, running bool) {
	bad := doctor.Warning
	if c.Attachments.Enabled {
		bad = doctor.Failed
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		remedy := "load the module: modprobe fuse"
		if !errors.Is(err, fs.ErrNotExist) {
			remedy = ""
		}
		r.Add("fuse", bad, err.Error(), remedy)
		return
	}
	if os.Geteuid() != 0 {
		r.Add("fuse", doctor.Warning, "only root can see whether workspaces can be mounted", "run it with sudo")
		return
	}
	m, err := fuseserver.NewMount(fuseserver.MountConfig{AllowOther: true})
	if err != nil {
		r.Add("fuse", bad, err.Error(), "agentd's mounts need CAP_SYS_ADMIN and Linux 5.12 or newer; in a container /dev/fuse must be let in")
		return
	}
	if err := m.Close(); err != nil {
		r.Add("fuse", bad, err.Error(), "")
		return
	}
	r.Add("fuse", doctor.OK, "workspaces can be mounted", "")
	control, err := fuseserver.OpenControl()
	if err == nil {
		err = control.Close()
	}
	if err != nil {
		r.Add("fuse watchdog", bad, err.Error(), "the kernel's fusectl file system is needed to end mounts that nobody serves")
	} else {
		r.Add("fuse watchdog", doctor.OK, "mounts that nobody serves can be ended", "")
	}
	examinePassthrough(r)
	for _, root := range c.Attachments.HostMounts {
		if st, err := os.Stat(root); err != nil || !st.IsDir() {
			r.Add("host mounts", doctor.Warning, fmt.Sprintf("%s is no directory", root), "make it, or take it out of attachments.host_mounts")
		}
	}
	if !running || !c.Attachments.Enabled {
		return
	}
	a := status.Attachments
	switch {
	case a.Error != "":
		r.Add("mounts", doctor.Failed, a.Error, "with systemd: systemctl enable --now agentd-mountd; see "+filepath.Join("STATE", attachDir, attachLog))
	case !a.Enabled:
		r.Add("mounts", doctor.Warning, "the running agentd does not know of attachments yet", "run systemctl reload agentd")
	default:
		r.Add("mounts", doctor.OK, fmt.Sprintf("mountd runs, pid %d, %d workspaces", a.PID, len(a.Workspaces)), "")
	}
}

// examinePassthrough tells whether the kernel reads and writes files of mounts by itself.
func examinePassthrough(r *doctor.Report) {
	var u unix.Utsname
	var major, minor int
	if err := unix.Uname(&u); err == nil {
		_, _ = fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor)
	}
	if major > 6 || major == 6 && minor >= 9 {
		r.Add("fuse passthrough", doctor.OK, "files that are on the host are as fast as its own", "")
		return
	}
	r.Add("fuse passthrough", doctor.Warning, fmt.Sprintf("Linux %d.%d has none: files of mounts are read and written through mountd", major, minor), "use Linux 6.9 or newer")
}
