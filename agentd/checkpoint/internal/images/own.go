package images

import (
	"archive/tar"
	"compress/gzip"
	"encoding/binary"
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
	ipc_msg "github.com/checkpoint-restore/go-criu/v7/crit/images/ipc-msg"
	ipc_sem "github.com/checkpoint-restore/go-criu/v7/crit/images/ipc-sem"
	ipc_shm "github.com/checkpoint-restore/go-criu/v7/crit/images/ipc-shm"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/memfd"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/tty"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// ErrShared is returned by Reown for kernels with System V shared memory in images of a CRIU
// before 3.12, which has its contents among the entries.
var ErrShared = errors.New("the kernel has System V shared memory and was saved by a CRIU of before 3.12: it can't get another user; save it anew")

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

// word is what CRIU fills up contents between entries to, in bytes.
const word = 8

// messages is how many bytes the messages of a queue take, which follow its entry in rest;
// -1 if they are cut.
func messages(queue *ipc_msg.IpcMsgEntry, rest []byte) int {
	at := uint64(0)
	for range queue.GetQnum() {
		if uint64(len(rest)) < at+4 {
			return -1
		}
		size := uint64(binary.LittleEndian.Uint32(rest[at:]))
		at += 4
		if uint64(len(rest)) < at+size {
			return -1
		}
		var m ipc_msg.IpcMsg
		if err := (proto.UnmarshalOptions{AllowPartial: true}).Unmarshal(rest[at:at+size], &m); err != nil {
			return -1
		}
		at += size + (uint64(m.GetMsize())+word-1)/word*word
		if uint64(len(rest)) < at {
			return -1
		}
	}
	return int(at)
}

// reownShared does it for System V's shared memory, whose contents are in other images,
// for semaphores, whose values follow each entry, and for message queues, whose messages do.
func reownShared(dir string, from, to Owners) error {
	inside := false // the contents of shared memory
	for _, k := range []struct {
		pattern string
		fresh   func() proto.Message
		tail    func(proto.Message, []byte) int
	}{
		{"ipcns-shm-*.img", func() proto.Message { return new(ipc_shm.IpcShmEntry) }, func(m proto.Message, _ []byte) int {
			inside = inside || !m.(*ipc_shm.IpcShmEntry).GetInPagemaps()
			return 0
		}},
		{"ipcns-sem-*.img", func() proto.Message { return new(ipc_sem.IpcSemEntry) }, func(m proto.Message, _ []byte) int {
			return (int(m.(*ipc_sem.IpcSemEntry).GetNsems())*2 + word - 1) / word * word // values of two bytes each
		}},
		{"ipcns-msg-*.img", func() proto.Message { return new(ipc_msg.IpcMsgEntry) }, func(m proto.Message, rest []byte) int {
			return messages(m.(*ipc_msg.IpcMsgEntry), rest)
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
