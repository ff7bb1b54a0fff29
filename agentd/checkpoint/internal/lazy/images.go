package lazy

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/mm"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// Bounds of what is read of images, in bytes.
const (
	maxImage = 256 << 20
	magicLen = 8
)

// Flags of an entry of a pagemap.
const (
	flagParent  = 1
	flagLazy    = 2
	flagPresent = 4
)

// Plan is what could come lazily of an image directory.
type Plan struct {
	// Bytes is all of it, Largest the part of the process that has most.
	Bytes, Largest int64
}

// layout is where the memory of an image directory's processes is.
type layout struct {
	spaces map[int]missing // by the process's id inside
	files  []*os.File
}

func (l *layout) close() {
	for _, f := range l.files {
		_ = f.Close()
	}
}

// Look says what could come lazily.
func Look(dir string) (Plan, error) {
	l, err := read(dir)
	if err != nil {
		return Plan{}, err
	}
	defer l.close()
	var p Plan
	for _, m := range l.spaces {
		p.Bytes += m.bytes()
		p.Largest = max(p.Largest, m.bytes())
	}
	return p, nil
}

// read reads the pagemaps and opens the files with the pages.
func read(dir string) (l *layout, err error) {
	l = &layout{spaces: map[int]missing{}}
	defer func() {
		if err != nil {
			l.close()
			l = nil
		}
	}()
	maps, err := filepath.Glob(filepath.Join(dir, "pagemap-*.img"))
	if err != nil {
		return l, err
	}
	byID := map[uint32]int{}
	for _, path := range maps {
		pid, err := strconv.Atoi(strings.TrimSuffix(strings.TrimPrefix(filepath.Base(path), "pagemap-"), ".img"))
		if err != nil {
			continue // of shared memory
		}
		if err := l.readSpace(dir, path, pid, byID); err != nil {
			return l, fmt.Errorf("image %s: %w", path, err)
		}
	}
	return l, nil
}

var errCut = errors.New("it is cut")

// entries calls do with each entry of an image file.
func entries(path string, do func(n int, raw []byte) error) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if info.Size() > maxImage {
		return fmt.Errorf("it has %d bytes", info.Size())
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if len(b) < magicLen {
		return errCut
	}
	b = b[magicLen:]
	for n := 0; len(b) > 0; n++ {
		if len(b) < 4 || uint64(binary.LittleEndian.Uint32(b)) > uint64(len(b)-4) {
			return errCut
		}
		size := int(binary.LittleEndian.Uint32(b))
		if err := do(n, b[4:4+size]); err != nil {
			return err
		}
		b = b[4+size:]
	}
	return nil
}

// numbers are the varint fields 1 to 7 of a message. Those of a pagemap are read like this,
// since CRIU's is newer than package crit's.
func numbers(raw []byte) (v [8]uint64, err error) {
	for len(raw) > 0 {
		field, kind, n := protowire.ConsumeTag(raw)
		if n < 0 {
			return v, protowire.ParseError(n)
		}
		raw = raw[n:]
		if kind == protowire.VarintType && field < 8 {
			if v[field], n = protowire.ConsumeVarint(raw); n < 0 {
				return v, protowire.ParseError(n)
			}
			raw = raw[n:]
			continue
		}
		if n = protowire.ConsumeFieldValue(field, kind, raw); n < 0 {
			return v, protowire.ParseError(n)
		}
		raw = raw[n:]
	}
	return v, nil
}

// readSpace reads one process's pagemap: its head says which file has the pages, one after
// another in the entries' order.
func (l *layout) readSpace(dir, path string, pid int, byID map[uint32]int) error {
	wipes, err := wiped(filepath.Join(dir, fmt.Sprintf("mm-%d.img", pid)))
	if err != nil {
		return err
	}
	page := uint64(os.Getpagesize())
	var m missing
	var file int
	var off, size int64
	err = entries(path, func(n int, raw []byte) error {
		v, err := numbers(raw)
		if err != nil {
			return err
		}
		if n == 0 {
			id := uint32(v[1])
			var ok bool
			if file, ok = byID[id]; !ok {
				f, err := os.Open(filepath.Join(dir, fmt.Sprintf("pages-%d.img", id)))
				if errors.Is(err, os.ErrNotExist) {
					file = -1 // there are none
					return nil
				}
				if err != nil {
					return err
				}
				file = len(l.files)
				l.files = append(l.files, f)
				byID[id] = file
			}
			info, err := l.files[file].Stat()
			if err != nil {
				return err
			}
			size = info.Size()
			return nil
		}
		start, pages, flags := v[1], v[2], v[4]
		if v[5] > 0 { // it has 64 bits there
			pages = v[5]
		}
		switch {
		case v[3] != 0 || flags&flagParent != 0:
			return errors.New("a part of it is in another image directory")
		case flags&flagPresent == 0 && flags != 0:
			if flags&flagLazy != 0 {
				return fmt.Errorf("an entry that is lazy and nowhere, flags %#x", flags)
			}
			return nil
		case start%page != 0 || pages == 0 || pages > 1<<40 || start+pages*page < start:
			return fmt.Errorf("an entry of %d pages at %#x", pages, start)
		case file < 0 || off+int64(pages*page) > size:
			return errors.New("its pages are cut")
		}
		if flags&flagLazy != 0 {
			if len(m) > 0 && m[len(m)-1].end > start {
				return errors.New("its entries are in disorder")
			}
			m = append(m, span{start: start, end: start + pages*page, file: file, off: off})
		}
		off += int64(pages * page)
		return nil
	})
	if err != nil {
		return err
	}
	for _, w := range wipes {
		parts := m.cut(w[0], w[1])
		for i := range parts {
			parts[i].wipe = true
		}
		m = slices.Insert(m, m.after(w[0]), parts...)
	}
	l.spaces[pid] = m
	return nil
}

// wiped are the mappings that are zeros in a fork.
func wiped(path string) (out [][2]uint64, err error) {
	err = entries(path, func(_ int, raw []byte) error {
		e := &mm.MmEntry{}
		if err := (proto.UnmarshalOptions{AllowPartial: true}).Unmarshal(raw, e); err != nil {
			return err
		}
		for _, v := range e.GetVmas() {
			if v.GetMadv()&(1<<unix.MADV_WIPEONFORK) != 0 {
				out = append(out, [2]uint64{v.GetStart(), v.GetEnd()})
			}
		}
		return nil
	})
	return out, err
}
