package footprint

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A mapping is one of the program's file.
type mapping struct {
	start, end uintptr
	// resident is how many bytes of it are mapped.
	resident int64
}

// Release gives the program's pages back, and returns how many bytes were mapped of those.
func Release() (int64, error) {
	program, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return 0, fmt.Errorf("find the program's mappings: %w", err)
	}
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		return 0, fmt.Errorf("find the program's mappings: %w", err)
	}
	defer f.Close() //nolint:errcheck // it is only read
	all, err := mappings(f, program)
	if err != nil {
		return 0, fmt.Errorf("find the program's mappings: %w", err)
	}
	var released int64
	for _, m := range all {
		// Not through unix.Madvise: there is no slice of this memory.
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, m.start, m.end-m.start, unix.MADV_DONTNEED); errno != 0 {
			return released, fmt.Errorf("give pages of the program back: %w", errno)
		}
		released += m.resident
	}
	return released, nil
}

// mappings are those in a smaps file that are program's and hold nothing of the process's own.
func mappings(smaps io.Reader, program string) ([]mapping, error) {
	var all []mapping
	var m mapping
	ours := false // the lines that come are of one that may be given back, so far
	keep := func() {
		if ours && m.resident > 0 {
			all = append(all, m)
		}
	}
	lines := bufio.NewScanner(smaps)
	for lines.Scan() {
		line := lines.Text()
		key, value, found := strings.Cut(line, ":")
		if !found || strings.Contains(key, " ") {
			keep()
			var err error
			if m, ours, err = header(line, program); err != nil {
				return nil, err
			}
			continue
		}
		if !ours {
			continue
		}
		switch key {
		// Not Private_Dirty: pages of a program that was written a moment ago are dirty in the
		// page cache; those that this process wrote are Anonymous.
		case "Rss", "Anonymous", "Swap", "Locked":
			kib, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
			switch {
			case err != nil:
				return nil, fmt.Errorf("a line that is not understood: %q", line)
			case key == "Rss":
				m.resident = kib << 10
			case kib > 0:
				ours = false
			}
		}
	}
	keep()
	return all, lines.Err()
}

// header reads the first line of a mapping: START-END PERMISSIONS OFFSET DEVICE INODE PATH.
func header(line, program string) (m mapping, ours bool, err error) {
	fields := strings.Fields(line)
	if len(fields) < 5 {
		return m, false, fmt.Errorf("a line that is not understood: %q", line)
	}
	start, end, found := strings.Cut(fields[0], "-")
	a, err1 := strconv.ParseUint(start, 16, 64)
	b, err2 := strconv.ParseUint(end, 16, 64)
	if !found || err1 != nil || err2 != nil || b < a {
		return m, false, fmt.Errorf("a line that is not understood: %q", line)
	}
	path := ""
	if at := strings.Index(line, "/"); at >= 0 {
		path = line[at:]
	}
	permissions := fields[1]
	ours = path == program && (permissions == "r--p" || permissions == "r-xp")
	return mapping{start: uintptr(a), end: uintptr(b)}, ours, nil
}

// Keep calls Release first after a time and then every so often while idle says so, until
// ctx ends. It returns the first error, after which it has stopped: a kernel that does not know it will not
// learn it.
func Keep(ctx context.Context, first, every time.Duration, idle func() bool) error {
	timer := time.NewTimer(first)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		timer.Reset(every)
		if !idle() {
			continue
		}
		if _, err := Release(); err != nil {
			return err
		}
	}
}
