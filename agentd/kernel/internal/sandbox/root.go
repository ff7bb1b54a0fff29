package sandbox

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// The kernel's root directory is a small tmpfs that holds directories to mount
// on, device nodes, init and a few files of /etc; nothing of the host is in it
// but what is named here. It is made the same way for a start and a restore, so
// that CRIU need not carry it.

// shownDefault are the paths of the host that every kernel sees, if they are
// there: the system's programs, and what of /etc programs read that says nothing
// about the host. A directory in it shows no mount below it; findShown adds these.
var shownDefault = []string{
	"/usr", "/opt",
	"/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", // symbolic links nearly everywhere
	"/etc/ssl/certs", "/etc/ssl/openssl.cnf", "/etc/pki/tls", "/etc/pki/ca-trust", "/etc/ca-certificates", "/etc/crypto-policies",
	"/etc/alternatives", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/fonts",
	"/etc/python3", "/etc/jupyter", "/etc/ipython", "/etc/matplotlibrc", "/etc/R", "/etc/julia", "/etc/OpenCL",
	"/etc/mime.types", "/etc/magic", "/etc/inputrc", "/etc/terminfo", "/etc/gai.conf", "/etc/host.conf",
	"/etc/protocols", "/etc/services", "/etc/locale.alias", "/etc/localtime", "/etc/timezone", "/etc/os-release", "/etc/debian_version",
}

// copyLimit is the largest file that is copied instead of mounted, in bytes.
const copyLimit = 1 << 20

// rootSize bounds the root's tmpfs, in bytes: copied files, directories.
const rootSize = 32 << 20

// A mount is something of the host inside the kernel's tree. CRIU knows it by
// its key.
type mount struct {
	key      string
	outside  string
	inside   string
	readOnly bool
	file     bool // a file on a file
	exec     bool
	devices  bool
}

// findShown lists the paths of the host that the kernel sees read only: defaults,
// extra, and the mounts below them. Symbolic links and small files in it are
// copied, everything else is mounted.
func findShown(extra []string) ([]string, error) {
	var shown []string
	for _, path := range append(slices.Clone(shownDefault), extra...) {
		if _, err := os.Lstat(path); err != nil {
			if errors.Is(err, fs.ErrNotExist) && !slices.Contains(extra, path) {
				continue
			}
			return nil, fmt.Errorf("show %s to the kernel: %w", path, err)
		}
		if !below(path, shown) {
			shown = append(shown, path)
		}
	}
	mounts, err := mountPoints()
	if err != nil {
		return nil, err
	}
	for _, m := range mounts {
		if m.kind == "autofs" || strings.HasPrefix(m.kind, "fuse") || slices.Contains(shown, m.path) || taken(m.path) {
			continue
		}
		if below(m.path, shown) {
			shown = append(shown, m.path)
		}
	}
	slices.Sort(shown)
	return slices.Compact(shown), nil
}

// Showable reports whether kernels may see a path of the host: every kernel, or those
// to which extra is shown as well.
func Showable(path string, extra []string) bool {
	return cleanAbs(path) && !taken(path) && (below(path, shownDefault) || below(path, extra))
}

// below reports whether path is one of dirs or inside one.
func below(path string, dirs []string) bool {
	return slices.ContainsFunc(dirs, func(d string) bool { return path == d || strings.HasPrefix(path, d+"/") })
}

// treeMounts are all mounts from the host, in the order in which they are made.
// What the host lacks is an empty directory beneath at, the root's place on the host.
func (s *Spec) treeMounts(at string) ([]mount, error) {
	var mounts []mount
	for _, path := range s.Shown {
		m := mount{key: "host" + strings.ReplaceAll(path, "/", "-"), outside: path, inside: path, readOnly: true, exec: true}
		st, err := os.Lstat(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			m.outside = at + emptyInside
		case err != nil:
			return nil, fmt.Errorf("show %s to the kernel: %w", path, err)
		case copied(st):
			continue
		default:
			m.file = !st.IsDir()
		}
		mounts = append(mounts, m)
	}
	mounts = append(mounts,
		mount{key: "run", outside: s.RunDir, inside: RunInside},
		mount{key: "home", outside: filepath.Join(s.PrivateDir, "home"), inside: HomeInside, exec: true},
		mount{key: "tmp", outside: filepath.Join(s.PrivateDir, "tmp"), inside: TmpInside, exec: true},
		mount{key: "log", outside: s.LogFile, inside: logInside, file: true},
	)
	for i, b := range s.Binds {
		mounts = append(mounts, mount{key: b.key(i), outside: b.Source, inside: b.Target, readOnly: b.ReadOnly, exec: true})
	}
	return mounts, nil
}

func copied(st fs.FileInfo) bool {
	return st.Mode()&fs.ModeSymlink != 0 || st.Mode().IsRegular() && st.Size() <= copyLimit
}

// buildRoot mounts a fresh tmpfs on the directory at and fills it. It is still
// writable: sealRoot ends that. The mount propagates nowhere.
func (s *Spec) buildRoot(at string) error {
	if err := unix.Mount("kernel", at, "tmpfs", unix.MS_NOSUID|unix.MS_NOATIME, fmt.Sprintf("mode=0755,size=%d,nr_inodes=4096", rootSize)); err != nil {
		return fmt.Errorf("mount a root for the kernel on %s: %w", at, err)
	}
	if err := unix.Mount("", at, "", unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make %s private: %w", at, err)
	}
	old := unix.Umask(0o022)
	defer unix.Umask(old)
	for _, dir := range []string{"/proc", "/dev/shm", "/dev/pts", "/sys", "/run", "/var", "/etc", "/.postern", emptyInside, RunInside, HomeInside, TmpInside} {
		if err := os.MkdirAll(at+dir, 0o755); err != nil {
			return err
		}
	}
	program, err := initProgram()
	if err != nil {
		return err
	}
	files := []struct {
		path, text string
		mode       fs.FileMode
	}{
		{initInside, string(program), 0o555},
		{"/etc/passwd", fmt.Sprintf("root:x:0:0:root:/:/usr/sbin/nologin\n%s:x:%d:%d::%s:/bin/sh\nnobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n", userName, s.UID, s.GID, HomeInside), 0o444},
		{"/etc/group", fmt.Sprintf("root:x:0:\n%s:x:%d:\nnogroup:x:65534:\n", userName, s.GID), 0o444},
		{"/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n", 0o444},
		{"/etc/hosts", "127.0.0.1 localhost " + hostName + "\n::1 localhost " + hostName + "\n", 0o444},
		{"/etc/hostname", hostName + "\n", 0o444},
		{"/etc/resolv.conf", s.resolvConf(), 0o444},
	}
	for _, f := range files {
		if err := os.WriteFile(at+f.path, []byte(f.text), f.mode); err != nil {
			return err
		}
	}
	for link, target := range map[string]string{
		"/var/tmp": TmpInside, "/var/run": "/run", "/etc/mtab": "/proc/self/mounts",
		"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0", "/dev/stdout": "/proc/self/fd/1", "/dev/stderr": "/proc/self/fd/2",
		"/dev/ptmx": "pts/ptmx",
	} {
		if err := os.Symlink(target, at+link); err != nil {
			return err
		}
	}
	for name, minor := range map[string]uint32{"null": 3, "zero": 5, "full": 7, "random": 8, "urandom": 9} {
		if err := makeDevice(at+"/dev/"+name, 1, minor); err != nil {
			return err
		}
	}
	if err := makeDevice(at+"/dev/tty", 5, 0); err != nil {
		return err
	}
	if err := s.copyShown(at); err != nil {
		return err
	}
	mounts, err := s.treeMounts(at)
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if err := makeMountPoint(at, m, mounts); err != nil {
			return err
		}
	}
	return nil
}

// hostName is the kernel's idea of its host.
const hostName = "kernel"

func makeDevice(path string, major, minor uint32) error {
	if err := unix.Mknod(path, unix.S_IFCHR|0o666, int(unix.Mkdev(major, minor))); err != nil {
		return fmt.Errorf("make %s: %w", path, err)
	}
	return os.Chmod(path, 0o666)
}

// copyShown copies symbolic links and small files.
func (s *Spec) copyShown(at string) error {
	for _, path := range s.Shown {
		st, err := os.Lstat(path)
		if errors.Is(err, fs.ErrNotExist) || err == nil && !copied(st) {
			continue
		}
		if err == nil {
			err = copyOne(path, at+path, st)
		}
		if err != nil {
			return fmt.Errorf("show %s to the kernel: %w", path, err)
		}
	}
	return nil
}

func copyOne(from, to string, st fs.FileInfo) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	if st.Mode()&fs.ModeSymlink != 0 {
		target, err := os.Readlink(from)
		if err != nil {
			return err
		}
		return os.Symlink(target, to)
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close() //nolint:errcheck // it is only read
	data, err := io.ReadAll(io.LimitReader(in, copyLimit))
	if err != nil {
		return err
	}
	// Whoever may not read it on the host may not read it in the copy.
	return os.WriteFile(to, data, st.Mode().Perm()&0o555)
}

// makeMountPoint makes what a mount is put on, unless that lies in another mount.
func makeMountPoint(at string, m mount, all []mount) error {
	for _, other := range all {
		if other.inside != m.inside && below(m.inside, []string{other.inside}) {
			place := other.outside + strings.TrimPrefix(m.inside, other.inside)
			if _, err := os.Lstat(place); err != nil && !strings.HasPrefix(other.outside, at) {
				return fmt.Errorf("nothing to mount %s on: there is no %s on this host", m.inside, place)
			}
			return nil
		}
	}
	if !m.file {
		return os.MkdirAll(at+m.inside, 0o755)
	}
	if err := os.MkdirAll(filepath.Dir(at+m.inside), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(at+m.inside, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o444)
	if err != nil {
		return err
	}
	return f.Close()
}

// sealRoot makes the root read only.
func sealRoot(at string) error {
	if err := unix.Mount("", at, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NOATIME, ""); err != nil {
		return fmt.Errorf("make the kernel's root read only: %w", err)
	}
	return nil
}

// mountOn mounts m beneath at, never with set-user-id programs or devices.
func (m mount) mountOn(at string) error {
	target := at + m.inside
	if err := unix.Mount(m.outside, target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("show %s at %s: %w", m.outside, m.inside, err)
	}
	flags := uintptr(unix.MS_NOSUID)
	if !m.devices {
		flags |= unix.MS_NODEV
	}
	if m.readOnly {
		flags |= unix.MS_RDONLY
	}
	if !m.exec {
		flags |= unix.MS_NOEXEC
	}
	var st unix.Statfs_t
	if err := unix.Statfs(target, &st); err != nil {
		return fmt.Errorf("look at %s: %w", m.outside, err)
	}
	// What the host's mount refuses stays refused.
	for from, to := range map[int64]uintptr{unix.ST_RDONLY: unix.MS_RDONLY, unix.ST_NOEXEC: unix.MS_NOEXEC, unix.ST_NOATIME: unix.MS_NOATIME, unix.ST_NODIRATIME: unix.MS_NODIRATIME, unix.ST_RELATIME: unix.MS_RELATIME} {
		if st.Flags&from != 0 {
			flags |= to
		}
	}
	if err := unix.Mount("", target, "", unix.MS_REMOUNT|unix.MS_BIND|flags, ""); err != nil {
		return fmt.Errorf("restrict %s: %w", m.inside, err)
	}
	return unix.Mount("", target, "", unix.MS_PRIVATE, "")
}

type mountPoint struct{ path, kind string }

// mountPoints reads the mounts of this process's namespace.
func mountPoints() ([]mountPoint, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var found []mountPoint
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		dash := slices.Index(fields, "-")
		if dash < 5 || dash+1 >= len(fields) {
			continue
		}
		found = append(found, mountPoint{unescape(fields[4]), fields[dash+1]})
	}
	return found, nil
}

// unescape undoes the octal escapes of /proc/PID/mountinfo.
func unescape(s string) string {
	for _, r := range [][2]string{{`\040`, " "}, {`\011`, "\t"}, {`\012`, "\n"}, {`\134`, `\`}} {
		s = strings.ReplaceAll(s, r[0], r[1])
	}
	return s
}

// resolvConf is the kernel's /etc/resolv.conf.
func (s *Spec) resolvConf() string {
	if s.Network.Mode == NetworkNone {
		return "# this kernel has no network\n"
	}
	return "nameserver 127.0.0.53\noptions timeout:5 attempts:2\n"
}
