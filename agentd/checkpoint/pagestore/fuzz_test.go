package pagestore

import (
	"bytes"
	"path/filepath"
	"slices"
	"testing"
)

// sampleManifest has every kind of entry and run.
func sampleManifest() *manifest {
	return &manifest{
		trees: []string{"images", "private"},
		packs: []packID{newPackID(), newPackID()},
		entries: []*entry{
			{path: ".", kind: kindDir, mode: 0o700},
			{path: "pages-1.img", kind: kindFile, mode: 0o600, size: 9*ChunkSize + 5, runs: []run{
				{pack: 0, first: 3, count: 4}, {pack: zeroPack, count: 2}, {pack: 1, first: packChunks - 4, count: 4},
			}},
			{tree: 1, path: ".", kind: kindDir, mode: 0o755},
			{tree: 1, path: "d", kind: kindDir, mode: 0o1777, uid: 1, gid: 2, mtime: -5},
			{tree: 1, path: "d/\xff", kind: kindSymlink, link: "../x"},
			{tree: 1, path: "d/p", kind: kindFIFO},
		},
	}
}

// FuzzManifest: whatever bytes a list of files holds, it is refused or obeys the rules
// that Restore relies on, and comes out the same when it is written again.
func FuzzManifest(f *testing.F) {
	m := sampleManifest()
	plain, err := encodePlain(m)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(plain)
	f.Add([]byte{})
	for i := range plain {
		bad := bytes.Clone(plain)
		bad[i] ^= 0x81
		f.Add(bad)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := parseManifest(data)
		if err != nil {
			return
		}
		for _, e := range m.entries {
			if !filepath.IsLocal(e.path) || e.tree >= len(m.trees) {
				t.Fatalf("path %q of tree %d", e.path, e.tree)
			}
			chunks := int64(0)
			for _, r := range e.runs {
				chunks += int64(r.count)
				if r.pack != zeroPack && (int(r.pack) >= len(m.packs) || int64(r.first)+int64(r.count) > packChunks) {
					t.Fatalf("run %+v", r)
				}
			}
			if e.kind == kindFile && chunks != chunksOf(e.size) {
				t.Fatalf("%d chunks for %d bytes", chunks, e.size)
			}
		}
		again, err := encodePlain(m)
		if err != nil {
			t.Fatal(err)
		}
		back, err := parseManifest(again)
		if err != nil || len(back.entries) != len(m.entries) {
			t.Fatalf("does not come back: %v", err)
		}
		for i := range m.entries {
			if !slices.Equal(back.entries[i].runs, m.entries[i].runs) {
				t.Fatalf("entry %d: %v became %v", i, m.entries[i].runs, back.entries[i].runs)
			}
		}
	})
}

func encodePlain(m *manifest) ([]byte, error) {
	packed, err := m.encode()
	if err != nil {
		return nil, err
	}
	return unpackManifest(packed)
}

// FuzzPackTable: a table is refused, or its segments lie within the file.
func FuzzPackTable(f *testing.F) {
	row := []byte{1, segmentChunks, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1}
	f.Add(slices.Concat(row, row), int64(packHead+512), 2*segmentChunks*16+sealedMore)
	f.Add(row[:13], int64(packHead), 0)
	f.Fuzz(func(t *testing.T, table []byte, end int64, hashesLen int) {
		p := &pack{hashesLen: hashesLen}
		if p.parseTable(table, end) != nil {
			return
		}
		if len(p.segs) > packSegments || p.chunks > packChunks {
			t.Fatalf("%d segments, %d chunks", len(p.segs), p.chunks)
		}
		for i, s := range p.segs {
			if s.offset < int64(packHead) || s.offset+int64(s.stored) > end || s.chunks > segmentChunks {
				t.Fatalf("segment %d: %+v", i, s)
			}
			s.alive(0, segmentChunks)
		}
	})
}

// FuzzSegment: what a decompressor makes of hostile bytes is an error or exactly the
// segment's size.
func FuzzSegment(f *testing.F) {
	s := newScratch()
	f.Cleanup(s.close)
	keys, err := deriveKeys(testKey, "org_a")
	if err != nil {
		f.Fatal(err)
	}
	aead, err := keys.packKey(packID{}, make([]byte, 32))
	if err != nil {
		f.Fatal(err)
	}
	for _, c := range []codec{codecLZ4, codecZstd} {
		got, sealed, err := s.pack(nil, c, aead, 0, bytes.Repeat([]byte("abcdefgh"), 2*ChunkSize/8))
		if err != nil || got != c {
			f.Fatalf("codec %d: %v", got, err)
		}
		body, err := aead.Open(nil, counterNonce(0), sealed, []byte{byte(c)})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(byte(c), body, uint8(2))
	}
	f.Fuzz(func(t *testing.T, c byte, body []byte, chunks uint8) {
		if codec(c) >= codecGone || chunks == 0 || chunks > segmentChunks {
			return
		}
		out, err := s.unpack(codec(c), body, int(chunks))
		if err == nil && codec(c) != codecRaw && len(out) > segmentSize {
			t.Fatalf("%d bytes", len(out))
		}
	})
}

// FuzzImport: a stream from a peer never panics, and what it stores is sound.
func FuzzImport(f *testing.F) {
	here := openStore(f, f.TempDir())
	c, _ := mustPut(f, here, meta("k1"), tinyTree(f, "hello"))
	var stream bytes.Buffer
	if err := here.Export(f.Context(), c.ID, &stream, nil); err != nil {
		f.Fatal(err)
	}
	plain, err := unpackManifest(stream.Bytes())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(plain)
	there := openStore(f, f.TempDir())
	f.Fuzz(func(t *testing.T, data []byte) {
		c, _, err := there.Import(t.Context(), bytes.NewReader(rawZstd(data)), func(m *Meta) error { m.Kernel, m.Organization = "k", "o"; return nil }, nil)
		if err != nil {
			return
		}
		if p, err := there.Verify(t.Context()); err != nil || len(p) > 0 {
			t.Fatalf("verify: %v %v", p, err)
		}
		if err := there.Delete(c.ID); err != nil {
			t.Fatal(err)
		}
	})
}

// rawZstd wraps data into a zstd frame of raw blocks.
func rawZstd(data []byte) []byte {
	out := []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x58} // magic, no content size or checksum, a window of 2 MiB
	for {
		n := min(len(data), 64<<10)
		last := 0
		if n == len(data) {
			last = 1
		}
		head := n<<3 | last
		out = append(out, byte(head), byte(head>>8), byte(head>>16))
		out = append(out, data[:n]...)
		if data = data[n:]; last == 1 {
			return out
		}
	}
}
