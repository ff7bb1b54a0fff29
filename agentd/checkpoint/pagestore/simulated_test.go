package pagestore

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
)

// simulatedKernel makes image directories in CRIU's own format, without a process:
// pagemap-PID.img (8 bytes of magic, then entries of a size and a protobuf message),
// pages-1.img, and a few of the small files beside them. Its memory is a list of
// areas at virtual addresses; cells change some pages and map new areas between the
// others, so that everything behind them moves in pages-1.img.
type simulatedKernel struct {
	rand  *rand.Rand
	areas []simulatedArea // by address
	cell  int
}

type simulatedArea struct {
	addr  uint64
	pages []byte
}

func newSimulatedKernel(seed uint64, mib int) *simulatedKernel {
	k := &simulatedKernel{rand: rand.New(rand.NewPCG(seed, 1))}
	for i := range 8 {
		k.areas = append(k.areas, simulatedArea{addr: 0x7f00_0000_0000 + uint64(i)<<32, pages: k.memory(mib << 20 / 8)})
	}
	return k
}

// memory is a mixture: pages that compress, that don't, and that are zero.
func (k *simulatedKernel) memory(n int) []byte {
	b := make([]byte, n/ChunkSize*ChunkSize)
	for off := 0; off < len(b); off += ChunkSize {
		page := b[off : off+ChunkSize]
		switch k.rand.IntN(8) {
		case 0: // zero
		case 1, 2: // random, as numbers are
			for i := 0; i < len(page); i += 8 {
				binary.LittleEndian.PutUint64(page[i:], k.rand.Uint64())
			}
		default: // pointers and counts, as objects are
			base := k.rand.Uint64() & 0x7fff_ffff_f000
			for i := 0; i < len(page); i += 16 {
				binary.LittleEndian.PutUint64(page[i:], uint64(k.rand.IntN(4)))
				binary.LittleEndian.PutUint64(page[i+8:], base+uint64(k.rand.IntN(64))*64)
			}
		}
	}
	return b
}

// run is a cell: some pages change, and one area is mapped at a low address.
func (k *simulatedKernel) run(dirtyPages, newPages int) {
	k.cell++
	for range dirtyPages {
		a := k.areas[k.rand.IntN(len(k.areas))].pages
		off := k.rand.IntN(len(a)/ChunkSize)*ChunkSize + 8*k.rand.IntN(ChunkSize/8)
		binary.LittleEndian.PutUint64(a[off:], k.rand.Uint64()|1)
	}
	if newPages > 0 {
		a := simulatedArea{addr: 0x5500_0000_0000 + uint64(k.cell)<<28, pages: k.memory(newPages * ChunkSize)}
		k.areas = append([]simulatedArea{a}, k.areas...)
	}
}

// dump writes the image directory.
func (k *simulatedKernel) dump(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	pagemap := binary.LittleEndian.AppendUint64(nil, 0x5608402554564319)
	message := func(fields ...uint64) {
		var m []byte
		for i := 0; i < len(fields); i += 2 {
			m = protowire.AppendTag(m, protowire.Number(fields[i]), protowire.VarintType)
			m = protowire.AppendVarint(m, fields[i+1])
		}
		pagemap = binary.LittleEndian.AppendUint32(pagemap, uint32(len(m)))
		pagemap = append(pagemap, m...)
	}
	message(1, 1)
	pages, err := os.Create(filepath.Join(dir, "pages-1.img"))
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range k.areas {
		message(1, a.addr, 2, 0, 4, 4, 5, uint64(len(a.pages)/ChunkSize))
		if _, err := pages.Write(a.pages); err != nil {
			t.Fatal(err)
		}
	}
	if err := pages.Close(); err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{
		"pagemap-7.img": pagemap,
		"core-7.img":    fmt.Appendf(nil, "registers %d", k.cell),
		"mm-7.img":      make([]byte, 15000),
		"inventory.img": []byte("inventory"),
		"fs-7.img":      {},
	} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}
