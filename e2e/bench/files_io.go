package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// cost is what something took: time, and the CPU of this process and of mountd.
type cost struct{ wall, cpu time.Duration }

// cost runs f, which uses the mount or the disk and nothing else.
func (b *filesBench) cost(f func() error) (cost, error) {
	began, self, other := time.Now(), cpuSelf(), cpuTime(b.pid)
	if err := f(); err != nil {
		return cost{}, err
	}
	return cost{time.Since(began), cpuSelf() - self + cpuTime(b.pid) - other}, nil
}

// costs are the rounds of one thing on the disk and on the mount.
type costs struct{ native, mount []cost }

// speed is how fast the mount is, the disk being 1: medians.
func (c costs) speed() float64 { return seconds(c.native) / seconds(c.mount) }

// best is the same of the fastest round of each, to tell how far noise goes.
func (c costs) best() float64 {
	fastest := func(c []cost) time.Duration {
		return slices.MinFunc(c, func(x, y cost) int { return cmp.Compare(x.wall, y.wall) }).wall
	}
	return float64(fastest(c.native)) / float64(fastest(c.mount))
}

// cpu is what the mount takes, the disk being 1: sums, since mountd's is counted in
// hundredths of a second.
func (c costs) cpu() float64 { return float64(sumCPU(c.mount)) / float64(sumCPU(c.native)) }

func seconds(c []cost) float64 {
	out := make([]float64, len(c))
	for i, x := range c {
		out[i] = x.wall.Seconds()
	}
	return median(out)
}

func sumCPU(c []cost) (sum time.Duration) {
	for _, x := range c {
		sum += x.cpu
	}
	return sum
}

// turns measures f in both directories in turn, the first round not counted; settle
// comes before each.
func (b *filesBench) turns(rounds int, native, mount string, settle func() error, f func(dir string, round int) error) (c costs, err error) {
	for round := range rounds + 1 {
		for i, dir := range []string{native, mount} {
			if err := settle(); err != nil {
				return c, err
			}
			x, err := b.cost(func() error { return f(dir, round) })
			if err != nil {
				return c, err
			}
			switch {
			case round == 0:
			case i == 0:
				c.native = append(c.native, x)
			default:
				c.mount = append(c.mount, x)
			}
		}
	}
	return c, nil
}

// print says what one of n operations took.
func (b *filesBench) print(what string, c costs, n int) {
	each := func(c []cost) string {
		return fmt.Sprintf("%.2f us, %.2f us of CPU", seconds(c)*1e6/float64(n), sumCPU(c).Seconds()*1e6/float64(n)/float64(len(c)))
	}
	b.r.Printf("%s: native %s; mount %s", what, each(c.native), each(c.mount))
}

// warm reads a file that is here, and writes to it in place.
func (b *filesBench) warm(ctx context.Context, size fileSizes) error {
	dir := b.lab
	if err := errors.Join(fill(filepath.Join(b.native, "big"), size.file, 1), fill(filepath.Join(dir, "big"), size.file, 1)); err != nil {
		return err
	}
	took, err := b.drain(ctx)
	if err != nil {
		return err
	}
	b.r.Printf("%d MiB sent %.1f s after they were written", size.file>>20, took.Seconds())
	quiet := func() error { return nil }
	c, err := b.turns(4*size.rounds, b.native, dir, quiet, func(dir string, _ int) error {
		return readThrough(filepath.Join(dir, "big"), size.file)
	})
	if err != nil {
		return err
	}
	b.print("warm sequential read of 1 MiB", c, int(size.file>>20))
	b.r.Printf("of the medians %.2f, of the fastest rounds %.2f", c.speed(), c.best())
	b.r.AtLeast("files-warm-read", c.speed(), 0.9, "x")
	b.r.AtMost("files-warm-read-cpu", c.cpu(), 1.15, "x")

	c, err = b.turns(size.rounds, b.native, dir, quiet, func(dir string, round int) error {
		return accesses(filepath.Join(dir, "big"), size, round, unix.Pread)
	})
	if err != nil {
		return err
	}
	b.print("warm random read of 4 KiB", c, size.random)
	b.r.Printf("of the medians %.2f, of the fastest rounds %.2f", c.speed(), c.best())
	b.r.AtLeast("files-warm-random-read", c.speed(), 0.8, "x")
	b.r.AtMost("files-warm-random-read-cpu", c.cpu(), 1.15, "x")

	settle := func() error { _, err := b.drain(ctx); return err }
	c, err = b.turns(size.rounds, b.native, dir, settle, func(dir string, round int) error {
		return accesses(filepath.Join(dir, "big"), size, round, unix.Pwrite)
	})
	if err != nil {
		return err
	}
	b.print("random write of 4 KiB to a file that is here", c, size.random)
	b.r.AtMost("files-random-write-cpu", c.cpu(), 1.5, "x")
	return nil
}

// fill writes a file of bytes that nothing compresses, and syncs it.
func fill(path string, n int64, seed byte) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = io.CopyN(f, rand.NewChaCha8([32]byte{seed}), n)
	return errors.Join(err, f.Sync(), f.Close())
}

// readThrough reads a file of n bytes in steps of 1 MiB.
func readThrough(path string, n int64) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	var sum int64
	for {
		got, err := unix.Read(int(f.Fd()), buf)
		if err != nil {
			return fmt.Errorf("read %s at %d: %w", path, sum, err)
		}
		if sum += int64(got); got == 0 {
			break
		}
	}
	if sum != n {
		return fmt.Errorf("%s has %d bytes, not %d", path, sum, n)
	}
	return nil
}

// accesses calls pread or pwrite at random places, the same for each directory.
func accesses(path string, size fileSizes, round int, access func(fd int, p []byte, off int64) (int, error)) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	fd, buf := int(f.Fd()), make([]byte, 4096)
	r := rand.New(rand.NewPCG(uint64(round), 1))
	for range size.random {
		off := r.Int64N(size.file/4096) * 4096
		if n, err := access(fd, buf, off); err != nil || n != len(buf) {
			return fmt.Errorf("%s at %d: %d bytes, %w", path, off, n, err)
		}
	}
	return nil
}

// staged writes new files and syncs them; sending them is not counted, and is waited for
// before the next one. Most programs open what they make for writing alone (cp, tar, dd, Python's open
// for writing); some for reading, too (SQLite, fio).
func (b *filesBench) staged(ctx context.Context, size fileSizes) error {
	for _, way := range []struct {
		name, figure string
		flag         int
	}{{"write", "files-staged-write", unix.O_WRONLY}, {"write by a handle that may read", "files-staged-read-write", unix.O_RDWR}} {
		content := make([]byte, size.written)
		settle := func() error {
			_, _ = rand.NewChaCha8([32]byte{byte(time.Now().UnixNano())}).Read(content)
			_, err := b.drain(ctx)
			return err
		}
		sending := cpuTime(b.pid)
		c, err := b.turns(size.rounds, b.native, b.lab, settle, func(dir string, round int) error {
			f, err := os.OpenFile(filepath.Join(dir, fmt.Sprintf("new-%s-%d", way.figure, round)), os.O_CREATE|os.O_EXCL|way.flag, 0o644)
			if err != nil {
				return err
			}
			for part := content; len(part) > 0 && err == nil; part = part[min(1<<20, len(part)):] {
				_, err = f.Write(part[:min(1<<20, len(part))])
			}
			return errors.Join(err, f.Sync(), f.Close())
		})
		if err != nil {
			return err
		}
		if _, err := b.drain(ctx); err != nil {
			return err
		}
		b.print(way.name+" of 1 MiB to a new file, fsync at its end", c, int(size.written>>20))
		b.r.Printf("mountd in all, sending included: %.2f CPU s/GB", perGB(cpuTime(b.pid)-sending, size.written*int64(size.rounds+1)))
		b.r.AtLeast(way.figure+"-fsync", c.speed(), 0.5, "x")
		b.r.AtMost(way.figure+"-cpu", c.cpu(), 1.5, "x")
	}
	return nil
}
