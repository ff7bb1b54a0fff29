package pagestore

import (
	"os"
	"testing"
)

// The benchmarks work on simulated images of 256 MiB, on the disk of TempDir; copying
// the same images is what to hold them against. Figures of real images are in
// docs/performance.md.

func BenchmarkPutFirst(b *testing.B) {
	images := newSimulatedKernel(1, 256).dump(b)
	b.SetBytes(256 << 20)
	for b.Loop() {
		s := openStore(b, b.TempDir(), synced)
		_, st := mustPut(b, s, meta("k1"), images)
		b.ReportMetric(float64(st.Written)/float64(st.Size), "stored/raw")
	}
}

func BenchmarkPutAfterSmallCell(b *testing.B) {
	k := newSimulatedKernel(1, 256)
	s := openStore(b, b.TempDir(), synced)
	mustPut(b, s, meta("k1"), k.dump(b))
	k.run(500, 50)
	images := k.dump(b)
	b.SetBytes(256 << 20)
	first := true
	for b.Loop() {
		_, st := mustPut(b, s, meta("k1"), images)
		if first {
			b.ReportMetric(float64(st.Written)/float64(st.Size), "stored/raw")
			first = false
		}
	}
}

func BenchmarkRestore(b *testing.B) {
	s := openStore(b, b.TempDir())
	c, _ := mustPut(b, s, meta("k1"), newSimulatedKernel(1, 256).dump(b))
	b.SetBytes(256 << 20)
	for b.Loop() {
		restored(b, s, c.ID)
	}
}

func BenchmarkCopy(b *testing.B) {
	images := newSimulatedKernel(1, 256).dump(b)
	b.SetBytes(256 << 20)
	for b.Loop() {
		if err := os.CopyFS(b.TempDir(), os.DirFS(images)); err != nil {
			b.Fatal(err)
		}
	}
}
