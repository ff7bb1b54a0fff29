package pagestore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// readTrees feeds all files of trees into the pipeline.
func (p *putter) readTrees(ctx context.Context, trees []Tree) error {
	for i, t := range trees {
		p.manifest.trees = append(p.manifest.trees, t.Name)
		if err := p.readTree(ctx, i, t); err != nil {
			return err
		}
	}
	return nil
}

// readTree walks one tree, parents before their children. It opens everything below
// the directory it opened first, so that nobody who may write there can lead it
// elsewhere by a link.
func (p *putter) readTree(ctx context.Context, tree int, t Tree) error {
	root, err := os.OpenRoot(t.Dir)
	if err != nil {
		return err
	}
	defer root.Close() //nolint:errcheck // only read
	if err := p.readEntry(ctx, root, tree, ".", t.Name); err != nil {
		return err
	}
	// A list of directories rather than recursion: a deep tree takes no more handles
	// than a flat one.
	for dirs := []string{"."}; len(dirs) > 0; {
		dir := dirs[len(dirs)-1]
		below, err := p.readDir(ctx, root, tree, dir, t.Name)
		if err != nil {
			return err
		}
		if dirs = append(dirs[:len(dirs)-1], below...); len(dirs) > maxEntries {
			return invalid("%s: more than %d directories", t.Name, maxEntries)
		}
	}
	return nil
}

// readDir feeds what lies in one directory and returns its subdirectories.
func (p *putter) readDir(ctx context.Context, root *os.Root, tree int, dir, name string) (below []string, err error) {
	f, err := root.OpenFile(dir, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // only read
	for {
		list, err := f.ReadDir(1024)
		for _, d := range list {
			path := filepath.Join(dir, d.Name())
			if err := p.readEntry(ctx, root, tree, path, name); err != nil {
				return nil, err
			}
			if d.IsDir() {
				below = append(below, path)
			}
		}
		if err == io.EOF {
			return below, nil
		}
		if err != nil {
			return nil, err
		}
	}
}

// readEntry feeds one entry, with its content if it is a file.
func (p *putter) readEntry(ctx context.Context, root *os.Root, tree int, path, name string) error {
	info, err := root.Lstat(path)
	if err != nil {
		return err
	}
	if info.Mode().Type() == fs.ModeSocket {
		p.stats.Sockets++
		return nil
	}
	if len(path) > maxPath {
		return invalid("%s/%.60q...: a path of %d bytes, the bound is %d", name, path, len(path), maxPath)
	}
	e, err := newEntry(tree, path, info)
	if err != nil {
		return invalid("%s/%q: %s", name, path, err)
	}
	switch e.kind {
	case kindSymlink:
		if e.link, err = root.Readlink(path); err != nil {
			return err
		}
	case kindFile:
		return p.readFile(ctx, root, e)
	}
	return p.begin(ctx, e)
}

// newEntry describes what info shows, without size, content or link.
func newEntry(tree int, path string, info fs.FileInfo) (*entry, error) {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return nil, errors.New("no owner")
	}
	e := &entry{tree: tree, path: path, mode: st.Mode & 0o7777, uid: st.Uid, gid: st.Gid, mtime: info.ModTime().UnixNano()}
	switch info.Mode().Type() {
	case 0:
		e.kind = kindFile
	case fs.ModeDir:
		e.kind = kindDir
	case fs.ModeSymlink:
		e.kind = kindSymlink
	case fs.ModeNamedPipe:
		e.kind = kindFIFO
	default:
		return nil, errors.New("a device can't be part of a checkpoint: remove it from the kernel's files")
	}
	return e, nil
}

// readFile feeds one file. Its metadata are taken from the open file: the path may
// mean another one by then.
func (p *putter) readFile(ctx context.Context, root *os.Root, e *entry) error {
	f, err := root.OpenFile(e.path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // only read
	info, err := f.Stat()
	if err != nil {
		return err
	}
	opened, err := newEntry(e.tree, e.path, info)
	if err != nil || opened.kind != kindFile {
		return fmt.Errorf("%s changed while it was stored", e.path)
	}
	*e = *opened
	if e.size = info.Size(); e.size > maxFileSize {
		return invalid("%s: a file of %d GiB, the bound is %d GiB", e.path, e.size>>30, int64(maxFileSize)>>30)
	}
	if err := p.begin(ctx, e); err != nil {
		return err
	}
	for off := int64(0); off < e.size; {
		data, end := nextData(f, off, e.size)
		if data > off {
			if err := p.hole(ctx, e, chunksOf(data)-chunksOf(off)); err != nil {
				return err
			}
		}
		if err := p.readRange(ctx, f, e, data, end); err != nil {
			return err
		}
		off = end
	}
	return nil
}

// nextData finds the next stretch of data from off: both ends are multiples of
// ChunkSize, or size. A file system without SEEK_DATA has no holes.
func nextData(f *os.File, off, size int64) (data, end int64) {
	data, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return size, size
	}
	if err != nil || data < off {
		return off, size
	}
	end, err = unix.Seek(int(f.Fd()), data, unix.SEEK_HOLE)
	if err != nil || end <= data {
		end = size
	}
	return min(max(off, data/ChunkSize*ChunkSize), size), min(chunksOf(end)*ChunkSize, size)
}

// readRange feeds f from off, a multiple of ChunkSize, to end.
func (p *putter) readRange(ctx context.Context, f *os.File, e *entry, off, end int64) error {
	for off < end {
		b, err := p.freeBlock(ctx)
		if err != nil {
			return err
		}
		n := int(min(blockBytes, end-off))
		if got, err := f.ReadAt(b.buf[:n], off); got < n {
			if err == io.EOF {
				err = fmt.Errorf("%s changed while it was stored", e.path)
			}
			return err
		}
		b.chunks = int(chunksOf(int64(n)))
		clear(b.buf[n : b.chunks*ChunkSize])
		if err := p.chunks(ctx, e, b); err != nil {
			return err
		}
		off += int64(n)
	}
	return nil
}
