package lazy

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pagemap"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/vma"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// What storm.c has: see there.
const (
	stormBase  = 0x600000000000
	stormPages = 3*2048 + 64
	stormWiped = 64
	stormPage  = 4096
)

const testHelper = "test-helper"

func entry(m proto.Message) []byte {
	b, err := proto.MarshalOptions{AllowPartial: true}.Marshal(m)
	if err != nil {
		panic(err) // it can't fail
	}
	return append(binary.LittleEndian.AppendUint32(nil, uint32(len(b))), b...)
}

// stormFiles has the program and the images of its memory.
var stormFiles = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("/dev/shm", "storm")
	if err != nil {
		return "", err
	}
	const flags = flagLazy | flagPresent
	maps := append(make([]byte, magicLen), entry(&pagemap.PagemapHead{PagesId: proto.Uint32(1)})...)
	for at := uint64(0); at < stormPages; { // in parts
		n := min(at%7*11+1, stormPages-at)
		maps = append(maps, entry(&pagemap.PagemapEntry{Vaddr: proto.Uint64(stormBase + at*stormPage), NrPages: proto.Uint32(uint32(n)), Flags: proto.Uint32(flags)})...)
		at += n
	}
	pages := make([]byte, stormPages*stormPage)
	for id := range uint64(stormPages) {
		for off := uint64(0); off < stormPage; off += 8 {
			binary.NativeEndian.PutUint64(pages[id*stormPage+off:], (id+1)*0x9E3779B97F4A7C15^off)
		}
	}
	end := uint64(stormBase + stormPages*stormPage)
	memory := append(make([]byte, magicLen), entry(&mm.MmEntry{Vmas: []*vma.VmaEntry{
		{Start: proto.Uint64(stormBase), End: proto.Uint64(end - stormWiped*stormPage)},
		{Start: proto.Uint64(end - stormWiped*stormPage), End: proto.Uint64(end), Madv: proto.Uint64(1 << unix.MADV_WIPEONFORK)},
	}})...)
	for name, b := range map[string][]byte{"pagemap-1.img": maps, "pages-1.img": pages, "mm-1.img": memory} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			return dir, err
		}
	}
	if said, err := exec.Command("cc", "-O1", "-Wall", "-pthread", "-o", filepath.Join(dir, "storm"), "testdata/storm.c").CombinedOutput(); err != nil {
		return dir, fmt.Errorf("build storm.c (packaging/dev/deps.sh gcc): %w: %s", err, said)
	}
	return dir, nil
})

// image is a directory with the images of storm.c's memory, some bytes of which are this
// test's own.
func image(t *testing.T) (dir string) {
	t.Helper()
	files, err := stormFiles()
	if err != nil {
		t.Fatal(err)
	}
	dir = t.TempDir()
	for _, name := range []string{"pagemap-1.img", "mm-1.img"} {
		b, err := os.ReadFile(filepath.Join(files, name))
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(filepath.Join(files, "pages-1.img"), filepath.Join(dir, "pages-1.img")); err != nil {
		t.Fatal(err)
	}
	return dir
}

// storm is a process without memory, the first of its pid namespace, as a kernel's init.
type storm struct {
	r     *Restore
	mark  string
	cmd   *exec.Cmd
	lines *bufio.Reader
	go_   io.Writer
}

func startStorm(t *testing.T, mode string, seed, rounds int) *storm {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: userfaultfd")
	}
	dir := image(t)
	files, err := stormFiles()
	s := &storm{mark: filepath.Join(t.TempDir(), "mark")}
	if err == nil {
		s.r, err = Begin(t.Context(), "/proc/self/exe", testHelper, dir, s.mark)
	}
	if err != nil {
		t.Fatal(err)
	}
	s.cmd = exec.Command(filepath.Join(files, "storm"), dir, mode, fmt.Sprint(seed), fmt.Sprint(rounds))
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID}
	s.cmd.Stderr = os.Stderr
	out, err := s.cmd.StdoutPipe()
	if err == nil {
		s.go_, err = s.cmd.StdinPipe()
	}
	if err == nil {
		err = s.cmd.Start()
	}
	if err != nil {
		s.r.Abort()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = s.cmd.Process.Kill()
		_ = s.cmd.Wait()
	})
	s.lines = bufio.NewReader(out)
	if line, err := s.lines.ReadString('\n'); line != "there\n" {
		s.r.Abort()
		t.Fatalf("%s %v", line, err)
	}
	if err := s.r.Restored(t.Context(), s.cmd.Process.Pid); err != nil {
		s.r.Abort()
		t.Fatal(err)
	}
	t.Cleanup(s.r.Close)
	if _, err := s.go_.Write([]byte("!")); err != nil {
		t.Fatal(err)
	}
	return s
}

// said is all that it printed, once it and all of its forks are gone.
func (s *storm) said(t *testing.T) string {
	t.Helper()
	text, err := io.ReadAll(s.lines)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func (s *storm) filled(t *testing.T) error {
	t.Helper()
	select {
	case <-s.r.Done():
		return s.r.Err()
	case <-time.After(2 * time.Minute):
		t.Fatal("memory does not come")
		return nil
	}
}

// slowly has the server stand still most of the time, until it is done; closed then.
func (s *storm) slowly() <-chan struct{} {
	over := make(chan struct{})
	go func() {
		defer close(over)
		for {
			_ = s.r.server.Process.Signal(unix.SIGSTOP)
			time.Sleep(2 * time.Millisecond)
			_ = s.r.server.Process.Signal(unix.SIGCONT)
			select {
			case <-s.r.Done():
				return
			case <-time.After(time.Millisecond):
			}
		}
	}()
	return over
}

// Whatever a process does with its memory while it comes, each page is what it must be.
func TestMemoryIsRightWhileItsMappingsChange(t *testing.T) {
	for seed := range 3 {
		s := startStorm(t, "storm", seed, 300)
		slow := s.slowly()
		if got := s.said(t); got != "whole\n" {
			t.Fatalf("seed %d: %s (%v, %v)", seed, got, s.filled(t), s.cmd.Wait())
		}
		if err := s.filled(t); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if busy, err := Busy(s.mark); busy || err != nil {
			t.Fatalf("the mark says busy %v, %v", busy, err)
		}
		<-slow
		bytes, took := s.r.Filled()
		t.Logf("seed %d: %d MiB in %v", seed, bytes>>20, took)
	}
}

// Whenever the server is killed, nobody reads a page that is not there: not with a holder,
// and not with the guard alone.
func TestAKilledServerIsTheEndAndNeverZeros(t *testing.T) {
	for i := range 8 {
		s := startStorm(t, "look", i, 1_000_000)
		held := i%2 == 0
		if !held {
			s.r.Close()
		}
		time.Sleep(time.Duration(i*i) * time.Millisecond / 2) // odd moments: any will do
		_ = s.r.server.Process.Kill()
		deadline := time.AfterFunc(time.Minute, func() { _ = s.cmd.Process.Kill() })
		if !held {
			_, _ = s.r.server.Process.Wait()
		} else {
			_ = s.filled(t)
		}
		// All may have come before: then it goes on.
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		lost := Await(ctx, s.mark)
		cancel()
		if lost == nil {
			_ = s.cmd.Process.Kill()
		} else if !errors.Is(lost, ErrLost) {
			t.Fatal(lost)
		}
		if got := s.said(t); got != "" {
			t.Fatalf("round %d: %s", i, got)
		}
		if !deadline.Stop() {
			t.Fatalf("round %d: it went on", i)
		}
		if held && (s.r.Err() == nil) != (lost == nil) {
			t.Fatalf("round %d: the holder says %v, the mark %v", i, s.r.Err(), lost)
		}
		t.Logf("round %d: %v", i, lost)
	}
}

// A guard that is killed is replaced.
func TestAGuardIsReplaced(t *testing.T) {
	s := startStorm(t, "look", 1, 200)
	killed := 0
	for range 50 {
		text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", s.r.server.Process.Pid))
		for _, f := range bytes.Fields(text) {
			var pid int
			if _, err := fmt.Sscan(string(f), &pid); err == nil && unix.Kill(pid, unix.SIGKILL) == nil {
				killed++
			}
		}
		time.Sleep(time.Millisecond)
	}
	if got := s.said(t); got != "whole\n" {
		t.Fatal(got)
	}
	if err := s.filled(t); err != nil {
		t.Fatalf("%v, after %d guards", err, killed)
	}
}

func TestImagesThatCanNotBeReadAreRefused(t *testing.T) {
	for name, harm := range map[string]func(dir string) error{
		"its pages are cut": func(dir string) error {
			path := filepath.Join(dir, "pages-1.img")
			return errors.Join(os.Remove(path), os.WriteFile(path, make([]byte, 5*stormPage), 0o600))
		},
		"it is cut": func(dir string) error { return os.Truncate(filepath.Join(dir, "pagemap-1.img"), 50) },
		"mm-1.img":  func(dir string) error { return os.Remove(filepath.Join(dir, "mm-1.img")) },
	} {
		dir := image(t)
		if p, err := Look(dir); err != nil || p.Bytes != stormPages*stormPage || p.Largest != p.Bytes {
			t.Fatalf("%+v, %v", p, err)
		}
		if err := harm(dir); err != nil {
			t.Fatal(err)
		}
		if _, err := Look(dir); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
