package bucketfs

import (
	"context"
	"strings"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/postern-dev/postern/agentd/attach/bucket"
)

const (
	// slots is how many offsets a page has; MaxPage is less.
	slots = 1024
	// maxPages bounds a directory's pages: 10 million entries.
	maxPages = 10_000
)

// listing is an open directory. It has one page at a time, and the tokens of those before it.
type listing struct {
	tokens []string // of pages; the first one's is ""
	at     int      // which page this is; -1: none
	page   bucket.Page
	last   bool
	// covers are the files of pages before, whose names a directory may have that comes later.
	covers []string
}

// OpenDir implements fuse.RawFileSystem.
func (f *FS) OpenDir(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if _, _, err := f.directory(in.NodeId); err != nil {
		return status(err)
	}
	f.b.mu.Lock()
	defer f.b.mu.Unlock()
	out.Fh = f.nextFH
	f.nextFH++
	f.dirs[out.Fh] = &listing{tokens: []string{""}, at: -1}
	// The number must not be given to a file by the next process.
	return status(f.noteLocked(line{Open: out.Fh}))
}

// ReleaseDir implements fuse.RawFileSystem.
func (f *FS) ReleaseDir(in *fuse.ReleaseIn) {
	f.b.mu.Lock()
	defer f.b.mu.Unlock()
	delete(f.dirs, in.Fh)
}

// FsyncDir implements fuse.RawFileSystem: names are in the bucket already.
func (f *FS) FsyncDir(<-chan struct{}, *fuse.FsyncIn) fuse.Status { return fuse.OK }

// ReadDir implements fuse.RawFileSystem.
func (f *FS) ReadDir(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return f.list(cancel, in, func(e fuse.DirEntry) (*fuse.EntryOut, bool) { return nil, out.AddDirEntry(e) })
}

// ReadDirPlus implements fuse.RawFileSystem.
func (f *FS) ReadDirPlus(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return f.list(cancel, in, func(e fuse.DirEntry) (*fuse.EntryOut, bool) {
		entry := out.AddDirLookupEntry(e)
		return entry, entry != nil
	})
}

func (f *FS) list(cancel <-chan struct{}, in *fuse.ReadIn, add func(fuse.DirEntry) (*fuse.EntryOut, bool)) fuse.Status {
	ctx, done := request(cancel, f.b.cfg.Deadline)
	defer done()
	n, key, err := f.directory(in.NodeId)
	if err != nil {
		return status(err)
	}
	f.b.mu.Lock()
	l := f.dirs[in.Fh]
	if l == nil { // opened at a process before this one
		l = &listing{tokens: []string{""}, at: -1}
		f.dirs[in.Fh] = l
	}
	f.b.mu.Unlock()
	for i, name := range []string{".", ".."} {
		if in.Offset > uint64(i) {
			continue
		}
		if _, ok := add(fuse.DirEntry{Name: name, Ino: n.id, Mode: syscall.S_IFDIR, Off: uint64(i) + 1}); !ok {
			return fuse.OK
		}
	}
	at := max(in.Offset, 2) - 2
	for page := int(at / slots); ; page++ {
		more, err := f.page(ctx, key, l, page)
		if err != nil || !more {
			return status(err)
		}
		full, err := f.entries(n, l, page, int(at%slots), add)
		if err != nil || full {
			return status(err)
		}
		at = 0
	}
}

// page gets a page of a directory; false: there are no more. A rewound or inherited directory is listed
// from its beginning.
func (f *FS) page(ctx context.Context, key string, l *listing, want int) (bool, error) {
	if l.at == want {
		return true, nil
	}
	if want == 0 {
		l.tokens, l.covers, l.last = []string{""}, nil, false
	}
	for {
		at := min(want, len(l.tokens)-1)
		if l.last && want >= len(l.tokens) || want >= maxPages {
			return false, nil
		}
		page, err := f.b.cfg.Remote.List(ctx, key, l.tokens[at], bucket.MaxPage)
		f.b.heard(err)
		if err != nil {
			return false, err
		}
		f.b.hidden.Add(int64(page.Hidden))
		l.at, l.page = at, page
		if at == len(l.tokens)-1 {
			l.last = page.Next == ""
			f.shadow(l)
			if l.last {
				f.addStaged(key, l)
			} else {
				l.tokens = append(l.tokens, page.Next)
			}
		}
		if at == want {
			return true, nil
		}
	}
}

// shadow hides files that have the name of a directory. In the order of keys the directory
// comes later, with nothing between them but names that begin in the same way.
func (f *FS) shadow(l *listing) {
	out := l.page.Entries[:0]
	for _, e := range l.page.Entries {
		for len(l.covers) > 0 && !strings.HasPrefix(e.Name, l.covers[len(l.covers)-1]) {
			l.covers = l.covers[:len(l.covers)-1]
		}
		if !e.Directory {
			l.covers = append(l.covers, e.Name)
			out = append(out, e)
			continue
		}
		hidden := false
		for _, name := range l.covers {
			hidden = hidden || name == e.Name
		}
		if !hidden {
			out = append(out, e)
			continue
		}
		f.b.hidden.Add(1)
		// In a page before, the name was told already.
		for i := range out {
			if out[i].Name == e.Name {
				out[i] = e
			}
		}
	}
	l.page.Entries = out
}

// addStaged adds files that the bucket does not have yet.
func (f *FS) addStaged(key string, l *listing) {
	there := map[string]bool{}
	for _, e := range l.page.Entries {
		there[e.Name] = true
	}
	f.b.mu.Lock()
	defer f.b.mu.Unlock()
	for staged, st := range f.b.byKey {
		name, under := strings.CutPrefix(staged, key)
		if !under || strings.Contains(name, "/") || there[name] || st.rec.Uploaded || len(l.page.Entries) >= slots-1 {
			continue
		}
		l.page.Entries = append(l.page.Entries, bucket.Entry{Name: name, Object: bucket.Object{Key: staged}})
	}
}

// entries gives a page's entries from one on; true: the reply is full.
func (f *FS) entries(n *node, l *listing, page, from int, add func(fuse.DirEntry) (*fuse.EntryOut, bool)) (bool, error) {
	f.b.mu.Lock()
	defer f.b.mu.Unlock()
	var lines []line
	for i := from; i < len(l.page.Entries); i++ {
		e := l.page.Entries[i]
		d := fuse.DirEntry{Name: e.Name, Ino: 0xffffffff, Mode: syscall.S_IFREG, Off: uint64(page*slots+i) + 3}
		if e.Directory {
			d.Mode = syscall.S_IFDIR
		}
		if kid := n.kids[e.Name]; kid != nil {
			d.Ino = kid.id
		}
		out, ok := add(d)
		if !ok {
			return true, f.noteLocked(lines...)
		}
		if out == nil {
			continue
		}
		kid, more := f.childLocked(n, e.Name, e.Directory, 0)
		lines = append(lines, more...)
		if f.stageLocked(kid) == nil && len(kid.handles) == 0 {
			f.learnLocked(kid, e.Object)
		}
		f.entryLocked(kid, out)
	}
	return false, f.noteLocked(lines...)
}
