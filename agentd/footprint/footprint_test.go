package footprint

import (
	"context"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// mapped is RssFile of this process, in bytes.
func mapped(t *testing.T) int64 {
	t.Helper()
	raw, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(raw)) {
		if text, ok := strings.CutPrefix(line, "RssFile:"); ok {
			n, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(text), " kB"), 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n << 10
		}
	}
	t.Fatal("no RssFile")
	return 0
}

// populate maps all of the program's code and constants.
func populate(t *testing.T) {
	t.Helper()
	program, err := os.Readlink("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close() //nolint:errcheck // it is only read
	all, err := mappings(f, program)
	if err != nil || len(all) == 0 {
		t.Fatalf("%d mappings, %v", len(all), err)
	}
	for _, m := range all {
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, m.start, m.end-m.start, unix.MADV_POPULATE_READ); errno != 0 {
			t.Fatal(errno)
		}
	}
}

// written is data of the program's file that changes.
var written = map[string]int{"a": 1}

func TestRelease(t *testing.T) {
	written["b"] = 2
	for range 3 {
		populate(t)
		before := mapped(t)
		released, err := Release()
		after := mapped(t) // what the runtime uses at once is there again
		if err != nil || released < before/2 || after > before*3/4 {
			t.Fatalf("released %d, %v; mapped %d before and %d after", released, err, before, after)
		}
		// The program goes on, code and data as they were.
		if written["a"] != 1 || written["b"] != 2 || strings.Repeat("x", 3) != "xxx" {
			t.Fatal("the program's data changed")
		}
	}
}

const smaps = `00400000-01b2e000 r-xp 00000000 fe:00 1 /usr/bin/agentd
Size:              23736 kB
Rss:               12000 kB
Private_Clean:     12000 kB
Private_Dirty:         0 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me dw
01b2e000-03000000 r--p 0172e000 fe:00 1 /usr/bin/agentd
Rss:                9000 kB
Private_Dirty:         0 kB
Anonymous:             0 kB
03000000-03100000 r--p 02c00000 fe:00 1 /usr/bin/agentd
Rss:                 100 kB
Private_Dirty:        96 kB
Anonymous:            96 kB
03100000-03200000 rw-p 02d00000 fe:00 1 /usr/bin/agentd
Rss:                 500 kB
Private_Dirty:         0 kB
Anonymous:             0 kB
c000000000-c000800000 rw-p 00000000 00:00 0 
Rss:                8000 kB
7f0000000000-7f0000001000 r-xp 00000000 fe:00 2 /usr/bin/agentd-other
Rss:                   4 kB
7ffd00000000-7ffd00021000 r-xp 00000000 00:00 0 [vdso]
Rss:                   4 kB
`

func TestMappings(t *testing.T) {
	got, err := mappings(strings.NewReader(smaps), "/usr/bin/agentd")
	if err != nil || len(got) != 2 || got[0] != (mapping{0x400000, 0x1b2e000, 12000 << 10}) || got[1] != (mapping{0x1b2e000, 0x3000000, 9000 << 10}) {
		t.Errorf("got %+v, %v", got, err)
	}
	// After an upgrade the file has gone.
	gone := strings.ReplaceAll(smaps, "/usr/bin/agentd\n", "/usr/bin/agentd (deleted)\n")
	if got, err := mappings(strings.NewReader(gone), "/usr/bin/agentd (deleted)"); err != nil || len(got) != 2 {
		t.Errorf("deleted: %+v, %v", got, err)
	}
	for _, bad := range []string{"nonsense", "zz-1 r-xp 0 0 0 /x", "1 r-xp 0 0 0 /x", "2-1 r-xp 0 0 0 /x", "1-2 r-xp 0 0:0 0 /x\nRss: many kB\n"} {
		if got, err := mappings(strings.NewReader(bad), "/x"); err == nil {
			t.Errorf("%q: %+v", bad, got)
		}
	}
}

func TestKeep(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	asked := 0
	err := Keep(ctx, 0, time.Millisecond, func() bool {
		asked++
		if asked == 5 {
			cancel()
		}
		return asked%2 == 0
	})
	if err != nil || asked < 5 {
		t.Errorf("asked %d times, %v", asked, err)
	}
}
