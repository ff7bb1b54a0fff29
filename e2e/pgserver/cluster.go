package pgserver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// account is who runs the server; nil means ourselves.
type account struct {
	uid, gid int
}

// serverAccount is the user postgres when we are root, which PostgreSQL
// refuses to run as.
func serverAccount() (*account, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		return nil, errors.New("no user postgres on this machine: install the Debian package postgresql")
	}
	uid, err := strconv.Atoi(u.Uid)
	if err != nil {
		return nil, err
	}
	gid, err := strconv.Atoi(u.Gid)
	if err != nil {
		return nil, err
	}
	return &account{uid: uid, gid: gid}, nil
}

func (a *account) own(path string) error {
	if a == nil {
		return nil
	}
	return os.Lchown(path, a.uid, a.gid)
}

func (a *account) attributes(parentDeath syscall.Signal) *syscall.SysProcAttr {
	attributes := &syscall.SysProcAttr{Setpgid: true, Pdeathsig: parentDeath}
	if a != nil {
		attributes.Credential = &syscall.Credential{Uid: uint32(a.uid), Gid: uint32(a.gid)}
	}
	return attributes
}

// findBinaries returns the directory with the newest server's programs.
func findBinaries() (string, error) {
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
	best, bestVersion := "", -1.0
	for _, path := range found {
		dir := filepath.Dir(path)
		version, err := strconv.ParseFloat(filepath.Base(filepath.Dir(dir)), 64)
		if err == nil && version > bestVersion {
			best, bestVersion = dir, version
		}
	}
	if best != "" {
		return best, nil
	}
	if path, err := exec.LookPath("postgres"); err == nil {
		if real, err := filepath.EvalSymlinks(path); err == nil {
			return filepath.Dir(real), nil
		}
	}
	return "", errors.New("no PostgreSQL server on this machine (looked for /usr/lib/postgresql/*/bin/postgres): install the Debian package postgresql")
}

// newCluster fills dataDir with a new cluster and returns the superuser's
// password. initdb takes seconds, so its outcome is kept as a template for
// the next server of the same user and version.
func newCluster(ctx context.Context, bin string, who *account, dataDir string, noCache bool) (string, error) {
	if noCache {
		return initDB(ctx, bin, who, dataDir)
	}
	version, err := exec.CommandContext(ctx, filepath.Join(bin, "postgres"), "--version").Output()
	if err != nil {
		return "", fmt.Errorf("postgres --version: %w", err)
	}
	fields := strings.Fields(string(version))
	if len(fields) < 3 {
		return "", fmt.Errorf("postgres --version says %q", version)
	}
	template := filepath.Join(os.TempDir(), fmt.Sprintf("postern-pgtemplate-%d-%s", os.Geteuid(), fields[2]))
	if err := ensureTemplate(ctx, bin, who, template); err != nil {
		return "", err
	}
	password, err := os.ReadFile(filepath.Join(template, "password"))
	if err != nil {
		return "", err
	}
	out, err := exec.CommandContext(ctx, "cp", "-a", "--reflink=auto", filepath.Join(template, "data"), dataDir).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("copy %s: %w: %s", template, err, out)
	}
	return string(password), nil
}

// ensureTemplate makes the template unless it is there. A directory that is
// not ours alone is refused: /tmp is everybody's.
func ensureTemplate(ctx context.Context, bin string, who *account, template string) error {
	if ok, err := templateReady(template); ok || err != nil {
		return err
	}
	// One process runs initdb, the others wait for it: the machine is small.
	lock, err := os.OpenFile(template+".lock", os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = lock.Close() }()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return err
	}
	if ok, err := templateReady(template); ok || err != nil {
		return err
	}
	work, err := os.MkdirTemp(os.TempDir(), "postern-pginit-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(work) }()
	if err := who.own(work); err != nil {
		return err
	}
	password, err := initDB(ctx, bin, who, filepath.Join(work, "data"))
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(work, "password"), []byte(password), 0o600); err != nil {
		return err
	}
	if err := os.Chown(work, os.Geteuid(), os.Getegid()); err != nil {
		return err
	}
	return os.Rename(work, template)
}

func templateReady(template string) (bool, error) {
	info, err := os.Lstat(template)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !info.IsDir() || info.Mode().Perm() != 0o700 || !ok || int(stat.Uid) != os.Geteuid() {
		return false, fmt.Errorf("%s is not a directory of ours with mode 0700: remove it", template)
	}
	return true, nil
}

// initDB makes a cluster in dataDir, whose parent the server's account must be
// able to write to.
func initDB(ctx context.Context, bin string, who *account, dataDir string) (string, error) {
	password := randomPassword()
	pwfile := filepath.Join(filepath.Dir(dataDir), "pwfile")
	if err := os.WriteFile(pwfile, []byte(password), 0o600); err != nil {
		return "", err
	}
	defer func() { _ = os.Remove(pwfile) }()
	if err := who.own(pwfile); err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "initdb"), "-D", dataDir, "-U", Superuser,
		"--pwfile", pwfile, "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync", "--no-instructions")
	cmd.Dir = filepath.Dir(dataDir)
	cmd.Env = []string{"PATH=/usr/bin:/bin", "TZ=UTC"}
	cmd.SysProcAttr = who.attributes(syscall.SIGKILL)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("initdb: %w: %s", err, out)
	}
	return password, nil
}

// children returns the direct children of a process.
func children(pid int) []int {
	var pids []int
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, path := range tasks {
		text, _ := os.ReadFile(path)
		for _, field := range strings.Fields(string(text)) {
			if child, err := strconv.Atoi(field); err == nil {
				pids = append(pids, child)
			}
		}
	}
	return pids
}

// alive reports whether a process is there and not a zombie.
func alive(pid int) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(text), ") ") // behind the name
	return !strings.HasPrefix(rest, "Z") && !strings.HasPrefix(rest, "X")
}

// removeSharedMemory removes the System V segment that a killed server leaves
// behind; its id is the second number in line 7 of postmaster.pid.
func (s *Server) removeSharedMemory() {
	text, err := os.ReadFile(filepath.Join(s.dataDir(), "postmaster.pid"))
	if err != nil {
		return
	}
	lines := strings.Split(string(text), "\n")
	if len(lines) < 7 {
		return
	}
	fields := strings.Fields(lines[6])
	if len(fields) != 2 {
		return
	}
	if id, err := strconv.Atoi(fields[1]); err == nil {
		_, _, _ = unix.Syscall(unix.SYS_SHMCTL, uintptr(id), unix.IPC_RMID, uintptr(unsafe.Pointer(nil)))
	}
}
