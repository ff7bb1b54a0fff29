package fuseserver

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
)

// backings is the table of backing ids of one connection, and the file that carries it
// over to the next server. The file lives as long as the connection, so it must outlive
// processes, not the host: it is never synced. A record is
//
//	op u32 (1 add, 2 remove), id i32, node u64, key u64, little endian
//
// and a cut last one counts as not written. A crash between the kernel's call and the
// record leaves an id registered until the connection ends, which holds a file's space
// and no more.
type backings struct {
	path  string // "": kept in memory alone
	file  *os.File
	nodes map[uint64]*backing
	lines int // records in the file
}

type backing struct {
	id   int32
	keys map[uint64]bool
}

const (
	recordSize   = 24
	recordAdd    = 1
	recordRemove = 2
	// compactAt is how many records more than open files the file may have.
	compactAt = 4096
)

func openBackings(path string, fresh bool) (*backings, error) {
	b := &backings{path: path, nodes: map[uint64]*backing{}}
	if path == "" {
		return b, nil
	}
	flags := os.O_RDWR | os.O_CREATE
	if fresh {
		flags |= os.O_TRUNC
	}
	f, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		return nil, fmt.Errorf("backing ids: %w", err)
	}
	b.file = f
	if err := b.read(); err != nil {
		return nil, errors.Join(fmt.Errorf("backing ids of %s: %w", path, err), f.Close())
	}
	return b, nil
}

func (b *backings) read() error {
	text, err := io.ReadAll(b.file)
	if err != nil {
		return err
	}
	whole := len(text) / recordSize * recordSize
	for at := 0; at < whole; at += recordSize {
		r := text[at : at+recordSize]
		op, id := binary.LittleEndian.Uint32(r), int32(binary.LittleEndian.Uint32(r[4:]))
		node, key := binary.LittleEndian.Uint64(r[8:]), binary.LittleEndian.Uint64(r[16:])
		switch op {
		case recordAdd:
			b.put(node, key, id)
		case recordRemove:
			b.drop(node, key)
		default:
			return fmt.Errorf("record %d is of no known kind: %d", at/recordSize, op)
		}
		b.lines++
	}
	if err := b.file.Truncate(int64(whole)); err != nil {
		return err
	}
	_, err = b.file.Seek(int64(whole), io.SeekStart)
	return err
}

func (b *backings) put(node, key uint64, id int32) {
	n := b.nodes[node]
	if n == nil {
		n = &backing{keys: map[uint64]bool{}}
		b.nodes[node] = n
	}
	n.id = id
	n.keys[key] = true
}

func (b *backings) drop(node, key uint64) (id int32, last bool) {
	n := b.nodes[node]
	if n == nil || !n.keys[key] {
		return 0, false
	}
	delete(n.keys, key)
	if len(n.keys) == 0 {
		delete(b.nodes, node)
		return n.id, true
	}
	return n.id, false
}

func (b *backings) id(node uint64) (int32, bool) {
	n := b.nodes[node]
	if n == nil {
		return 0, false
	}
	return n.id, true
}

func (b *backings) has(node, key uint64) bool {
	n := b.nodes[node]
	return n != nil && n.keys[key]
}

func (b *backings) add(node, key uint64, id int32) error {
	if b.has(node, key) {
		return nil
	}
	if err := b.write(record(recordAdd, node, key, id)); err != nil {
		return err
	}
	b.put(node, key, id)
	return nil
}

func (b *backings) remove(node, key uint64) (id int32, last bool, err error) {
	n := b.nodes[node]
	if n == nil || !n.keys[key] {
		return 0, false, nil
	}
	if err := b.write(record(recordRemove, node, key, n.id)); err != nil {
		return 0, false, err
	}
	id, last = b.drop(node, key)
	return id, last, b.compact()
}

func record(op uint32, node, key uint64, id int32) []byte {
	r := make([]byte, 0, recordSize)
	r = binary.LittleEndian.AppendUint32(r, op)
	r = binary.LittleEndian.AppendUint32(r, uint32(id))
	r = binary.LittleEndian.AppendUint64(r, node)
	return binary.LittleEndian.AppendUint64(r, key)
}

func (b *backings) write(r []byte) error {
	if b.file == nil {
		return nil
	}
	if _, err := b.file.Write(r); err != nil {
		return fmt.Errorf("backing ids: %w", err)
	}
	b.lines++
	return nil
}

// compact writes the file anew when most of it is history.
func (b *backings) compact() error {
	opens := 0
	for _, n := range b.nodes {
		opens += len(n.keys)
	}
	if b.file == nil || b.lines < compactAt+2*opens {
		return nil
	}
	var all []byte
	for node, n := range b.nodes {
		for key := range n.keys {
			all = append(all, record(recordAdd, node, key, n.id)...)
		}
	}
	next, err := os.OpenFile(b.path+".new", os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("backing ids: %w", err)
	}
	_, err = next.Write(all)
	if err == nil {
		err = os.Rename(b.path+".new", b.path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("backing ids: %w", err), next.Close())
	}
	old := b.file
	b.file, b.lines = next, opens
	return old.Close()
}

func (b *backings) counts() map[uint64]int {
	out := make(map[uint64]int, len(b.nodes))
	for node, n := range b.nodes {
		out[node] = len(n.keys)
	}
	return out
}

func (b *backings) close() error {
	if b.file == nil {
		return nil
	}
	return b.file.Close()
}
