package images

import (
	"archive/tar"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	criu_core "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	ghost_file "github.com/checkpoint-restore/go-criu/v7/crit/images/ghost-file"
	ipc_sem "github.com/checkpoint-restore/go-criu/v7/crit/images/ipc-sem"
	ipc_shm "github.com/checkpoint-restore/go-criu/v7/crit/images/ipc-shm"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/memfd"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/tty"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// ErrShared is returned by Reown for kernels with System V message queues, whose owner
// can't be changed, or with shared memory in images of a CRIU before 3.12.
var ErrShared = errors.New("the kernel has System V message queues: it can't get another user; remove them (ipcrm), or use pipes")

// kinds are the image files that name owners, and how many entries at their start.
var kinds = []struct {
	pattern string
	fresh   func() proto.Message
	only    int
}{
	{"core-*.img", func() proto.Message { return new(criu_core.CoreEntry) }, 0},
	{"files.img", func() proto.Message { return new(fdinfo.FileEntry) }, 0},
	{"memfd.img", func() proto.Message { return new(memfd.MemfdInodeEntry) }, 0},
	{"tty-info.img", func() proto.Message { return new(tty.TtyInfoEntry) }, 0},
	{"ghost-file-*.img", func() proto.Message { return new(ghost_file.GhostFileEntry) }, 1}, // its content follows
}

// Owners are the user and group that a kernel's processes and files have.
type Owners struct{ UID, GID uint32 }

// Reown makes what belongs to from belong to to, in all images of a directory. After an
// error the directory must not be restored.
func Reown(dir string, from, to Owners) error {
	if from == to {
		return nil
	}
	for _, k := range kinds {
		paths, err := filepath.Glob(filepath.Join(dir, k.pattern))
		if err != nil {
			return err
		}
		for _, path := range paths {
			out, changed, err := each(path, k.fresh, k.only, func(m proto.Message) bool { return reown(m.ProtoReflect(), from, to) })
			if err == nil && changed {
				err = replace(path, out)
			}
			if err != nil {
				return err
			}
		}
	}
	if err := reownShared(dir, from, to); err != nil {
		return err
	}
	tars, err := filepath.Glob(filepath.Join(dir, "tmpfs-*.tar.gz.img"))
	if err != nil {
		return err
	}
	for _, path := range tars {
		if err := reownTar(path, from, to); err != nil {
			return fmt.Errorf("image %s: %w", path, err)
		}
	}
	return nil
}

// replace puts another file in the place of one, which may be a link to a kept image.
func replace(path string, content []byte) error {
	if err := os.WriteFile(path+".new", content, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// reownShared does it for System V's shared memory, whose contents are in other images,
// and semaphores, whose values follow each entry.
func reownShared(dir string, from, to Owners) error {
	queues, err := filepath.Glob(filepath.Join(dir, "ipcns-msg-*.img"))
	if err != nil {
		return err
	}
	for _, path := range queues {
		if info, err := os.Stat(path); err != nil || info.Size() > magicLen {
			return errors.Join(ErrShared, err)
		}
	}
	inside := false // the contents of shared memory
	for _, k := range []struct {
		pattern string
		fresh   func() proto.Message
		tail    func(proto.Message) int
	}{
		{"ipcns-shm-*.img", func() proto.Message { return new(ipc_shm.IpcShmEntry) }, func(m proto.Message) int {
			inside = inside || !m.(*ipc_shm.IpcShmEntry).GetInPagemaps()
			return 0
		}},
		{"ipcns-sem-*.img", func() proto.Message { return new(ipc_sem.IpcSemEntry) }, func(m proto.Message) int {
			const word = 8 // the values, of two bytes each, are filled up to whole ones
			return (int(m.(*ipc_sem.IpcSemEntry).GetNsems())*2 + word - 1) / word * word
		}},
	} {
		paths, err := filepath.Glob(filepath.Join(dir, k.pattern))
		if err != nil {
			return err
		}
		for _, path := range paths {
			out, changed, err := eachWith(path, k.fresh, 0, k.tail, func(m proto.Message) bool { return reown(m.ProtoReflect(), from, to) })
			if inside {
				return ErrShared
			}
			if err == nil && changed {
				err = replace(path, out)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

func isUID(name protoreflect.Name) bool {
	switch name {
	case "uid", "euid", "suid", "fsuid", "loginuid", "cuid":
		return true
	}
	return false
}

func isGID(name protoreflect.Name) bool {
	switch name {
	case "gid", "egid", "sgid", "fsgid", "groups", "cgid":
		return true
	}
	return false
}

// reown walks a message. Owners are known by the names of their fields, so that what a
// later image format adds is found as well.
func reown(m protoreflect.Message, from, to Owners) (changed bool) {
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		was, is := from.UID, to.UID
		if isGID(f.Name()) {
			was, is = from.GID, to.GID
		}
		owner := (isUID(f.Name()) || isGID(f.Name())) && f.Kind() == protoreflect.Uint32Kind
		switch {
		case f.IsMap():
		case f.IsList():
			l := v.List()
			for i := range l.Len() {
				switch {
				case f.Message() != nil:
					changed = reown(l.Get(i).Message(), from, to) || changed
				case owner && uint32(l.Get(i).Uint()) == was:
					l.Set(i, protoreflect.ValueOfUint32(is))
					changed = true
				}
			}
		case f.Message() != nil:
			changed = reown(v.Message(), from, to) || changed
		case owner && uint32(v.Uint()) == was:
			m.Set(f, protoreflect.ValueOfUint32(is))
			changed = true
		}
		return true
	})
	return changed
}

// reownTar rewrites the archive of a tmpfs.
func reownTar(path string, from, to Owners) (err error) {
	in, err := os.Open(path)
	if err != nil {
		return err
	}
	defer in.Close() //nolint:errcheck // it is only read
	packed, err := gzip.NewReader(in)
	if err != nil {
		return err
	}
	out, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = out.Close()
			_ = os.Remove(path + ".new")
		}
	}()
	packer, err := gzip.NewWriterLevel(out, gzip.BestSpeed)
	if err != nil {
		return err
	}
	r, w := tar.NewReader(packed), tar.NewWriter(packer)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if h.Uid == int(from.UID) {
			h.Uid = int(to.UID)
		}
		if h.Gid == int(from.GID) {
			h.Gid = int(to.GID)
		}
		h.Uname, h.Gname = "", ""
		h.Format = tar.FormatPAX // ids above what the old header holds
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		if _, err := io.Copy(w, r); err != nil {
			return err
		}
	}
	if err := errors.Join(w.Close(), packer.Close(), out.Close()); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// ReownTree makes the files of a directory that belong to from belong to to. Nobody
// else may be able to change it meanwhile.
func ReownTree(dir string, from, to Owners) error {
	if from == to {
		return nil
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close() //nolint:errcheck // it is only looked through
	return fs.WalkDir(root.FS(), ".", func(name string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := root.Lstat(name)
		if err != nil {
			return err
		}
		uid, gid := owner(info)
		if uid != from.UID && gid != from.GID {
			return nil
		}
		if uid == from.UID {
			uid = to.UID
		}
		if gid == from.GID {
			gid = to.GID
		}
		mode := info.Mode()
		if err := root.Lchown(name, int(uid), int(gid)); err != nil {
			return err
		}
		if special := mode & (fs.ModeSetuid | fs.ModeSetgid); special != 0 && mode&fs.ModeSymlink == 0 {
			return root.Chmod(name, mode.Perm()|special|mode&fs.ModeSticky)
		}
		return nil
	})
}

// printable is a path of an image for a message.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
}
