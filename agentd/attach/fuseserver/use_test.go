package fuseserver

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// useMain uses a mounted shelf, in a process of its own, and prints one line: "ok ...", or
// what went wrong.
func useMain() int {
	dir := os.Args[2]
	switch os.Args[1] {
	case "load":
		span, err := time.ParseDuration(os.Args[3])
		if err != nil {
			fmt.Println(err)
			return 1
		}
		return load(dir, span)
	case "scan": // reads a file without its page cache, in blocks, and says what it read and its own CPU time
		return scan(filepath.Join(dir, os.Args[3]), os.Args[4], os.Args[5])
	case "read":
		began := time.Now()
		text, err := os.ReadFile(filepath.Join(dir, os.Args[3]))
		var errno syscall.Errno
		errors.As(err, &errno)
		fmt.Printf("%q %v %d\n", text, errno, time.Since(began).Milliseconds())
		return 0
	case "hold": // opens a file, then reads it at each line of standard input
		f, err := os.OpenFile(filepath.Join(dir, os.Args[3]), os.O_RDWR, 0)
		if err != nil {
			fmt.Println(err)
			return 1
		}
		fmt.Println("open")
		var line [1]byte
		for {
			if _, err := os.Stdin.Read(line[:]); err != nil {
				return 0
			}
			buf := make([]byte, 5)
			_, err := f.ReadAt(buf, 0)
			fmt.Printf("%q %v\n", buf, err)
		}
	}
	return 1
}

// load writes and reads blocks, opens files and stats them, in parallel, for a while; any
// error and any byte that is not what was written last ends it.
func load(dir string, span time.Duration) int {
	const block, blocks = 16 << 10, 64
	var mu sync.Mutex
	var worst time.Duration
	var total int
	var failed error
	until := time.Now().Add(span)
	one := func(what string, do func() error) bool {
		began := time.Now()
		err := do()
		took := time.Since(began)
		mu.Lock()
		defer mu.Unlock()
		total++
		worst = max(worst, took)
		if err != nil && failed == nil {
			failed = fmt.Errorf("%s: %w", what, err)
		}
		return failed == nil && time.Now().Before(until)
	}
	var wg sync.WaitGroup
	for _, name := range []string{"f0", "f1", "p0", "p1"} {
		path := filepath.Join(dir, name)
		wg.Go(func() { // one writer for each file, which knows what must be there
			var f *os.File
			if !one("open", func() (err error) { f, err = os.OpenFile(path, os.O_RDWR, 0); return err }) {
				return
			}
			want := map[int]byte{}
			for {
				at, fill := rand.IntN(blocks), byte(rand.IntN(256))
				if !one("write", func() error {
					_, err := f.WriteAt(bytes.Repeat([]byte{fill}, block), int64(at)*block)
					return err
				}) {
					break
				}
				want[at] = fill
				if !one("read back", func() error {
					for at, fill := range want {
						got := make([]byte, block)
						if _, err := f.ReadAt(got, int64(at)*block); err != nil {
							return err
						}
						if !bytes.Equal(got, bytes.Repeat([]byte{fill}, block)) {
							return fmt.Errorf("%s: block %d is not what was written", path, at)
						}
						break
					}
					return nil
				}) {
					break
				}
			}
			one("close", f.Close)
		})
		wg.Go(func() {
			for one("reopen", func() error {
				f, err := os.OpenFile(path, os.O_RDWR, 0)
				if err != nil {
					return err
				}
				_, err = f.ReadAt(make([]byte, 512), 0)
				if errors.Is(err, io.EOF) {
					err = nil
				}
				return errors.Join(err, f.Close())
			}) {
				_ = 0
			}
		})
	}
	wg.Go(func() {
		for one("stat", func() error { _, err := os.Stat(filepath.Join(dir, "f2")); return err }) {
			_ = 0
		}
	})
	wg.Wait()
	if failed != nil {
		fmt.Println(failed)
		return 1
	}
	fmt.Println("ok", total, worst.Milliseconds())
	return 0
}
