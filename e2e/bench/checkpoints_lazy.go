package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// readAll reads the whole of the frame that the sizes above 60 MB have.
const readAll = "float(df.select_dtypes('number').sum().sum()) + sum(df[c].str.len().sum() for c in df.select_dtypes('object'))"

// lazily compares a restore that copies all memory first with one whose pages come when they
// are touched (userfaultfd, criu lazy-pages), of the same images in the same tmpfs: to the
// first result of a cell that touches next to nothing, and of one that reads all of it.
// It is what a lazy restore of Postern's could come to at best: from the store each page
// costs more.
func (b *checkpointBench) lazily(ctx context.Context, sizes []size) error {
	if out, err := exec.CommandContext(ctx, b.criu, "check", "--feature", "uffd").CombinedOutput(); err != nil {
		b.r.Printf("lazy restore not measured: criu check --feature uffd says %.200s", out)
		return nil
	}
	for _, z := range sizes {
		raw, err := startRawKernel(ctx, b.criu, z.cell)
		if err != nil {
			return err
		}
		err = b.lazilyOf(ctx, raw, z)
		raw.end()
		if err != nil {
			return fmt.Errorf("lazy restore of %s: %w", z.name, err)
		}
	}
	return nil
}

func (b *checkpointBench) lazilyOf(ctx context.Context, raw *rawKernel, z size) error {
	var first, all, whole [2][]float64 // eager, lazy
	for i := range 2 * z.rounds {
		cell := "6*7"
		if i%2 == 1 && z.name != "60MB" {
			cell = readAll
		}
		for lazy := range 2 {
			took, done, err := raw.restoreOnce(ctx, lazy == 1, cell)
			if err != nil {
				return err
			}
			if cell == readAll {
				all[lazy] = append(all[lazy], took)
			} else {
				first[lazy] = append(first[lazy], took)
			}
			whole[lazy] = append(whole[lazy], done)
		}
	}
	b.r.Printf("%s: criu restore to the first result: %.0f ms copied first, %.0f ms lazily; all memory is there after %.0f ms, %.0f ms", z.name, median(first[0]), median(first[1]), median(whole[0]), median(whole[1]))
	if len(all[0]) > 0 {
		b.r.Printf("%s: to the result of a cell that reads all memory: %.0f ms copied first, %.0f ms lazily", z.name, median(all[0]), median(all[1]))
	}
	return nil
}

// restoreOnce ends the kernel with a dump and restores it, and times the result of a cell of
// a client that waits, and when all of its memory was there.
func (k *rawKernel) restoreOnce(ctx context.Context, lazy bool, cell string) (result, whole float64, err error) {
	i, err := k.dump(ctx, false)
	if err != nil {
		return 0, 0, err
	}
	defer i.remove()
	var status unix.WaitStatus
	if _, err := unix.Wait4(k.pid, &status, 0, nil); err != nil && !errors.Is(err, unix.ECHILD) {
		return 0, 0, err
	}
	p, err := k.client(ctx, "")
	if err != nil {
		return 0, 0, err
	}
	args := []string{"restore", "-d", "-D", i.dir, "-o", "restore.log", "-v2", "--tcp-established", "--manage-cgroups=ignore", "--network-lock", "skip"}
	began := time.Now()
	var pages *exec.Cmd
	if lazy {
		pages = exec.CommandContext(ctx, k.criu, "lazy-pages", "-D", i.dir, "-W", i.dir, "-o", "pages.log", "-v2")
		if err := pages.Start(); err != nil {
			return 0, 0, err
		}
		defer func() {
			if pages.ProcessState == nil {
				_ = pages.Process.Kill()
				_ = pages.Wait()
			}
		}()
		for socket := filepath.Join(i.dir, "lazy-pages.socket"); ; time.Sleep(time.Millisecond) {
			if _, err := os.Stat(socket); err == nil {
				break
			}
			if time.Since(began) > 30*time.Second {
				log, _ := os.ReadFile(filepath.Join(i.dir, "pages.log"))
				return 0, 0, fmt.Errorf("criu lazy-pages does not listen: %.2000s", log)
			}
		}
		args = append(args, "--lazy-pages", "-W", i.dir)
	}
	if out, err := exec.CommandContext(ctx, k.criu, args...).CombinedOutput(); err != nil {
		log, _ := os.ReadFile(filepath.Join(i.dir, "restore.log"))
		return 0, 0, fmt.Errorf("criu %v: %w: %s %.2000s", args, err, out, log)
	}
	whole = since(began)
	if err := p.run(k.connection, cell); err != nil {
		return 0, 0, err
	}
	result = since(began)
	if pages != nil {
		if err := pages.Wait(); err != nil {
			log, _ := os.ReadFile(filepath.Join(i.dir, "pages.log"))
			return 0, 0, fmt.Errorf("criu lazy-pages: %w: %.2000s", err, log)
		}
		whole = since(began)
	}
	return result, whole, p.close()
}
