package images

import (
	"io/fs"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/mnt"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

func owner(info fs.FileInfo) (uid, gid uint32) {
	st := info.Sys().(*syscall.Stat_t)
	return st.Uid, st.Gid
}

// OpenFile is a regular file that was open, or mapped, when the images were made, on a
// mount from outside.
type OpenFile struct {
	// Key is the mount's, Path the file's below it, Inside as the kernel saw it.
	Key, Path, Inside string
	// Size it must have; -1 if CRIU does not look at it (append-only writers).
	Size int64
}

// maxOpen bounds what OpenFiles returns.
const maxOpen = 100_000

// OpenFiles lists the regular files on external mounts with the keys that want tells.
func OpenFiles(dir string, want func(key string) bool) ([]OpenFile, error) {
	type place struct{ key, path string }
	mounts := map[int32]place{}
	paths, err := filepath.Glob(filepath.Join(dir, "mountpoints-*.img"))
	if err != nil {
		return nil, err
	}
	for _, path := range paths {
		_, _, err := each(path, func() proto.Message { return new(mnt.MntEntry) }, 0, func(m proto.Message) bool {
			e := m.(*mnt.MntEntry)
			if key := e.GetExtKey(); key != "" && want(key) {
				mounts[int32(e.GetMntId())] = place{key, e.GetMountpoint()}
			}
			return false
		})
		if err != nil {
			return nil, err
		}
	}
	var files []OpenFile
	if len(mounts) == 0 {
		return nil, nil
	}
	_, _, err = each(filepath.Join(dir, "files.img"), func() proto.Message { return new(fdinfo.FileEntry) }, 0, func(m proto.Message) bool {
		reg := m.(*fdinfo.FileEntry).GetReg()
		if reg == nil || len(files) >= maxOpen {
			return false
		}
		at, ok := mounts[reg.GetMntId()]
		name := "/" + strings.TrimPrefix(reg.GetName(), "/")
		if !ok || name != at.path && !strings.HasPrefix(name, at.path+"/") {
			return false
		}
		f := OpenFile{Key: at.key, Path: strings.TrimPrefix(name[len(at.path):], "/"), Inside: printable(name), Size: -1}
		appends := reg.GetFlags()&unix.O_ACCMODE == unix.O_WRONLY && reg.GetFlags()&unix.O_APPEND != 0
		if reg.Size != nil && !appends && reg.GetMode()&unix.S_IFMT == unix.S_IFREG {
			f.Size = int64(reg.GetSize())
		}
		files = append(files, f)
		return false
	})
	return files, err
}
