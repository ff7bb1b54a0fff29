package filechunk

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
)

const (
	// Size is the length of each chunk but a file's last, in bytes.
	Size = 1 << 20
	// MaxInline is the longest content that may travel and be kept without chunks, in bytes.
	MaxInline = 4096
	// MaxFile is the largest file, in bytes: its list of chunks takes 128 MiB.
	MaxFile = 4 << 40
	// FrameHeader is what a frame has before the chunk's bytes, in bytes.
	FrameHeader = 4
)

// ErrFrame is returned when what was read is no frame; the stream is of no more use.
var ErrFrame = errors.New("not a chunk's frame")

var zeros [Size]byte

// Count is how many chunks a file of size bytes has.
func Count(size uint64) uint64 {
	return size/Size + min(1, size%Size)
}

// Length is the length in bytes of chunk index of a file of size bytes; 0 behind its end.
func Length(size, index uint64) int {
	if index >= Count(size) {
		return 0
	}
	return int(min(Size, size-index*Size))
}

// Name is the name of a chunk: 32 bytes, or nil for a hole. It panics on a chunk that is
// longer than Size.
func Name(chunk []byte) []byte {
	if bytes.Equal(chunk, zeros[:len(chunk)]) {
		return nil
	}
	sum := sha256.Sum256(chunk)
	return sum[:]
}

// Names are the names of the chunks of a content that is at hand.
func Names(content []byte) [][]byte {
	var names [][]byte
	for len(content) > 0 {
		n := min(Size, len(content))
		names = append(names, Name(content[:n]))
		content = content[n:]
	}
	return names
}

// Check reports what is wrong with a file's list of chunks; nil if nothing is.
func Check(size uint64, names [][]byte) error {
	if size > MaxFile {
		return fmt.Errorf("a file of %d bytes: at most %d", size, uint64(MaxFile))
	}
	if uint64(len(names)) != Count(size) {
		return fmt.Errorf("%d chunks for a file of %d bytes, which has %d", len(names), size, Count(size))
	}
	for i, name := range names {
		if len(name) != 0 && len(name) != sha256.Size {
			return fmt.Errorf("the name of chunk %d has %d bytes: want %d, or none for a hole", i, len(name), sha256.Size)
		}
	}
	return nil
}

// ETag names a content: two files with one ETag have one content. It has 64 hexadecimal
// digits: SHA-256 of "postern-file-1", the size as 8 bytes, big endian, and each chunk's name,
// 32 zeros for a hole. Content that is kept inline has the ETag of its chunk.
func ETag(size uint64, names [][]byte) string {
	h := sha256.New()
	h.Write([]byte("postern-file-1"))                 //nolint:errcheck // a hash takes everything
	h.Write(binary.BigEndian.AppendUint64(nil, size)) //nolint:errcheck // see above
	for _, name := range names {
		if len(name) == 0 {
			name = zeros[:sha256.Size]
		}
		h.Write(name) //nolint:errcheck // see above
	}
	return hex.EncodeToString(h.Sum(nil))
}

// WriteFrame writes one chunk of 1 to Size bytes.
func WriteFrame(w io.Writer, chunk []byte) error {
	if len(chunk) == 0 || len(chunk) > Size {
		return fmt.Errorf("%w: %d bytes", ErrFrame, len(chunk))
	}
	var head [FrameHeader]byte
	binary.BigEndian.PutUint32(head[:], uint32(len(chunk)))
	if _, err := w.Write(head[:]); err != nil {
		return err
	}
	_, err := w.Write(chunk)
	return err
}

// ReadFrame reads one chunk into into, which has room for Size bytes, and returns the part
// that was filled. io.EOF is the end between two frames, io.ErrUnexpectedEOF one within.
func ReadFrame(r io.Reader, into []byte) ([]byte, error) {
	var head [FrameHeader]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n == 0 || n > Size {
		return nil, fmt.Errorf("%w: %d bytes, want 1 to %d", ErrFrame, n, Size)
	}
	chunk := into[:n]
	if _, err := io.ReadFull(r, chunk); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	return chunk, nil
}
