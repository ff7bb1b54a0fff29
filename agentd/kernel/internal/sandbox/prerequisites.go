package sandbox

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/postern-dev/postern/agentd/cgroup"

	"golang.org/x/sys/unix"
)

// Check is what Prerequisites says of one thing: OK, a lesser fault that costs a
// limit or a feature, or a fault without which no kernel starts.
type Check struct {
	Name       string
	OK, Lesser bool
	Message    string
	Remedy     string // empty when OK
}

// Needs are what Prerequisites looks for.
type Needs struct {
	// UIDBase and UIDs are the range of kernels' users.
	UIDBase, UIDs uint32
	// SpecDirs are the directories of kernelspecs, SPEC/kernel.json in each.
	SpecDirs []string
	// Visible are Spec.Visible of kernels.
	Visible []string
}

// neededCapabilities are what making a sandbox takes, beside being root.
var neededCapabilities = []struct {
	name string
	bit  int
}{
	{"CAP_SYS_ADMIN", unix.CAP_SYS_ADMIN},
	{"CAP_SETUID", unix.CAP_SETUID},
	{"CAP_SETGID", unix.CAP_SETGID},
	{"CAP_SETPCAP", unix.CAP_SETPCAP},
	{"CAP_CHOWN", unix.CAP_CHOWN},
	{"CAP_DAC_OVERRIDE", unix.CAP_DAC_OVERRIDE},
	{"CAP_FOWNER", unix.CAP_FOWNER},
	{"CAP_KILL", unix.CAP_KILL},
	{"CAP_MKNOD", unix.CAP_MKNOD},
	{"CAP_NET_ADMIN", unix.CAP_NET_ADMIN},
	{"CAP_NET_BIND_SERVICE", unix.CAP_NET_BIND_SERVICE},
	{"CAP_SYS_PTRACE", unix.CAP_SYS_PTRACE},
}

// Prerequisites tries what kernels need of this host, for agentd doctor: it starts
// sandboxes in a temporary directory and leaves nothing behind. The context bounds
// it. Names start with "kernels".
func Prerequisites(ctx context.Context, n Needs) []Check {
	if os.Geteuid() != 0 {
		return []Check{{Name: "kernels", Message: "not root: kernels can't be started", Remedy: "run agentd as root (its unit does)"}}
	}
	var all []Check
	fine := func(name, message string) { all = append(all, Check{Name: name, OK: true, Message: message}) }
	fault := func(name, message, remedy string) {
		all = append(all, Check{Name: name, Message: message, Remedy: remedy})
	}
	lesser := func(name, message, remedy string) {
		all = append(all, Check{Name: name, Lesser: true, Message: message, Remedy: remedy})
	}

	const users = "kernels: users"
	if missing := lackedCapabilities(); len(missing) > 0 {
		fault("kernels: capabilities", "this process lacks "+strings.Join(missing, ", "), "start agentd by the unit of its package, without agentd-sql-only.conf (docs/privileges.md); in a container give agentd the host's rights")
		return all
	}
	if user := accountIn("/etc/passwd", n.UIDBase, n.UIDs); user != "" {
		fault(users, fmt.Sprintf("user %s has one of the ids %d to %d, which kernels run as", user, n.UIDBase, n.UIDBase+n.UIDs-1), "set kernels.uid_base to a free range")
		return all
	}
	fine(users, fmt.Sprintf("kernels run as users %d to %d, each its own", n.UIDBase, n.UIDBase+n.UIDs-1))

	const box = "kernels: sandbox"
	if err := tryKernel(ctx, n, []string{"/bin/sh", "-c", "true"}); err != nil {
		fault(box, err.Error(), "the host needs namespaces (pid, mnt, net, ipc, uts), tmpfs, devpts and seccomp filters: see docs/kernels.md; in a container agentd needs the host's rights")
		return all
	}
	fine(box, "namespaces, root directory and seccomp filter work")
	for _, line := range coresTaken() {
		lesser(box, line, "start agentd by the unit of its package, without agentd-sql-only.conf (docs/privileges.md)")
	}
	if mode, err := statusField(os.Getpid(), "Seccomp:"); err == nil && len(mode) == 1 && mode[0] != 0 {
		lesser("kernels: checkpoints", "this process runs behind a seccomp filter, and behind one CRIU can save no kernel", "start agentd by the unit of its package, without agentd-sql-only.conf (docs/privileges.md)")
	}

	checkControllers(fine, lesser)
	checkFence(fine, lesser)
	checkSpecs(ctx, n, fine, lesser)
	return all
}

// tryKernel runs a program in a sandbox to its end.
func tryKernel(ctx context.Context, n Needs, argv []string) error {
	dir, err := os.MkdirTemp("", "agentd-doctor-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir) //nolint:errcheck // it is temporary
	spec := Spec{
		ID: filepath.Base(dir), UID: n.UIDBase + n.UIDs - 1, GID: n.UIDBase + n.UIDs - 1, Argv: argv, Visible: n.Visible,
		StateDir: dir, RunDir: filepath.Join(dir, "run"), PrivateDir: filepath.Join(dir, "private"), LogFile: filepath.Join(dir, "log"),
		Network: Network{Mode: NetworkNone},
	}
	s, err := Start(ctx, spec)
	if err != nil {
		return errors.Unwrap(err)
	}
	defer s.Close()
	exit, err := s.Wait(ctx)
	if err != nil {
		return errors.Join(err, s.Kill(context.WithoutCancel(ctx)))
	}
	if exit.Code != 0 {
		out, _ := os.ReadFile(spec.LogFile)
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		return fmt.Errorf("%s %s: %s", argv[0], exit.Reason, lines[len(lines)-1])
	}
	return nil
}

func lackedCapabilities() []string {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return []string{"any (" + err.Error() + ")"}
	}
	var missing []string
	for _, c := range neededCapabilities {
		if data[c.bit/32].Effective&(1<<(c.bit%32)) == 0 {
			missing = append(missing, c.name)
		}
	}
	return missing
}

// accountIn finds an account whose id is in the range.
func accountIn(passwd string, base, count uint32) string {
	f, err := os.Open(passwd)
	if err != nil {
		return ""
	}
	defer f.Close() //nolint:errcheck // it is only read
	for lines := bufio.NewScanner(f); lines.Scan(); {
		fields := strings.Split(lines.Text(), ":")
		if len(fields) < 3 {
			continue
		}
		if id, err := strconv.ParseUint(fields[2], 10, 32); err == nil && uint32(id) >= base && uint32(id)-base < count {
			return fields[0]
		}
	}
	return ""
}

// checkControllers makes a group with limits and says what holds.
func checkControllers(fine func(name, message string), lesser func(name, message, remedy string)) {
	const name = "kernels: limits"
	limits := cgroup.Limits{Memory: 1 << 30, CPU: 1, PIDs: 512}
	c, err := cgroup.Make(cgroup.Kernels, "doctor-"+strconv.Itoa(os.Getpid()), limits, false)
	if err != nil {
		lesser(name, err.Error(), "mount /proc and /sys/fs/cgroup for agentd")
		return
	}
	defer c.Remove()
	for _, line := range c.Lacks() {
		lesser(name, line, "turn the controller on (a systemd host with cgroup version 2 has it), or know that kernels can take all of it")
	}
	if len(c.Lacks()) > 0 {
		return
	}
	fine(name, "limited: "+strings.Join(c.Where(), ", "))
}

// checkFence sets up a fence of each kind in a namespace of its own.
func checkFence(fine func(name, message string), lesser func(name, message, remedy string)) {
	const name = "kernels: network"
	ns, err := newNetNS()
	if err == nil {
		defer ns.Close() //nolint:errcheck // the namespace ends with it
		var f *fence
		f, err = newFence(Network{Mode: NetworkAllowed, Allow: []string{"192.0.2.1:443", "[2001:db8::1]:443", "name.example:443"}}, ns)
		f.close()
		if err == nil {
			f, err = newFence(Network{Mode: NetworkOpen}, ns)
			f.close()
		}
	}
	if err != nil {
		lesser(name, err.Error(), "kernels can run with network: none; for others the system's kernel needs CONFIG_NF_TABLES, CONFIG_NFT_NAT and CONFIG_NFT_REDIR")
		return
	}
	fine(name, "kernels can be fenced: none, allowed and open")
}

// maxSpecs bounds how many kernelspecs are tried.
const maxSpecs = 16

// checkSpecs looks for kernelspecs and tries those of ipykernel.
func checkSpecs(ctx context.Context, n Needs, fine func(name, message string), lesser func(name, message, remedy string)) {
	const name = "kernels: kernelspecs"
	var files []string
	for _, dir := range n.SpecDirs {
		found, err := filepath.Glob(filepath.Join(dir, "*", "kernel.json"))
		if err == nil {
			files = append(files, found...)
		}
	}
	if len(files) == 0 {
		lesser(name, "there is none in "+strings.Join(n.SpecDirs, ", "), "install one: apt-get install python3-ipykernel, or say where they are with kernels.spec_dirs")
		return
	}
	for _, file := range files[:min(len(files), maxSpecs)] {
		spec := filepath.Base(filepath.Dir(file))
		argv, err := specArgv(file)
		if err == nil && slices.Contains(argv, "ipykernel_launcher") {
			err = tryKernel(ctx, n, []string{argv[0], "-c", "import ipykernel"})
		} else if err == nil {
			err = tryKernel(ctx, n, []string{"/bin/sh", "-c", `command -v -- "$0" >/dev/null || { echo "$0 is not there"; exit 1; }`, argv[0]})
		}
		if err != nil {
			lesser(name, fmt.Sprintf("%s (%s): %v", spec, file, err), "install what it needs below /usr or /opt, or make its place visible")
			continue
		}
		fine(name, fmt.Sprintf("%s (%s) can start in the sandbox", spec, file))
	}
}

// maxSpecFile bounds a kernel.json, in bytes.
const maxSpecFile = 1 << 20

func specArgv(file string) ([]string, error) {
	st, err := os.Stat(file)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > maxSpecFile {
		return nil, fs.ErrInvalid
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var spec struct {
		Argv []string `json:"argv"`
	}
	if err := json.Unmarshal(data, &spec); err != nil {
		return nil, err
	}
	if len(spec.Argv) == 0 || spec.Argv[0] == "" {
		return nil, errors.New("argv is empty")
	}
	return spec.Argv, nil
}
