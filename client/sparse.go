package client

import (
	"bytes"
	"os"
)

// holeSize is what a hole is made of, in bytes: a block of most file systems.
const holeSize = 4096

var zeros [holeSize]byte

// sparse writes a file in sequence and leaves blocks of zeros out: they become holes. The
// file must have nothing from the offset on, and end must be called.
type sparse struct {
	f   *os.File
	off int64
}

// Write implements io.Writer.
func (s *sparse) Write(b []byte) (int, error) {
	done := 0
	for done < len(b) {
		// As many whole blocks as possible, either of zeros or of something else.
		n := min(len(b)-done, holeSize-int(s.off%holeSize))
		hole := s.zero(b[done : done+n])
		for done+n < len(b) {
			next := min(len(b)-done-n, holeSize)
			if s.zero(b[done+n:done+n+next]) != hole {
				break
			}
			n += next
		}
		if !hole {
			if _, err := s.f.WriteAt(b[done:done+n], s.off); err != nil {
				return done, err
			}
		}
		done += n
		s.off += int64(n)
	}
	return done, nil
}

func (s *sparse) zero(b []byte) bool { return bytes.Equal(b, zeros[:len(b)]) }

// end gives the file its size, of which a hole may be the last part.
func (s *sparse) end() error { return s.f.Truncate(s.off) }
