package filechunk

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"testing"
)

func TestCut(t *testing.T) {
	for _, c := range []struct {
		size  uint64
		count uint64
		last  int
	}{{0, 0, 0}, {1, 1, 1}, {Size - 1, 1, Size - 1}, {Size, 1, Size}, {Size + 1, 2, 1}, {MaxFile, MaxFile / Size, Size}} {
		if got := Count(c.size); got != c.count {
			t.Errorf("%d bytes: %d chunks, want %d", c.size, got, c.count)
		}
		if c.count > 0 {
			if got := Length(c.size, c.count-1); got != c.last {
				t.Errorf("%d bytes: the last chunk has %d, want %d", c.size, got, c.last)
			}
		}
		if got := Length(c.size, c.count); got != 0 {
			t.Errorf("%d bytes: behind the end are %d", c.size, got)
		}
	}
}

func TestNames(t *testing.T) {
	content := make([]byte, 2*Size+3)
	content[Size] = 1
	names := Names(content)
	if len(names) != 3 || names[0] != nil || names[2] != nil {
		t.Fatalf("%x: want a hole, a name, a hole", names)
	}
	if want := sha256.Sum256(content[Size : 2*Size]); !bytes.Equal(names[1], want[:]) {
		t.Errorf("%x, want %x", names[1], want)
	}
	if err := Check(uint64(len(content)), names); err != nil {
		t.Error(err)
	}
	for what, bad := range map[string]error{
		"too few":   Check(uint64(len(content)), names[:2]),
		"too many":  Check(Size, names),
		"half":      Check(1, [][]byte{names[1][:16]}),
		"too large": Check(MaxFile+1, nil),
	} {
		if bad == nil {
			t.Errorf("%s: no error", what)
		}
	}
}

// The stored and sent form, pinned.
func TestETag(t *testing.T) {
	const (
		empty = "bb70f99ccd19e65e70ad9a68b9131423f3e5b81246998568e72e974f445552ce"
		hello = "d0dc37c1119ce350bfc5f9743a4140d482e9226f7e1e94b33619270e9671b7f4"
	)
	if got := ETag(0, nil); got != empty {
		t.Errorf("the empty file: %s, want %s", got, empty)
	}
	if got := ETag(5, Names([]byte("hello"))); got != hello {
		t.Errorf("hello: %s, want %s", got, hello)
	}
	if ETag(1, Names([]byte{0})) == ETag(2, Names([]byte{0, 0})) {
		t.Error("two lengths of zeros have one ETag")
	}
	if ETag(5, Names([]byte("hello"))) == ETag(5, Names([]byte("hellO"))) {
		t.Error("two contents have one ETag")
	}
}

func TestFrames(t *testing.T) {
	var wire bytes.Buffer
	chunks := [][]byte{[]byte("a"), bytes.Repeat([]byte("b"), Size), []byte("c")}
	for _, c := range chunks {
		if err := WriteFrame(&wire, c); err != nil {
			t.Fatal(err)
		}
	}
	for _, bad := range [][]byte{nil, make([]byte, Size+1)} {
		if err := WriteFrame(io.Discard, bad); !errors.Is(err, ErrFrame) {
			t.Errorf("a chunk of %d bytes: %v", len(bad), err)
		}
	}
	cut := wire.Bytes()[:wire.Len()-1]
	buf := make([]byte, Size)
	r := bytes.NewReader(wire.Bytes())
	for i, want := range chunks {
		if got, err := ReadFrame(r, buf); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("chunk %d: %v, %d bytes", i, err, len(got))
		}
	}
	if _, err := ReadFrame(r, buf); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
	r = bytes.NewReader(cut)
	for range 2 {
		if _, err := ReadFrame(r, buf); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := ReadFrame(r, buf); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("cut: %v", err)
	}
}

func FuzzReadFrame(f *testing.F) {
	f.Add([]byte{0, 0, 0, 1, 'a'})
	f.Add([]byte{0, 0, 0, 0})
	f.Add([]byte{255, 255, 255, 255, 1})
	buf := make([]byte, Size)
	f.Fuzz(func(t *testing.T, in []byte) {
		r := bytes.NewReader(in)
		var back bytes.Buffer
		for {
			chunk, err := ReadFrame(r, buf)
			if err != nil {
				break
			}
			if err := WriteFrame(&back, chunk); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.HasPrefix(in, back.Bytes()) {
			t.Error("what was read is not what was sent")
		}
	})
}
