package bucketfs

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/postern-dev/postern/agentd/attach/bucket"
)

// line is one fact for the process that takes a mount over; they hold in their order.
type line struct {
	Next uint64 `json:"next,omitempty"` // node ids up to here were given
	// A node, new, moved, or gone.
	ID     uint64 `json:"id,omitempty"`
	Parent uint64 `json:"p,omitempty"`
	Name   string `json:"n,omitempty"`
	Dir    bool   `json:"d,omitempty"`
	Unique uint64 `json:"u,omitempty"` // the request that made it
	Gone   bool   `json:"gone,omitempty"`
	Drop   bool   `json:"drop,omitempty"` // the kernel has forgotten it
	// A handle of node ID, opened or closed.
	Open   uint64         `json:"o,omitempty"`
	Writer bool           `json:"w,omitempty"`
	Object *bucket.Object `json:"obj,omitempty"`
	Close  uint64         `json:"c,omitempty"`
}

// compactAfter is how many lines there may be beyond twice what is needed.
const compactAfter = 20_000

// table writes lines to a file, each whole in one write: a process that is killed leaves
// what it had written. It need not outlive the host's life.
type table struct {
	path  string
	f     *os.File
	lines int
}

// openTable opens the file for appending; fresh: it is emptied.
func openTable(path string, fresh bool) (*table, error) {
	flags := os.O_WRONLY | os.O_CREATE | os.O_APPEND
	if fresh {
		flags |= os.O_TRUNC
	}
	f, err := os.OpenFile(path, flags, 0o600)
	return &table{path: path, f: f}, err
}

func (t *table) close() error {
	if t == nil || t.f == nil {
		return nil
	}
	return t.f.Close()
}

// add writes lines.
func (t *table) add(lines ...line) error {
	if t == nil || len(lines) == 0 {
		return nil
	}
	var buf bytes.Buffer
	encoder := json.NewEncoder(&buf)
	for _, l := range lines {
		if err := encoder.Encode(l); err != nil {
			return err
		}
	}
	t.lines += len(lines)
	_, err := t.f.Write(buf.Bytes())
	return err
}

// replace writes all anew.
func (t *table) replace(lines []line) error {
	next, err := openTable(t.path+".new", true)
	if err != nil {
		return err
	}
	for len(lines) > 0 && err == nil {
		n := min(len(lines), 1000)
		err = next.add(lines[:n]...)
		lines = lines[n:]
	}
	if err == nil {
		err = os.Rename(t.path+".new", t.path)
	}
	if err != nil {
		return errors.Join(err, next.close())
	}
	old := t.f
	t.f, t.lines = next.f, next.lines
	return old.Close()
}

// readTable gives the lines; a torn last one does not count.
func readTable(path string, each func(line)) (int, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close() //nolint:errcheck // it was read
	in := bufio.NewReaderSize(f, 1<<16)
	for n := 0; ; n++ {
		text, err := in.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return n, nil
		}
		if err != nil {
			return n, err
		}
		var l line
		if err := json.Unmarshal(text, &l); err != nil {
			return n, fmt.Errorf("%s: line %d: %w", path, n+1, err)
		}
		each(l)
	}
}
