package content

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
)

// State of a chunk, one byte each in the map.
const (
	absent  byte = 0
	present byte = 1 // as the version has it
	changed byte = 2 // written to on this host
)

const (
	mapMagic  = "PMap0001"
	mapHeader = 64
	hashSize  = sha256.Size
)

var errMap = errors.New("map of chunks is not readable")

// chunkMap is a map on disk: a header, the hashes, the states. A hash of zeros is a
// hole. States go on behind the version's chunks when the file grew here.
type chunkMap struct {
	file    *os.File
	version uint64
	size    uint64 // of the version
	chunks  int    // of the version
	states  []byte
}

// createMap makes a map with room for the hashes, which putHashes fills in; it counts
// from commitMap on.
func createMap(name string, version, size uint64, chunks int) (*chunkMap, error) {
	f, err := os.OpenFile(name+".new", os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	return &chunkMap{file: f, version: version, size: size, chunks: chunks, states: make([]byte, chunks)}, nil
}

func (m *chunkMap) putHashes(from int, hashes [][]byte) error {
	buf := make([]byte, 0, len(hashes)*hashSize)
	for _, h := range hashes {
		switch len(h) {
		case 0:
			buf = append(buf, make([]byte, hashSize)...)
		case hashSize:
			buf = append(buf, h...)
		default:
			return fmt.Errorf("hash of %d bytes", len(h))
		}
	}
	_, err := m.file.WriteAt(buf, mapHeader+int64(from)*hashSize)
	return err
}

func (m *chunkMap) commit(name string) error {
	head := make([]byte, mapHeader)
	copy(head, mapMagic)
	binary.LittleEndian.PutUint64(head[8:], m.version)
	binary.LittleEndian.PutUint64(head[16:], m.size)
	binary.LittleEndian.PutUint64(head[24:], uint64(m.chunks))
	sum, err := m.sum(head[:32])
	if err != nil {
		return err
	}
	binary.LittleEndian.PutUint32(head[32:], sum)
	if _, err := m.file.WriteAt(head, 0); err != nil {
		return err
	}
	if _, err := m.file.WriteAt(m.states, m.stateAt(0)); err != nil {
		return err
	}
	return os.Rename(name+".new", name)
}

// sum is over the header and all hashes: after a loss of power a map may be anything.
func (m *chunkMap) sum(head []byte) (uint32, error) {
	sum := crc32.NewIEEE()
	sum.Write(head)
	_, err := io.Copy(sum, io.NewSectionReader(m.file, mapHeader, int64(m.chunks)*hashSize))
	return sum.Sum32(), err
}

func openMap(name string) (*chunkMap, error) {
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	m, err := readMap(f)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return m, nil
}

func readMap(f *os.File) (*chunkMap, error) {
	head := make([]byte, mapHeader)
	if _, err := f.ReadAt(head, 0); err != nil {
		return nil, errMap
	}
	n := binary.LittleEndian.Uint64(head[24:])
	if string(head[:8]) != mapMagic || n > 1<<32 {
		return nil, errMap
	}
	m := &chunkMap{file: f, version: binary.LittleEndian.Uint64(head[8:]), size: binary.LittleEndian.Uint64(head[16:]), chunks: int(n)}
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() < m.stateAt(0) || m.chunks != Chunks(m.size) {
		return nil, errMap
	}
	sum, err := m.sum(head[:32])
	if err != nil {
		return nil, err
	}
	if sum != binary.LittleEndian.Uint32(head[32:]) {
		return nil, errMap
	}
	states := info.Size() - m.stateAt(0)
	if states < int64(n) || states > 1<<32 {
		return nil, errMap
	}
	m.states = make([]byte, states)
	if _, err := f.ReadAt(m.states, m.stateAt(0)); err != nil {
		return nil, errMap
	}
	for i, s := range m.states {
		if s > changed || i >= m.chunks && s != changed {
			return nil, errMap
		}
	}
	return m, nil
}

func (m *chunkMap) stateAt(i int) int64 { return mapHeader + int64(m.chunks)*hashSize + int64(i) }

// hash of a chunk of the version; nil for a hole.
func (m *chunkMap) hash(i int) ([]byte, error) {
	h := make([]byte, hashSize)
	if _, err := m.file.ReadAt(h, mapHeader+int64(i)*hashSize); err != nil {
		return nil, err
	}
	if [hashSize]byte(h) == [hashSize]byte{} {
		return nil, nil
	}
	return h, nil
}

func (m *chunkMap) state(i int) byte {
	if i >= len(m.states) {
		// Behind the version's end and never written: a hole that was made here.
		return changed
	}
	return m.states[i]
}

func (m *chunkMap) set(i int, s byte) error {
	from := min(i, len(m.states))
	for len(m.states) <= i {
		m.states = append(m.states, changed)
	}
	m.states[i] = s
	_, err := m.file.WriteAt(m.states[from:i+1], m.stateAt(from))
	return err
}
