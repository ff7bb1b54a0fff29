package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/e2e/freeport"
)

// errNoSSHFS is returned where the programs are not installed.
var errNoSSHFS = errors.New("there is no sshfs, sftp-server, ssh or sshd: run packaging/dev/deps.sh sshfs")

// sshfs is a directory of this disk mounted by sshfs.
type sshfs struct {
	mount  string
	client *exec.Cmd
	server *exec.Cmd
	logs   [2]bytes.Buffer // the client's and the server's
}

// startSSHFSOnPipes mounts by an sftp-server beside sshfs, with no ssh between them: no network,
// no encryption, and two processes less.
func startSSHFSOnPipes(ctx context.Context, below string) (*sshfs, error) {
	program, err := exec.LookPath("sshfs")
	const server = "/usr/lib/openssh/sftp-server"
	if _, serr := os.Stat(server); err != nil || serr != nil {
		return nil, errNoSSHFS
	}
	x := &sshfs{mount: filepath.Join(below, "sshfs-pipes-mount")}
	dir := filepath.Join(below, "sshfs-pipes-files")
	if err := errors.Join(os.Mkdir(dir, 0o755), os.Mkdir(x.mount, 0o755)); err != nil {
		return nil, err
	}
	fromServer, toClient, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	fromClient, toServer, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, fromServer.Close(), toClient.Close())
	}
	defer func() { // the programs have theirs
		_ = errors.Join(fromServer.Close(), toClient.Close(), fromClient.Close(), toServer.Close())
	}()
	x.server = exec.Command(server)
	x.server.Stdin, x.server.Stdout = fromClient, toClient
	x.client = exec.Command(program, "-f", "-o", "passive", "bench:"+dir, x.mount)
	x.client.Stdin, x.client.Stdout = fromServer, toServer
	return x, x.begin(ctx)
}

// sshdScript runs sshd with accounts of its own, in a mount namespace: it insists on one to
// drop privileges to. $1 is a directory, $2 sshd.
const sshdScript = `set -e
mount --make-rprivate /
mount --bind "$1/passwd" /etc/passwd
mount --bind "$1/shadow" /etc/shadow
mount -t tmpfs tmpfs /run
mkdir -m 755 /run/sshd
exec "$2" -D -e -f "$1/sshd_config"`

// startSSHFS mounts by ssh and sshd on loopback, both as they come.
func (b *filesBench) startSSHFS(ctx context.Context, below string) (*sshfs, error) {
	program, err := exec.LookPath("sshfs")
	if err != nil {
		return nil, errNoSSHFS
	}
	sshd := ""
	for _, path := range []string{"/usr/sbin/sshd", filepath.Join(b.bin, "openssh/usr/sbin/sshd")} {
		if _, err := os.Stat(path); err == nil && sshd == "" {
			sshd = path
		}
	}
	if _, err := exec.LookPath("ssh"); err != nil || sshd == "" {
		return nil, errNoSSHFS
	}
	if sshd, err = filepath.Abs(sshd); err != nil { // sshd starts itself again
		return nil, err
	}
	dir := filepath.Join(below, "sshfs")
	files := filepath.Join(dir, "files")
	x := &sshfs{mount: filepath.Join(dir, "mount")}
	if err := errors.Join(os.Mkdir(dir, 0o700), os.Mkdir(files, 0o755), os.Mkdir(x.mount, 0o755)); err != nil {
		return nil, err
	}
	for _, key := range []string{"host", "user"} {
		if out, err := exec.CommandContext(ctx, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(dir, key)).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("ssh-keygen: %w: %s", err, bytes.TrimSpace(out))
		}
	}
	address, err := freeport.Address()
	if err != nil {
		return nil, err
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	config := []string{
		"ListenAddress " + host, "Port " + port, "HostKey " + dir + "/host", "AuthorizedKeysFile " + dir + "/user.pub", "StrictModes no", "UsePAM no", "PidFile none",
		"PermitRootLogin prohibit-password", "PasswordAuthentication no", "Subsystem sftp internal-sftp", "ForceCommand internal-sftp", "LogLevel ERROR",
	}
	for name, text := range map[string]string{
		"sshd_config": strings.Join(config, "\n"),
		"passwd":      "root:x:0:0:root:/:/bin/sh\nsshd:x:65533:65534::/run/sshd:/usr/sbin/nologin",
		"shadow":      "root:*:1::::::\nsshd:*:1::::::",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text+"\n"), 0o600); err != nil {
			return nil, err
		}
	}
	if err := os.Chmod(filepath.Join(dir, "passwd"), 0o644); err != nil {
		return nil, err
	}
	x.server = exec.Command("/bin/sh", "-c", sshdScript, "sh", dir, sshd)
	x.server.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	command := "ssh -F none -p " + port + " -i " + dir + "/user -o IdentitiesOnly=yes -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -o ConnectionAttempts=10"
	x.client = exec.Command(program, "-f", "-o", "ssh_command="+command, "root@"+host+":"+files, x.mount)
	return x, x.begin(ctx)
}

// begin starts both programs and waits for the mount; it ends both if there is none.
func (x *sshfs) begin(ctx context.Context) error {
	x.client.Stderr, x.server.Stderr = &x.logs[0], &x.logs[1]
	if err := x.server.Start(); err != nil {
		return err
	}
	if err := x.client.Start(); err != nil {
		_ = x.server.Process.Kill()
		_ = x.server.Wait()
		return err
	}
	for until := time.Now().Add(30 * time.Second); !mounted(x.mount); time.Sleep(20 * time.Millisecond) {
		if ctx.Err() != nil || time.Now().After(until) {
			x.end()
			return fmt.Errorf("sshfs has mounted nothing within 30 s: %s %s", strings.TrimSpace(x.logs[0].String()), strings.TrimSpace(x.logs[1].String()))
		}
	}
	return nil
}

// end unmounts and waits for both programs.
func (x *sshfs) end() {
	if mounted(x.mount) {
		_ = unix.Unmount(x.mount, unix.MNT_DETACH)
	}
	for _, cmd := range []*exec.Cmd{x.client, x.server} {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
}
