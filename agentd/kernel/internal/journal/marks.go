package journal

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	marksSize = 40
	// ahead is how many sequence numbers are reserved at once.
	ahead = 1 << 16
)

// marks are the numbers that outlive a loss of power. They are written in place,
// which needs no room on a full disk.
type marks struct {
	f        *os.File
	boot     [16]byte
	sameBoot bool
	good     bool
	reserved uint64 // none above it was used
	floor    uint64 // it was used, and is in no record
}

func bootID() (id [16]byte) {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err == nil {
		sum := []byte(strings.ReplaceAll(strings.TrimSpace(string(text)), "-", ""))
		for i := range id {
			if 2*i+1 < len(sum) {
				id[i] = sum[2*i]<<4 ^ sum[2*i+1]
			}
		}
	}
	return id
}

func openMarks(path string) (*marks, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	m := &marks{f: f, boot: bootID()}
	var b [marksSize]byte
	n, err := f.ReadAt(b[:], 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, errors.Join(err, f.Close())
	}
	if n == 0 {
		m.good, m.sameBoot = true, true // there was none
		return m, nil
	}
	if n == marksSize && crc32.Checksum(b[:36], castagnoli) == binary.LittleEndian.Uint32(b[36:]) {
		m.good, m.sameBoot = true, bytes.Equal(b[:16], m.boot[:])
		m.reserved, m.floor = binary.LittleEndian.Uint64(b[16:]), binary.LittleEndian.Uint64(b[24:])
	}
	return m, nil
}

// start is the next sequence number to use, when the records say next.
func (m *marks) start(next uint64) uint64 {
	if m.good && m.sameBoot {
		return max(next, m.floor+1)
	}
	if !m.good {
		return next + 1<<32
	}
	return max(next, m.reserved+1)
}

// reserve makes sure that sequence is reserved on the disk.
func (m *marks) reserve(sequence uint64) error {
	if sequence <= m.reserved && m.good && m.sameBoot {
		return nil
	}
	m.reserved = sequence + ahead
	m.good, m.sameBoot = true, true
	if err := m.write(); err != nil {
		return err
	}
	return unix.Fdatasync(int(m.f.Fd()))
}

// drop remembers a number that is in no record.
func (m *marks) drop(sequence uint64) {
	m.floor = sequence
	_ = m.write() // in place; there is nowhere else to say it
}

func (m *marks) write() error {
	var b [marksSize]byte
	copy(b[:16], m.boot[:])
	binary.LittleEndian.PutUint64(b[16:], m.reserved)
	binary.LittleEndian.PutUint64(b[24:], m.floor)
	binary.LittleEndian.PutUint32(b[36:], crc32.Checksum(b[:36], castagnoli))
	_, err := m.f.WriteAt(b[:], 0)
	return err
}

func (m *marks) close() error { return m.f.Close() }
