package tree

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// The kinds of records. Numbers are in journals on disk: never use one again.
const (
	recNode    = 1  // a node, whole
	recDrop    = 2  // id
	recLink    = 3  // parent, name, id, cookie
	recUnlink  = 4  // parent, name
	recLoaded  = 5  // id, 0 or 1
	recOp      = 6  // number, id, dirs, content, body
	recConfirm = 7  // number
	recMeta    = 8  // all of it
	recReply   = 9  // unique, id
	recContent = 10 // id, bytes: content of a small file at its last close
)

// Batch is changes that are made together or not at all. Its calls change the state at
// once; Bytes is what the journal must hold.
type Batch struct {
	s   *State
	buf []byte
}

// Batch begins a batch.
func (s *State) Batch() *Batch { return &Batch{s: s} }

// Bytes returns the records so far.
func (b *Batch) Bytes() []byte { return b.buf }

// Put says what a node is. The state keeps n.
func (b *Batch) Put(n *Node) {
	b.s.put(n)
	b.buf = appendNode(b.buf, n)
}

// Drop forgets a node. Names of it must be gone.
func (b *Batch) Drop(id uint64) {
	b.s.drop(id)
	b.uints(recDrop, id)
}

// Link says that name in the directory parent is the node id; both are known.
func (b *Batch) Link(parent uint64, name string, id uint64) {
	if err := b.s.link(parent, name, id, 0); err != nil {
		panic(err)
	}
	b.uints(recLink, parent)
	b.string(name)
	b.uint(id)
	b.uint(0)
}

// Unlink says that there is no such name.
func (b *Batch) Unlink(parent uint64, name string) {
	b.s.unlink(parent, name)
	b.uints(recUnlink, parent)
	b.string(name)
}

// Loaded says whether every name of a directory is known.
func (b *Batch) Loaded(id uint64, loaded bool) {
	b.s.loaded(id, loaded)
	var v uint64
	if loaded {
		v = 1
	}
	b.uints(recLoaded, id, v)
}

// Enqueue adds an operation, whose number is Meta's NextOp.
func (b *Batch) Enqueue(op Op) {
	b.s.enqueue(op)
	b.buf = appendOp(b.buf, op)
}

// Confirm removes the operations up to number from the queue.
func (b *Batch) Confirm(number uint64) {
	b.s.confirm(number)
	b.uints(recConfirm, number)
}

// Meta replaces what there is once.
func (b *Batch) Meta(m Meta) {
	b.s.meta = m
	b.buf = appendMeta(b.buf, m)
}

// Reply says what a request was answered.
func (b *Batch) Reply(r Reply) {
	b.s.reply(r)
	b.uints(recReply, r.Unique, r.ID)
}

// Content adds the content of a file, which only the journal keeps.
func (b *Batch) Content(id uint64, content []byte) {
	b.uints(recContent, id)
	b.string(string(content))
}

func (s *State) loaded(id uint64, loaded bool) {
	if n := s.nodes[id]; n != nil && n.Dir != nil {
		n.Dir.Loaded = loaded
	}
}

func (b *Batch) uint(v uint64) { b.buf = binary.AppendUvarint(b.buf, v) }

func (b *Batch) uints(kind byte, vs ...uint64) {
	b.buf = append(b.buf, kind)
	for _, v := range vs {
		b.uint(v)
	}
}

func (b *Batch) string(v string) { b.buf = appendString(b.buf, v) }

func appendString(buf []byte, v string) []byte {
	return append(binary.AppendUvarint(buf, uint64(len(v))), v...)
}

func appendNode(buf []byte, n *Node) []byte {
	buf = append(buf, recNode)
	for _, v := range [...]uint64{
		n.ID, uint64(n.Type), uint64(n.Flags), uint64(n.Mode), uint64(n.UID), uint64(n.GID), n.Size,
		uint64(n.Mtime), uint64(n.Ctime), uint64(n.Btime), uint64(n.Atime), uint64(n.Links), n.Version, n.Seq,
		uint64(n.Stamp), n.Parent, uint64(len(n.Xattrs)),
	} {
		buf = binary.AppendUvarint(buf, v)
	}
	for k, v := range n.Xattrs {
		buf = appendString(appendString(buf, k), v)
	}
	return appendString(buf, n.Target)
}

func appendOp(buf []byte, op Op) []byte {
	var content uint64
	if op.Content {
		content = 1
	}
	buf = append(buf, recOp)
	for _, v := range [...]uint64{op.Number, op.ID, op.Dirs[0], op.Dirs[1], content} {
		buf = binary.AppendUvarint(buf, v)
	}
	return appendString(buf, string(op.Body))
}

func appendMeta(buf []byte, m Meta) []byte {
	buf = append(buf, recMeta)
	buf = appendString(appendString(buf, m.WorkspaceID), m.Boot)
	for _, v := range [...]uint64{m.Seq, m.NextOp, m.QuotaBytes, m.QuotaNodes, m.UsedBytes, m.UsedNodes, uint64(len(m.IDs))} {
		buf = binary.AppendUvarint(buf, v)
	}
	for _, r := range m.IDs {
		buf = binary.AppendUvarint(binary.AppendUvarint(buf, r[0]), r[1])
	}
	return buf
}

var errRecord = errors.New("record is not readable")

// ContentSeen is told of content records when a journal is applied: the offset of the
// content in the payload.
type ContentSeen func(id uint64, offset, length int)

// Apply applies an entry of the journal.
func (s *State) Apply(payload []byte, seen ContentSeen) error {
	r := &reader{buf: payload}
	for !r.done() {
		if err := s.applyOne(r, seen); err != nil {
			return err
		}
		if r.bad {
			return errRecord
		}
	}
	return nil
}

func (s *State) applyOne(r *reader, seen ContentSeen) error {
	switch kind := r.byte(); kind {
	case recNode:
		if n := r.node(); !r.bad {
			s.put(n)
		}
	case recDrop:
		s.drop(r.uint())
	case recLink:
		parent, name, id, cookie := r.uint(), r.string(), r.uint(), r.uint()
		if !r.bad {
			return s.link(parent, name, id, cookie)
		}
	case recUnlink:
		parent, name := r.uint(), r.string()
		s.unlink(parent, name)
	case recLoaded:
		id, v := r.uint(), r.uint()
		s.loaded(id, v != 0)
	case recOp:
		op := Op{Number: r.uint(), ID: r.uint(), Dirs: [2]uint64{r.uint(), r.uint()}, Content: r.uint() != 0}
		op.Body = []byte(r.string())
		if !r.bad {
			s.enqueue(op)
		}
	case recConfirm:
		s.confirm(r.uint())
	case recMeta:
		if m := r.meta(); !r.bad {
			s.meta = m
		}
	case recReply:
		rep := Reply{Unique: r.uint(), ID: r.uint()}
		if !r.bad {
			s.reply(rep)
		}
	case recContent:
		id, n := r.uint(), r.uint()
		at := r.at
		r.skip(n)
		if !r.bad && seen != nil {
			seen(id, at, int(n))
		}
	default:
		return fmt.Errorf("record of unknown kind %d: written by a newer version?", kind)
	}
	return nil
}

// Dump adds records that make this state from an empty one: entries of at most about
// 256 KiB.
func (s *State) Dump(add func(payload []byte) error) error {
	var buf []byte
	flush := func(limit int) error {
		if len(buf) < limit || len(buf) == 0 {
			return nil
		}
		err := add(buf)
		buf = buf[:0]
		return err
	}
	const limit = 256 << 10
	buf = appendMeta(buf, s.meta)
	for _, n := range s.nodes {
		buf = appendNode(buf, n)
		if err := flush(limit); err != nil {
			return err
		}
	}
	for _, n := range s.nodes {
		if n.Dir == nil {
			continue
		}
		for _, e := range n.Dir.entries {
			if e.ID == 0 {
				continue
			}
			buf = append(buf, recLink)
			buf = appendString(binary.AppendUvarint(buf, n.ID), e.Name)
			buf = binary.AppendUvarint(binary.AppendUvarint(buf, e.ID), e.Cookie)
			if err := flush(limit); err != nil {
				return err
			}
		}
		if n.Dir.Loaded {
			buf = append(binary.AppendUvarint(append(buf, recLoaded), n.ID), 1)
		}
	}
	for _, op := range s.queue {
		buf = appendOp(buf, op)
		if err := flush(limit); err != nil {
			return err
		}
	}
	for _, u := range s.order {
		buf = binary.AppendUvarint(binary.AppendUvarint(append(buf, recReply), u), s.replies[u].ID)
	}
	return flush(0)
}

type reader struct {
	buf []byte
	at  int
	bad bool
}

func (r *reader) done() bool { return r.bad || r.at >= len(r.buf) }

func (r *reader) byte() byte {
	if r.at >= len(r.buf) {
		r.bad = true
		return 0
	}
	r.at++
	return r.buf[r.at-1]
}

func (r *reader) uint() uint64 {
	if r.bad {
		return 0
	}
	v, n := binary.Uvarint(r.buf[r.at:])
	if n <= 0 {
		r.bad = true
		return 0
	}
	r.at += n
	return v
}

func (r *reader) skip(n uint64) []byte {
	if r.bad || n > uint64(len(r.buf)-r.at) {
		r.bad = true
		return nil
	}
	r.at += int(n)
	return r.buf[r.at-int(n) : r.at]
}

func (r *reader) string() string { return string(r.skip(r.uint())) }

func (r *reader) node() *Node {
	n := &Node{
		ID: r.uint(), Type: Type(r.uint()), Flags: Flags(r.uint()), Mode: uint16(r.uint()), UID: uint32(r.uint()), GID: uint32(r.uint()),
		Size: r.uint(), Mtime: int64(r.uint()), Ctime: int64(r.uint()), Btime: int64(r.uint()), Atime: int64(r.uint()),
		Links: uint32(r.uint()), Version: r.uint(), Seq: r.uint(), Stamp: int64(r.uint()), Parent: r.uint(),
	}
	for range min(r.uint(), 4096) {
		if n.Xattrs == nil {
			n.Xattrs = map[string]string{}
		}
		k := r.string()
		n.Xattrs[k] = r.string()
		if r.bad {
			return n
		}
	}
	n.Target = r.string()
	if n.ID == 0 || n.Type < File || n.Type > Symlink {
		r.bad = true
	}
	return n
}

func (r *reader) meta() Meta {
	m := Meta{WorkspaceID: r.string(), Boot: r.string(), Seq: r.uint(), NextOp: r.uint(), QuotaBytes: r.uint(), QuotaNodes: r.uint(), UsedBytes: r.uint(), UsedNodes: r.uint()}
	for range min(r.uint(), 1<<16) {
		m.IDs = append(m.IDs, [2]uint64{r.uint(), r.uint()})
		if r.bad {
			return m
		}
	}
	return m
}

// TakeID takes a reserved node id, 0 if there is none. The new Meta is for Batch.Meta, with which the id is used up.
func (m Meta) TakeID() (Meta, uint64) {
	if len(m.IDs) == 0 {
		return m, 0
	}
	id := m.IDs[0][0]
	m.IDs = slices.Clone(m.IDs)
	if m.IDs[0][0]++; m.IDs[0][0] >= m.IDs[0][1] {
		m.IDs = m.IDs[1:]
	}
	return m, id
}

// FreeIDs is the number of reserved ids.
func (m Meta) FreeIDs() (n uint64) {
	for _, r := range m.IDs {
		n += r[1] - r[0]
	}
	return n
}
