package journal

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
	gproto "google.golang.org/protobuf/proto"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func message(text string) *posternv1.KernelMessage {
	return &posternv1.KernelMessage{Channel: "iopub", Header: []byte(`{"msg_type":"stream"}`), ParentHeader: []byte("{}"), Metadata: []byte("{}"), Content: []byte(text)}
}

func open(t *testing.T, dir string, size int64) (*Journal, Recovery) {
	t.Helper()
	j, found, err := Open(Config{Dir: dir, MaxBytes: size})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = j.Close() })
	return j, found
}

func put(t *testing.T, j *Journal, client, text string) uint64 {
	t.Helper()
	n, err := j.Append(client, message(text))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// content is a record's text, or from-to of a gap.
func content(t *testing.T, r *Record) string {
	t.Helper()
	if r.GapFrom > 0 {
		return fmt.Sprintf("gap %d-%d", r.GapFrom, r.Sequence)
	}
	var b bytes.Buffer
	if n, err := r.WriteTo(&b); err != nil || n != r.Size {
		t.Fatalf("%d bytes of %d, %v", n, r.Size, err)
	}
	m := &posternv1.KernelMessage{}
	if err := gproto.Unmarshal(b.Bytes(), m); err != nil {
		t.Fatal(err)
	}
	return string(m.Content)
}

// all reads what is there.
func all(t *testing.T, j *Journal, client string, after uint64) (out []string) {
	t.Helper()
	r := j.Reader(client, after)
	defer r.Close() //nolint:errcheck // it was read
	for {
		record, err := r.Try()
		if err != nil {
			t.Fatal(err)
		}
		if record == nil {
			return out
		}
		out = append(out, content(t, record))
	}
}

func same(t *testing.T, got []string, want ...string) {
	t.Helper()
	if strings.Join(got, "|") != strings.Join(want, "|") {
		t.Errorf("read %q, want %q", got, want)
	}
}

func TestMessages(t *testing.T) {
	dir := t.TempDir()
	j, _ := open(t, dir, 64<<20)
	large := &posternv1.KernelMessage{Channel: "iopub", Header: bytes.Repeat([]byte("h"), 20<<10), Content: []byte("c"), Buffers: [][]byte{nil, make([]byte, 3<<20), []byte("x"), make([]byte, inlineBytes), make([]byte, inlineBytes+1)}}
	if _, err := rand.Read(large.Buffers[1]); err != nil {
		t.Fatal(err)
	}
	if n := put(t, j, "", "one"); n != 1 {
		t.Errorf("the first number is %d", n)
	}
	put(t, j, "a", "to a")
	put(t, j, "b", "to b")
	if _, err := j.Append("", large); err != nil {
		t.Fatal(err)
	}
	put(t, j, "", "")
	check := func(j *Journal) {
		t.Helper()
		same(t, all(t, j, "a", 0), "one", "to a", "c", "")
		same(t, all(t, j, "b", 1), "to b", "c", "")
		same(t, all(t, j, "", 4), "")
		same(t, all(t, j, "", 5))
		same(t, all(t, j, "", 99))
		r := j.Reader("", 3)
		defer r.Close() //nolint:errcheck // it was read
		record, err := r.Try()
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		if _, err := record.WriteTo(&b); err != nil {
			t.Fatal(err)
		}
		got := &posternv1.KernelMessage{}
		if err := gproto.Unmarshal(b.Bytes(), got); err != nil {
			t.Fatal(err)
		}
		if !gproto.Equal(got, large) {
			t.Error("a large message came back as another")
		}
	}
	check(j)
	if _, _, err := Open(Config{Dir: dir, MaxBytes: 64 << 20}); !errors.Is(err, ErrInUse) {
		t.Errorf("opened twice: %v", err)
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := j.Append("", message("x")); !errors.Is(err, ErrClosed) {
		t.Errorf("append after close: %v", err)
	}
	j, found := open(t, dir, 64<<20)
	if found.Torn != 0 || found.Skipped != 0 {
		t.Errorf("found %+v after a clean end", found)
	}
	check(j)
	if n := put(t, j, "", "six"); n != 6 {
		t.Errorf("the next number is %d, want 6", n)
	}
}

func TestRing(t *testing.T) {
	dir := t.TempDir()
	j, _ := open(t, dir, MinBytes)
	slow := j.Reader("", 0)
	defer slow.Close() //nolint:errcheck // it was read
	text := strings.Repeat("x", 10_000)
	for i := range 1000 {
		if n := put(t, j, "", text+fmt.Sprint(i)); n != uint64(i+1) {
			t.Fatalf("number %d, want %d", n, i+1)
		}
		if got := j.Bytes(); got > MinBytes {
			t.Fatalf("%d bytes of a ring of %d", got, MinBytes)
		}
	}
	entries, _ := os.ReadDir(dir)
	var size int64
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		size += info.Size()
	}
	if size > MinBytes+1000 || size < MinBytes/2 {
		t.Errorf("the directory holds %d bytes", size)
	}
	record, err := slow.Try()
	if err != nil || record.GapFrom != 1 || record.Sequence < 800 || record.Sequence > 950 {
		t.Fatalf("a reader from the beginning got %+v, %v", record, err)
	}
	for want := record.Sequence + 1; want <= 1000; want++ {
		record, err := slow.Try()
		if err != nil || record.Sequence != want || !strings.HasSuffix(content(t, record), fmt.Sprint("x", want-1)) {
			t.Fatalf("message %d: %+v, %v", want, record, err)
		}
	}
	// A message over the ring is a gap, and what is there stays.
	if _, err := j.Append("", message(strings.Repeat("y", MinBytes))); err != nil {
		t.Fatal(err)
	}
	put(t, j, "", "after")
	same(t, all(t, j, "", 999), text+"999", "gap 1001-1001", "after")
	if _, err := j.Skip(); err != nil {
		t.Fatal(err)
	}
	same(t, all(t, j, "", 1001), "after", "gap 1003-1003")
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	j, _ = open(t, dir, MinBytes)
	same(t, all(t, j, "", 1001), "after", "gap 1003-1003")
	if n := put(t, j, "", "more"); n != 1004 {
		t.Errorf("a number that was a gap was used again: %d", n)
	}
}

// Kill -9 at any byte of a record loses that record alone.
func TestTorn(t *testing.T) {
	dir := t.TempDir()
	j, _ := open(t, dir, MinBytes)
	put(t, j, "", "one")
	j.mu.Lock()
	s := j.segs[len(j.segs)-1]
	path, before := s.path, s.size
	j.mu.Unlock()
	put(t, j, "", "two")
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for cut := before; cut < int64(len(whole)); cut++ {
		copyDir := t.TempDir()
		marks, _ := os.ReadFile(filepath.Join(dir, "sequence"))
		for name, text := range map[string][]byte{filepath.Base(path): whole[:cut], "sequence": marks} {
			if err := os.WriteFile(filepath.Join(copyDir, name), text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		j, found, err := Open(Config{Dir: copyDir, MaxBytes: MinBytes})
		if err != nil {
			t.Fatal(err)
		}
		if found.Torn != cut-before {
			t.Errorf("cut at %d: torn %d bytes, want %d", cut, found.Torn, cut-before)
		}
		if n := put(t, j, "", "new"); n != 2 {
			t.Errorf("cut at %d: the next number is %d", cut, n)
		}
		same(t, all(t, j, "", 0), "one", "new")
		_ = j.Close()
	}
}

// After a loss of power records may be missing; their numbers are not used again.
func TestPower(t *testing.T) {
	dir := t.TempDir()
	j, _ := open(t, dir, MinBytes)
	put(t, j, "", "one")
	put(t, j, "", "two")
	_ = j.Close()
	marks := filepath.Join(dir, "sequence")
	b, err := os.ReadFile(marks)
	if err != nil {
		t.Fatal(err)
	}
	// Another boot, and the last record never reached the disk.
	b[0] ^= 0xff
	binary.LittleEndian.PutUint32(b[36:], sumBytes(b[:36]))
	if err := os.WriteFile(marks, b, 0o600); err != nil {
		t.Fatal(err)
	}
	entries, _ := filepath.Glob(filepath.Join(dir, "*.seg"))
	info, _ := os.Stat(entries[len(entries)-1])
	if err := os.Truncate(entries[len(entries)-1], info.Size()-3); err != nil {
		t.Fatal(err)
	}
	j, found := open(t, dir, MinBytes)
	if found.Skipped < ahead-2 {
		t.Errorf("%d numbers skipped", found.Skipped)
	}
	n := put(t, j, "", "new")
	if n <= ahead {
		t.Errorf("the next number is %d", n)
	}
	same(t, all(t, j, "", 0), "one", fmt.Sprintf("gap 2-%d", n-1), "new")
	_ = j.Close()
	// A file of numbers that is damaged.
	if err := os.WriteFile(marks, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	j, _ = open(t, dir, MinBytes)
	if m := put(t, j, "", "newer"); m <= n+1 {
		t.Errorf("the next number is %d after %d", m, n)
	}
}

func sumBytes(b []byte) uint32 { return binary.LittleEndian.Uint32(sumLE(b)) }

func sumLE(b []byte) []byte {
	sum, _ := sumOf(bytes.NewReader(b), int64(len(b)), 0)
	return binary.LittleEndian.AppendUint32(nil, sum)
}

func TestClientsAndRequests(t *testing.T) {
	dir := t.TempDir()
	j, _ := open(t, dir, MinBytes)
	for range 5 {
		put(t, j, "", "m")
	}
	j.Register("a", 2)
	j.Register("a", 4)
	j.Confirm("b", 4)
	j.Confirm("b", 3)
	j.Confirm("c", 99)
	j.Confirm("", 1)
	j.Sent(Request{ID: "r1", Client: "a", Type: "execute_request", Channel: "shell", Header: []byte(`{"msg_id":"r1"}`), Generation: 2})
	j.Sent(Request{ID: "r2", Client: "b"})
	if !j.Answered("r2") || j.Answered("r2") || j.Answered("none") {
		t.Error("answers are not told apart")
	}
	check := func(j *Journal, found Recovery) {
		t.Helper()
		for client, want := range map[string]uint64{"a": 2, "b": 4, "c": 5} {
			if got, known := j.Confirmed(client); !known || got != want {
				t.Errorf("%s confirmed %d, %v, want %d", client, got, known, want)
			}
		}
		if _, known := j.Confirmed("d"); known {
			t.Error("d is known")
		}
		if len(found.Requests) != 1 || found.Requests[0].ID != "r1" || found.Requests[0].Client != "a" || string(found.Requests[0].Header) != `{"msg_id":"r1"}` || found.Requests[0].Generation != 2 {
			t.Errorf("requests are %+v", found.Requests)
		}
	}
	_ = j.Close()
	j, found := open(t, dir, MinBytes)
	check(j, found)
	// They outlive the segments that they were written to.
	for range 300 {
		put(t, j, "", strings.Repeat("x", 10_000))
	}
	_ = j.Close()
	j, found = open(t, dir, MinBytes)
	check(j, found)
	for i := range MaxClients {
		j.Register(fmt.Sprint("n", i), 1)
		j.Confirm("a", uint64(10+i))
	}
	if got, known := j.Confirmed("a"); !known || got != 10+MaxClients-1 {
		t.Errorf("a, which is heard of, is at %d, %v", got, known)
	}
	if _, known := j.Confirmed("c"); known {
		t.Error("c, which was not heard of for longest, is still known")
	}
}

// Several write while several read; each reads everything once and in order.
func TestAtOnce(t *testing.T) {
	j, _ := open(t, t.TempDir(), 16<<20)
	const writers, each = 4, 500
	ctx := context.Background()
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			r := j.Reader("", 0)
			defer r.Close() //nolint:errcheck // it was read
			seen := map[string]bool{}
			for want := uint64(1); want <= writers*each; want++ {
				record, err := r.Next(ctx)
				if err != nil || record.Sequence != want || record.GapFrom > 0 {
					t.Errorf("message %d: %+v, %v", want, record, err)
					return
				}
				text := content(t, record)
				if seen[text] {
					t.Errorf("%q twice", text)
				}
				seen[text] = true
			}
		})
	}
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				if _, err := j.Append("", message(fmt.Sprint(w, " ", i, strings.Repeat("x", i*10)))); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	cause := errors.New("enough")
	cancelled, cancel := context.WithCancelCause(ctx)
	cancel(cause)
	r := j.Reader("", j.Last())
	defer r.Close() //nolint:errcheck // nothing is open
	if _, err := r.Next(cancelled); !errors.Is(err, cause) {
		t.Errorf("a wait that was given up: %v", err)
	}
	ended := make(chan error, 1)
	go func() {
		_, err := r.Next(ctx)
		ended <- err
	}()
	_ = j.Close()
	if err := <-ended; !errors.Is(err, ErrClosed) {
		t.Errorf("a wait when the journal is closed: %v", err)
	}
}

func TestDiskFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount a small file system")
	}
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=2m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	j, _ := open(t, filepath.Join(dir, "j"), 64<<20)
	text := strings.Repeat("x", 100_000)
	for range 100 {
		put(t, j, "", text)
	}
	// The ring could be larger; the disk is not.
	got := all(t, j, "", 0)
	if len(got) == 0 || len(got) > 40 || !strings.HasPrefix(got[len(got)-1], "gap ") {
		t.Errorf("%d records; the last is %.30q", len(got), got[len(got)-1])
	}
	if err := os.WriteFile(filepath.Join(dir, "other"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_ = j.Close()
	j, found := open(t, filepath.Join(dir, "j"), MinBytes) // a smaller ring gives room
	if found.Torn != 0 {
		t.Errorf("%d bytes torn", found.Torn)
	}
	if n := put(t, j, "", "again"); n != 101 {
		t.Errorf("the next number is %d, want 101", n)
	}
	got = all(t, j, "", 0)
	if got[len(got)-1] != "again" {
		t.Errorf("the last record is %.30q", got[len(got)-1])
	}
}

func TestTooSmall(t *testing.T) {
	if _, _, err := Open(Config{Dir: t.TempDir(), MaxBytes: 1000}); err == nil || !strings.Contains(err.Error(), "at least") {
		t.Errorf("a ring of 1000 bytes: %v", err)
	}
}

func FuzzOpen(f *testing.F) {
	dir := f.TempDir()
	j, _, err := Open(Config{Dir: dir, MaxBytes: MinBytes})
	if err != nil {
		f.Fatal(err)
	}
	_, _ = j.Append("a", message("one"))
	j.Sent(Request{ID: "r"})
	j.Confirm("a", 1)
	_, _ = j.Append("", message("two"))
	_ = j.Close()
	segs, _ := filepath.Glob(filepath.Join(dir, "*.seg"))
	good, _ := os.ReadFile(segs[0])
	f.Add(good, []byte{})
	f.Add(good[:len(good)-2], []byte("marks"))
	f.Fuzz(func(t *testing.T, segment, marks []byte) {
		dir := t.TempDir()
		for name, text := range map[string][]byte{"0000000007.seg": segment, "sequence": marks} {
			if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		j, _, err := Open(Config{Dir: dir, MaxBytes: MinBytes})
		if err != nil {
			return
		}
		defer j.Close() //nolint:errcheck // only opened
		n, err := j.Append("", message("new"))
		if err != nil || n == 0 {
			t.Fatal(n, err)
		}
		r := j.Reader("a", 0)
		defer r.Close() //nolint:errcheck // it was read
		for want := uint64(1); ; {
			record, err := r.Try()
			if err != nil {
				t.Fatal(err)
			}
			if record == nil {
				break
			}
			if first := max(record.GapFrom, 1); record.GapFrom > 0 && first != want || record.GapFrom == 0 && record.Sequence < want {
				t.Fatalf("record %+v, want number %d", record, want)
			}
			want = record.Sequence + 1
			last := record.Sequence
			if last == n && record.GapFrom > 0 {
				t.Fatal("what was appended is a gap")
			}
		}
	})
}
