package fusefs

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// promises are files that were closed without an error, and what must be in them.
type promises map[string][]byte

func (p promises) check(t *testing.T, root string) {
	t.Helper()
	for name, want := range p {
		got, err := os.ReadFile(filepath.Join(root, name))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v; promised were %d, they differ at %d", name, len(got), err, len(want), differ(got, want))
		}
	}
}

// fill writes files until so many could not be, for want of room: each must fail with want. The ones
// that failed are removed, which must work.
func (p promises) fill(t *testing.T, root string, r *rand.Rand, failures int, want syscall.Errno) {
	t.Helper()
	for i := 0; failures > 0; i++ {
		if i > 20_000 {
			t.Fatal("it is never full")
		}
		name := fmt.Sprintf("fill-%d-%d", len(p), i)
		data := make([]byte, []int{100, 5000, 40_000, 300_000, 1_200_000}[r.Intn(5)])
		r.Read(data)
		err := writeFile(filepath.Join(root, name), data)
		if err == nil {
			p[name] = data
			continue
		}
		failures--
		if !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
		if err := os.Remove(filepath.Join(root, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Errorf("a file that could not be written cannot be removed: %v", err)
		}
	}
}

func writeFile(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	for off := 0; off < len(data); off += 70_000 {
		if _, err := f.Write(data[off:min(len(data), off+70_000)]); err != nil {
			return errors.Join(err, f.Close())
		}
	}
	return f.Close()
}

// TestFullDisk fills the disk that the replica is on: the cache gives way, every writer gets ENOSPC or
// has its bytes kept, files can be removed, and a new process finds everything.
func TestFullDisk(t *testing.T) {
	for _, passthrough := range []bool{true, false} {
		t.Run(fmt.Sprint("passthrough ", passthrough), func(t *testing.T) {
			w := newWorld(t)
			r := rand.New(rand.NewSource(1))
			disk := t.TempDir()
			if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=48m"); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = unix.Unmount(disk, unix.MNT_DETACH) })
			other := w.mount(serving{})
			old := promises{}
			for i := range 8 {
				data := make([]byte, 2<<20)
				r.Read(data)
				old[fmt.Sprint("old", i)] = data
				if err := writeFile(filepath.Join(other.path, fmt.Sprint("old", i)), data); err != nil {
					t.Fatal(err)
				}
			}
			drained(t, other)
			s := serving{Dir: filepath.Join(disk, "replica"), Target: filepath.Join(t.TempDir(), "mnt"), NoPassthrough: !passthrough}
			if err := os.Mkdir(s.Target, 0o755); err != nil {
				t.Fatal(err)
			}
			m := w.mount(s)
			m.watchdog()
			old.check(t, m.path) // and they are in the cache
			w.remote.Cut(true)
			made := promises{}
			made.fill(t, m.path, r, 20, syscall.ENOSPC)
			total := 0
			for _, data := range made {
				total += len(data)
			}
			t.Logf("%d files of %d bytes fit", len(made), total)
			if total < 32<<20 {
				t.Errorf("only %d bytes fit into 48 MiB: the cache did not give way", total)
			}
			made.check(t, m.path)

			// The next process begins on a disk that is full.
			m.kill()
			m.detach()
			m = w.mount(s)
			m.watchdog()
			made.check(t, m.path)
			gone := 0
			for name := range made {
				if gone++; gone > len(made)/2 {
					break
				}
				if err := os.Remove(filepath.Join(m.path, name)); err != nil {
					t.Errorf("a file on a full disk cannot be removed: %v", err)
				}
				delete(made, name)
			}
			again := make([]byte, 1<<20)
			r.Read(again)
			until := time.Now().Add(time.Minute)
			for writeFile(filepath.Join(m.path, "again"), again) != nil {
				if time.Now().After(until) {
					t.Fatal("no room although files were removed")
				}
				time.Sleep(50 * time.Millisecond)
			}
			made["again"] = again
			w.remote.Cut(false)
			drained(t, m)
			last := w.mount(serving{})
			made.check(t, last.path)
			old.check(t, last.path)
			old.check(t, m.path) // fetched once more
		})
	}
}

// TestFullQuota wants EDQUOT for whoever writes more than the workspace may have, and everything else at the
// control plane.
func TestFullQuota(t *testing.T) {
	w := newWorld(t)
	w.remote.Quota(8 << 20)
	m := w.mount(serving{})
	m.watchdog()
	made := promises{}
	// The directory is known, and so are ids for new files.
	if err := writeFile(filepath.Join(m.path, "first"), nil); err != nil {
		t.Fatal(err)
	}
	drained(t, m)
	w.remote.Cut(true) // what waits for the control plane counts
	made.fill(t, m.path, rand.New(rand.NewSource(2)), 10, syscall.EDQUOT)
	total := 0
	for _, data := range made {
		total += len(data)
	}
	if total < 6<<20 || total > 8<<20 {
		t.Errorf("%d bytes of a quota of 8 MiB were written", total)
	}
	made.check(t, m.path)
	w.remote.Cut(false)
	drained(t, m)
	made.check(t, w.mount(serving{}).path)
}

// shifted is a clock that is off by what a file says.
func shifted(name string) func() time.Time {
	if name == "" {
		return nil
	}
	return func() time.Time {
		text, _ := os.ReadFile(name)
		n, _ := strconv.ParseInt(string(text), 10, 64)
		return time.Now().Add(time.Duration(n))
	}
}

// TestClockJumps sets the clock forth by ten years and back by twenty while files are written, changed and
// replaced, and the process is killed: nothing is lost, and other hosts see all of it.
func TestClockJumps(t *testing.T) {
	w := newWorld(t)
	clock := filepath.Join(t.TempDir(), "clock")
	set := func(by time.Duration) {
		t.Helper()
		name := clock + ".new"
		if err := errors.Join(os.WriteFile(name, []byte(strconv.FormatInt(int64(by), 10)), 0o600), os.Rename(name, clock)); err != nil {
			t.Fatal(err)
		}
	}
	set(0)
	s := serving{Dir: filepath.Join(t.TempDir(), "replica"), Target: filepath.Join(t.TempDir(), "mnt"), Clock: clock}
	if err := os.Mkdir(s.Target, 0o755); err != nil {
		t.Fatal(err)
	}
	other := w.mount(serving{})
	made := promises{}
	const year = 365 * 24 * time.Hour
	for round, by := range []time.Duration{0, 10 * year, -10 * year, -time.Second, time.Hour, 0} {
		set(by)
		m := w.mount(s)
		m.watchdog()
		made.check(t, m.path)
		for i := range amount(8, 20) {
			if i%5 == 2 {
				set(by + time.Duration(i-10)*time.Hour) // also in the midst
			}
			for _, n := range []int{10, 50_000, 1_500_000} {
				// Some are new in each round, some are replaced.
				name := fmt.Sprintf("%d-%d", n, i*(1+round%2))
				data := bytes.Repeat([]byte{byte(round), byte(i), 7}, n/3)
				if err := writeFile(filepath.Join(m.path, name), data); err != nil {
					t.Fatalf("round %d: %v", round, err)
				}
				made[name] = data
			}
		}
		// What another host changes arrives, whatever the time here is.
		name := fmt.Sprint("elsewhere", round)
		if err := writeFile(filepath.Join(other.path, name), []byte(name)); err != nil {
			t.Fatal(err)
		}
		drained(t, other)
		until := time.Now().Add(30 * time.Second)
		for {
			got, err := os.ReadFile(filepath.Join(m.path, name))
			if string(got) == name {
				break
			}
			if time.Now().After(until) {
				t.Fatalf("round %d: what another host made: %q, %v", round, got, err)
			}
			time.Sleep(20 * time.Millisecond)
		}
		if round%2 == 0 {
			m.kill()
			m.detach()
		} else {
			drained(t, m)
			m.close()
		}
	}
	m := w.mount(s)
	made.check(t, m.path)
	drained(t, m)
	last := w.mount(serving{})
	made.check(t, last.path)
	for name := range made {
		if strings.Contains(name, "conflict") {
			t.Error(name)
		}
	}
	entries, err := os.ReadDir(last.path)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if strings.Contains(e.Name(), "(conflict ") {
			t.Errorf("a conflict although nobody else wrote to it: %s", e.Name())
		}
	}
}

// TestJournalTail spoils the end of the journal of a mount that was killed, as a loss of power does:
// what was promised is there. Damage in what was promised is no mount, and a line that says where.
func TestJournalTail(t *testing.T) {
	w := newWorld(t)
	s := serving{Dir: filepath.Join(t.TempDir(), "replica"), Target: filepath.Join(t.TempDir(), "mnt"), Shadow: t.TempDir()}
	if err := os.Mkdir(s.Target, 0o755); err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewSource(3))
	made := promises{}
	for round := range 5 {
		s.Config.Boot = fmt.Sprint("boot ", round)
		m := w.mount(s)
		m.watchdog()
		made.check(t, m.path)
		var wg sync.WaitGroup
		var mu sync.Mutex
		for k := range 3 {
			data := make([]byte, 20_000)
			r.Read(data)
			wg.Go(func() {
				for i := range 10 {
					name := fmt.Sprintf("r%d-%d-%d", round, k, i)
					if err := writeFile(filepath.Join(m.path, name), data[:1000*(i+1)]); err != nil {
						t.Error(err)
						return
					}
					mu.Lock()
					made[name] = data[:1000*(i+1)]
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		m.kill()
		m.detach()
		name, synced := newestSegment(t, s)
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		noise := make([]byte, 3000)
		r.Read(noise)
		copy(noise[100:], "PJe1")
		if err := os.WriteFile(name, append(text[:synced:synced], noise[:r.Intn(len(noise))]...), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	name, synced := newestSegment(t, s)
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	text[synced/2] ^= 0xff
	if err := os.WriteFile(name, text, 0o600); err != nil {
		t.Fatal(err)
	}
	line := w.refused(s)
	if !strings.Contains(line, "damaged") || !strings.Contains(line, name) {
		t.Errorf("a journal that is damaged where it was synced: %q", line)
	}
}

// newestSegment is the journal's, and how much of it was synced.
func newestSegment(t *testing.T, s serving) (name string, synced int) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(s.Dir, "journal", "journal-*"))
	if err != nil || len(names) == 0 {
		t.Fatalf("segments: %v, %v", names, err)
	}
	for _, n := range names {
		if len(n) > len(name) || len(n) == len(name) && n > name {
			name = n
		}
	}
	text, err := os.ReadFile(filepath.Join(s.Shadow, filepath.Base(name)+".length"))
	if err != nil {
		t.Fatal(err)
	}
	if synced, err = strconv.Atoi(string(text)); err != nil {
		t.Fatal(err)
	}
	return name, synced
}
