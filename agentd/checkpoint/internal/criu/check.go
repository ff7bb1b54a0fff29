package criu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/checkpoint/internal/lazy"
)

// Grade is how grave a finding is.
type Grade int

// The grades: all is well; slower or less; checkpoints can't be made.
const (
	Fine Grade = iota
	Lesser
	Broken
)

// Finding is one line about this host.
type Finding struct {
	Name    string
	Grade   Grade
	Message string
	// Remedy is what to do; empty when all is well.
	Remedy string
}

const checkTimeout = 20 * time.Second

// Examine says what of checkpoints works on this host. It changes nothing. configured is
// the path of CRIU by the configuration, or empty; self as in Driver.
func Examine(ctx context.Context, configured, self string) []Finding {
	path, err := Find(configured)
	if err != nil {
		return []Finding{{"criu", Broken, "no CRIU: checkpoints, suspend, rollback and fork don't work; kernels do", err.Error()}}
	}
	var all []Finding
	add := func(name string, g Grade, message, remedy string) {
		all = append(all, Finding{name, g, message, remedy})
	}
	d := &Driver{Path: path, Self: self}
	ctx, cancel := context.WithTimeout(ctx, 2*checkTimeout)
	defer cancel()
	version, err := d.Version(ctx)
	switch {
	case err != nil:
		add("criu", Broken, path+" can't be driven: "+err.Error(), "run "+path+" check")
		return all
	case version < Minimum:
		add("criu", Lesser, fmt.Sprintf("%s is version %s: on Linux 6.16 and later it can't save TCP sockets, which every kernel has", path, VersionString(version)),
			"install CRIU "+VersionString(Minimum)+" or newer (packaging/dev/criu.sh does it on Debian)")
	default:
		add("criu", Fine, fmt.Sprintf("%s, version %s", path, VersionString(version)), "")
	}
	if lines, err := run(ctx, path, "check"); err != nil {
		add("criu check", Broken, "this system's kernel lacks something: "+lines, "run "+path+" check, and see CRIU's documentation for what it names")
	} else {
		add("criu check", Fine, "this system's kernel has what CRIU needs", "")
	}
	if missing := missingCapabilities(); missing != "" {
		add("criu capabilities", Broken, "agentd lacks "+missing+": kernels of another user can't be saved", "give agentd these capabilities (root on a normal host has them; CAP_SYS_RESOURCE is often missing in containers)")
	} else {
		add("criu capabilities", Fine, "agentd may save processes of other users", "")
	}
	if _, err := run(ctx, path, "check", "--feature", "mem_dirty_track"); err != nil {
		add("criu incremental", Lesser, "no soft-dirty memory tracking: every checkpoint copies all memory while the kernel stands still, and only the store saves the difference", "use a Linux kernel with CONFIG_MEM_SOFT_DIRTY, if the standstill is too long")
	} else {
		add("criu incremental", Fine, "memory changes are tracked by this system's kernel", "")
	}
	if err := lazy.Available(); err != nil {
		add("criu lazy restore", Lesser, "no userfaultfd ("+err.Error()+"): restores copy everything first", "use a Linux kernel with CONFIG_USERFAULTFD")
	} else {
		add("criu lazy restore", Fine, "userfaultfd is there: large kernels run before all of their memory is back", "")
	}
	all = append(all, kerndat("/run"))
	return all
}

// run runs CRIU and returns its first error, or last line, as one line.
func run(ctx context.Context, path string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	var out limited
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Stdout, cmd.Stderr, cmd.Dir = &out, &out, "/"
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	if err == nil {
		return "", nil
	}
	if ctx.Err() != nil {
		return "no answer in time", err
	}
	if lines := scanErrors(&out.buf); len(lines) > 0 {
		return lines[0], err
	}
	return err.Error(), err
}

// needed are the capabilities of a dump and a restore, by their numbers' names.
var needed = []struct {
	bit  int
	name string
}{
	{unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN"},
	{unix.CAP_SYS_PTRACE, "CAP_SYS_PTRACE"},
	{unix.CAP_SYS_RESOURCE, "CAP_SYS_RESOURCE"},
	{unix.CAP_NET_ADMIN, "CAP_NET_ADMIN"},
	{unix.CAP_SETUID, "CAP_SETUID"},
	{unix.CAP_SETGID, "CAP_SETGID"},
	{unix.CAP_DAC_OVERRIDE, "CAP_DAC_OVERRIDE"},
	{unix.CAP_CHOWN, "CAP_CHOWN"},
	{unix.CAP_KILL, "CAP_KILL"},
	{unix.CAP_SYS_TIME, "CAP_SYS_TIME"}, // clocks of a restored time namespace
}

// missingCapabilities names the needed capabilities that this process has not; CAP_SYS_RESOURCE
// counts, since CRIU reads other users' limits with it.
func missingCapabilities() string {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return "its capabilities (" + err.Error() + ")"
	}
	missing := ""
	for _, c := range needed {
		if data[c.bit/32].Effective&(1<<(c.bit%32)) == 0 {
			if missing != "" {
				missing += ", "
			}
			missing += c.name
		}
	}
	return missing
}

// Missing returns one line about capabilities that a dump needs and this process has
// not; "" if none, or if a test's library stands in.
func (d *Driver) Missing() string {
	if d.preload() != "" {
		return ""
	}
	if m := missingCapabilities(); m != "" {
		return "agentd lacks " + m + ", which CRIU needs to save another user's process"
	}
	return ""
}

// kerndat looks at CRIU's cache of what the system's kernel can: CRIU keeps it in /run,
// and only where that is a tmpfs, since it must not outlive a boot.
func kerndat(run string) Finding {
	const name = "criu cache"
	var fs unix.Statfs_t
	switch err := unix.Statfs(run, &fs); {
	case err != nil:
		return Finding{name, Lesser, err.Error(), "make " + run + " a tmpfs"}
	case fs.Type != unix.TMPFS_MAGIC:
		return Finding{name, Lesser, run + " is no tmpfs: CRIU looks anew at the system at each call, which costs 0.1 s and more", "mount a tmpfs at " + run + ", as systemd does"}
	}
	if st, err := os.Lstat(run + "/criu.kdat.tmp"); err == nil && time.Since(st.ModTime()) > time.Minute {
		return Finding{name, Lesser, run + "/criu.kdat.tmp is left over from a crash: CRIU doesn't keep its cache beside it", "remove it"}
	} else if err != nil && !errors.Is(err, os.ErrNotExist) {
		return Finding{name, Lesser, err.Error(), ""}
	}
	return Finding{name, Fine, "CRIU may keep what it learned of this system until the next boot", ""}
}
