package lazy

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Sizes of what is copied at once, in bytes: after a fault little, so that the next one
// does not wait; otherwise more.
const (
	aroundFault = 64 << 10
	inTurn      = 512 << 10
)

// space is the memory of one process.
type space struct {
	fd   int
	lack missing
	// faults are addresses that somebody waits for and that could not be served while the
	// process changed its memory; no more than it has threads.
	faults []uint64
	gone   bool
}

// filler copies from images into spaces. It is used by one goroutine.
type filler struct {
	files []*os.File
	buf   []byte // pages, inTurn
	page  uint64
	// copied is what came, in bytes.
	copied int64
	// whole: every mapping is there. Before, one that is not may be about to be made.
	whole bool
}

func newFiller(files []*os.File) (*filler, error) {
	buf, err := unix.Mmap(-1, 0, inTurn, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("a buffer: %w", err)
	}
	return &filler{files: files, buf: buf, page: uint64(os.Getpagesize())}, nil
}

// errBusy is returned while the process changes its memory: what it changed can be read from
// the userfaultfd, and then it is tried again.
var errBusy = errors.New("the process changes its memory")

// put brings up to most bytes of a range that is missing, from its start on.
func (f *filler) put(s *space, r span, most int) error {
	n := int(min(r.end-r.start, uint64(most)))
	if _, err := f.files[r.file].ReadAt(f.buf[:n], r.off); err != nil {
		return fmt.Errorf("read the memory of an image: %w", err)
	}
	for done := 0; done < n; {
		at := r.start + uint64(done)
		size := n - done
		copied, err := copyPages(s.fd, at, f.buf[done:n])
		if copied > 0 {
			f.copied += int64(copied)
			s.lack.cut(at, at+uint64(copied))
			done += copied
			continue // what stood in the way comes up at the next page
		}
		switch {
		case err == nil:
			return errors.New("userfaultfd copied nothing")
		case errors.Is(err, unix.EAGAIN):
			return errBusy
		case errors.Is(err, unix.ESRCH), errors.Is(err, unix.ENOSPC):
			s.gone = true
			return nil
		case errors.Is(err, unix.ENOENT) && size > int(f.page):
			// A range that the process divided: page by page to where the next part begins.
			n = done + int(f.page)
			continue
		case errors.Is(err, unix.ENOENT) && !f.whole:
			return nil // nobody waits for that one
		case errors.Is(err, unix.EEXIST), errors.Is(err, unix.ENOENT):
			// It has that page already, or the mapping is not there any more: nothing lacks.
			s.lack.cut(at, at+f.page)
			wake(s.fd, at, f.page)
			done += int(f.page)
		default:
			return fmt.Errorf("put memory in at %#x: %w", at, err)
		}
	}
	return nil
}

// fault serves somebody who waits for an address.
func (f *filler) fault(s *space, addr uint64) error {
	addr &^= f.page - 1
	if r, ok := s.lack.at(addr); ok {
		return f.put(s, r, aroundFault)
	}
	switch err := zeroPages(s.fd, addr, f.page); {
	case err == nil:
		return nil
	case errors.Is(err, unix.EAGAIN):
		return errBusy
	case errors.Is(err, unix.ESRCH), errors.Is(err, unix.ENOSPC):
		s.gone = true
		return nil
	case errors.Is(err, unix.EEXIST), errors.Is(err, unix.ENOENT):
		wake(s.fd, addr, f.page)
		return nil
	default:
		return fmt.Errorf("put zeros in at %#x: %w", addr, err)
	}
}

// serve serves who waits. served says whether there was anybody.
func (f *filler) serve(s *space) (served bool, err error) {
	for len(s.faults) > 0 && !s.gone {
		if err := f.fault(s, s.faults[0]); err != nil {
			return served, err
		}
		s.faults = s.faults[1:]
		served = true
	}
	return served, nil
}

// read takes what the process did, in its order, and returns the space of each fork that
// it made. A fork's memory is as its parent's was: nothing was put in between, since Linux
// refuses that until the fork is read.
func (s *space) read(buf []byte) (forks []*space, err error) {
	for {
		n, err := unix.Read(s.fd, buf)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN) || err == nil && n == 0:
			return forks, nil
		case err != nil:
			return forks, fmt.Errorf("read a userfaultfd: %w", err)
		case n%msgLen != 0:
			return forks, fmt.Errorf("read a userfaultfd: %d bytes", n)
		}
		for b := buf[:n]; len(b) > 0; b = b[msgLen:] {
			switch e := parse(b); e.kind {
			case eventFault:
				s.faults = append(s.faults, e.a)
			case eventFork:
				forks = append(forks, &space{fd: int(e.a), lack: s.lack.fork()})
			case eventRemap:
				s.lack.move(e.a, e.b, e.c)
			case eventRemove, eventUnmap:
				s.lack.cut(e.a, e.b)
			default:
				return forks, fmt.Errorf("a userfaultfd told of %#x", e.kind)
			}
		}
	}
}
