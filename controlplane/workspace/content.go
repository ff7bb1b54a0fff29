package workspace

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"

	protobuf "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/controlplane/filetree"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/filechunk"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// content is what a file is to hold: names of chunks, or the bytes themselves.
type content struct {
	size   uint64
	chunks [][]byte
	inline []byte
}

// check reports what is wrong with a content on its face.
func (c content) check() error {
	if len(c.inline) > 0 {
		if len(c.chunks) > 0 || len(c.inline) > filechunk.MaxInline || uint64(len(c.inline)) != c.size {
			return proto.Errorf(proto.CodeInvalid, "an inline content of %d bytes for a file of %d with %d chunks: give either, inline at most %d bytes", len(c.inline), c.size, len(c.chunks), filechunk.MaxInline)
		}
		return nil
	}
	if err := filechunk.Check(c.size, c.chunks); err != nil {
		return proto.Errorf(proto.CodeInvalid, "%s", err.Error())
	}
	return nil
}

// names are the names of the content's chunks.
func (c content) names() [][]byte {
	if len(c.inline) > 0 {
		return filechunk.Names(c.inline)
	}
	return c.chunks
}

func (c content) etag() filetree.Hash {
	var sum filetree.Hash
	hex.Decode(sum[:], []byte(filechunk.ETag(c.size, c.names()))) //nolint:errcheck // it is hex of that length
	return sum
}

// missingChunkError says that a content names a chunk that was not stored.
type missingChunkError struct{ err error }

func (e *missingChunkError) Error() string { return e.err.Error() }
func (e *missingChunkError) Unwrap() error { return e.err }

// stored checks that the workspace holds all chunks, with the right lengths, and returns
// how many bytes they have.
func (t *tree) stored(c content) (uint64, error) {
	if len(c.inline) > 0 {
		return uint64(len(c.inline)), nil
	}
	want := make([]filetree.Hash, 0, len(c.chunks))
	seen := make(map[filetree.Hash]bool, len(c.chunks))
	for _, name := range c.chunks {
		if len(name) == 0 {
			continue
		}
		if hash := filetree.Hash(name); !seen[hash] {
			seen[hash] = true
			want = append(want, hash)
		}
	}
	sizes, err := t.tx.Chunks(t.ctx, want)
	if err != nil {
		return 0, err
	}
	var stored uint64
	for i, name := range c.chunks {
		if len(name) == 0 {
			continue
		}
		size, have := sizes[filetree.Hash(name)]
		if !have {
			return 0, &missingChunkError{proto.Errorf(proto.CodeNotFound, "chunk %x is not stored in this workspace: store it first", name[:8])}
		}
		if length := filechunk.Length(c.size, uint64(i)); int(size) != length {
			return 0, proto.Errorf(proto.CodeInvalid, "chunk %d of the file has %d bytes: it must have %d", i, size, length)
		}
		stored += uint64(size)
	}
	return stored, nil
}

// current reports whether a file has this content already.
func (t *tree) current(n *node, c content) (bool, error) {
	if n.Version == 0 || n.Size != c.size {
		return false, nil
	}
	v, err := t.tx.Version(t.ctx, n.ID, n.Version)
	if err != nil || v == nil {
		return false, err
	}
	return v.ETag == c.etag(), nil
}

// setVersion makes a content a file's next version. The same content again is none.
func (t *tree) setVersion(n *node, c content, base uint64, mtime, at int64) error {
	if same, err := t.current(n, c); err != nil || same {
		if same && mtime != n.Mtime {
			n.Mtime, n.Ctime = mtime, at
			t.touch(n)
		}
		return err
	}
	stored, err := t.stored(c)
	if err != nil {
		return err
	}
	if err := t.keep(stored); err != nil {
		return err
	}
	if err := t.charge(0, int64(stored)-int64(n.Stored), false); err != nil {
		return err
	}
	if err := t.addVersion(n, c, base, stored); err != nil {
		return err
	}
	n.Mtime, n.Ctime = mtime, at
	return nil
}

// addVersion writes a file's next version and the file's row; who calls has charged it.
func (t *tree) addVersion(n *node, c content, base, stored uint64) error {
	v := filetree.Version{
		Node: n.ID, Version: n.Version + 1, Base: base, Size: c.size, Stored: stored, Created: t.now, By: t.by, ETag: c.etag(),
	}
	lists := map[filetree.Hash][]byte{}
	if len(c.inline) > 0 {
		v.Inline = c.inline
	} else {
		for part := range slices.Chunk(c.chunks, filetree.SegmentChunks) {
			list := make([]byte, sha256.Size*len(part))
			for i, name := range part {
				copy(list[i*sha256.Size:], name)
			}
			hash := sha256.Sum256(list)
			lists[hash] = list
			v.Segments = append(v.Segments, hash)
		}
	}
	if err := t.tx.PutVersion(t.ctx, &v, lists); err != nil {
		return err
	}
	n.Version, n.Size, n.Stored = v.Version, v.Size, v.Stored
	t.touch(n)
	return t.thin(n)
}

// encodeXattrs is how extended attributes are stored; nil for none.
func encodeXattrs(all map[string][]byte) ([]byte, error) {
	if len(all) == 0 {
		return nil, nil
	}
	if len(all) > maxXattrs {
		return nil, proto.Errorf(proto.CodeInvalid, "%d extended attributes: at most %d", len(all), maxXattrs)
	}
	total := 0
	for name, value := range all {
		if err := checkXattr(name); err != nil {
			return nil, err
		}
		total += len(value)
	}
	if total > maxXattrBytes {
		return nil, proto.Errorf(proto.CodeInvalid, "extended attributes of %d bytes: at most %d", total, maxXattrBytes)
	}
	return protobuf.MarshalOptions{Deterministic: true}.Marshal(&posternv1.Node{Xattrs: all})
}

func checkXattr(name string) error {
	if len(name) <= len("user.") || len(name) > maxXattrName || name[:len("user.")] != "user." || slices.Contains([]byte(name), 0) {
		return proto.Errorf(proto.CodeInvalid, "%q is no name for an extended attribute: it begins with \"user.\" and has at most %d bytes", clip(name), maxXattrName)
	}
	return nil
}

func decodeXattrs(encoded []byte) (map[string][]byte, error) {
	if len(encoded) == 0 {
		return nil, nil
	}
	var n posternv1.Node
	if err := protobuf.Unmarshal(encoded, &n); err != nil {
		return nil, fmt.Errorf("extended attributes in the store: %w", err)
	}
	return n.Xattrs, nil
}

// protoNode is a node for the wire.
func protoNode(n *filetree.Node) (*posternv1.Node, error) {
	xattrs, err := decodeXattrs(n.Xattrs)
	if err != nil {
		return nil, err
	}
	return &posternv1.Node{
		Id: n.ID, Type: posternv1.NodeType(n.Type), Mode: n.Mode, Uid: n.UID, Gid: n.GID, Size: n.Size,
		MtimeNs: n.Mtime, CtimeNs: n.Ctime, BtimeNs: n.Btime, Links: n.Links, Target: n.Target, Version: n.Version,
		Xattrs: xattrs, Seq: n.Seq, Inline: n.Inline, HasInline: n.HasInline,
	}, nil
}
