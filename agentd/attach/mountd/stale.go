package mountd

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/attach/fuseserver"
)

// targetsFile lists the host's directories that were mounted on, so that a later life can
// take away mounts whose connection has ended: whoever looks there gets ENOTCONN.
const targetsFile = "targets.json"

const hostHolder = "host:"

// targets are the directories of the host that are mounted on now.
func (d *Daemon) targets() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := []string{}
	for _, o := range d.open {
		for _, s := range o.supers {
			for _, h := range s.state.Holders {
				if dir, ok := strings.CutPrefix(h.Name, hostHolder); ok {
					out = append(out, dir)
				}
			}
		}
	}
	slices.Sort(out)
	return out
}

// note keeps the list on disk. A list that is too long does no harm.
func (d *Daemon) note() error {
	text, err := json.Marshal(d.targets())
	if err != nil {
		return err
	}
	path := filepath.Join(d.cfg.Dir, targetsFile)
	if err := os.WriteFile(path+".new", text, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// clean unmounts what earlier lives have left and nobody serves any more, and removes
// their tables. It touches no file system: unmounting by MNT_DETACH asks nobody.
func (d *Daemon) clean() {
	text, err := os.ReadFile(filepath.Join(d.cfg.Dir, targetsFile))
	var old []string
	if err == nil {
		err = json.Unmarshal(text, &old)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		d.cfg.Logger.Warn("list of mounts not read", "err", err)
	}
	now := d.targets()
	for _, dir := range old {
		if slices.Contains(now, dir) {
			continue
		}
		// One on top of the other: as many as there are.
		for range 16 {
			if ours, err := Mounted(dir); err != nil || !ours {
				break
			}
			if err := unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
				d.cfg.Logger.Warn("stale mount not taken away", "dir", dir, "err", err)
				break
			}
			d.cfg.Logger.Info("stale mount taken away", "dir", dir)
		}
	}
	if len(old) > 0 {
		if err := d.note(); err != nil {
			d.cfg.Logger.Warn("list of mounts not written", "err", err)
		}
	}
	d.mu.Lock()
	var keep []string
	for _, o := range d.open {
		for _, s := range o.supers {
			keep = append(keep, d.backingFile(s))
		}
	}
	d.mu.Unlock()
	tables, _ := filepath.Glob(filepath.Join(d.cfg.Dir, "*.backings"))
	for _, path := range tables {
		if !slices.Contains(keep, path) {
			_ = os.Remove(path)
		}
	}
}

// Mounted tells whether the topmost mount on a directory, a clean absolute path without
// symbolic links, is one of ours. It asks the kernel alone, for the namespace of the
// caller.
func Mounted(dir string) (bool, error) {
	_, ours, err := MountedMinor(dir)
	return ours, err
}

// MountedMinor is Mounted with the number of the mount's connection.
func MountedMinor(dir string) (minor uint32, ours bool, err error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return 0, false, err
	}
	defer f.Close() //nolint:errcheck // it was read
	last := ""
	in := bufio.NewReader(f)
	for {
		line, err := in.ReadString('\n')
		// 36 35 0:98 / /srv/data rw,nosuid shared:1 - fuse.postern postern:books rw
		if fields := strings.Fields(line); len(fields) > 9 && unescape(fields[4]) == dir {
			last = line
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return 0, false, err
		}
	}
	if !strings.Contains(last, " - fuse."+fuseserver.Subtype+" ") {
		return 0, false, nil
	}
	_, number, _ := strings.Cut(strings.Fields(last)[2], ":")
	n, err := strconv.ParseUint(number, 10, 32)
	return uint32(n), true, err
}

// unescape undoes what the kernel does to spaces in mountinfo.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}
