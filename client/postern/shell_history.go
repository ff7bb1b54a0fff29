package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"unicode/utf8"
)

const (
	// maxHistory is how many lines the history keeps, and maxHistoryBytes how many
	// bytes of them.
	maxHistory      = 1000
	maxHistoryBytes = 256 << 10
)

// history is the file of what was typed: one entry a line, the newest last, mode
// 0600. What begins with a blank is not kept.
type history struct {
	path    string
	entries []string
	// fresh are those that are not in the file yet.
	fresh int
}

// historyPath is where the history is kept: in the state directory of the user.
func historyPath(getenv func(string) string) (string, error) {
	dir := getenv("XDG_STATE_HOME")
	if !filepath.IsAbs(dir) {
		home := getenv("HOME")
		if home == "" {
			return "", fmt.Errorf("there is no home directory")
		}
		dir = filepath.Join(home, ".local", "state")
	}
	return filepath.Join(dir, "postern", "sql_history"), nil
}

// loadHistory reads the end of the file; one that can't be read is empty.
func loadHistory(path string) *history {
	h := &history{path: path}
	f, err := os.Open(path)
	if err != nil {
		return h
	}
	defer f.Close() //nolint:errcheck // it was only read
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, maxHistoryBytes)
	if info, err := f.Stat(); err == nil && info.Size() > maxHistoryBytes {
		if _, err := f.Seek(-maxHistoryBytes, io.SeekEnd); err != nil {
			return h
		}
		lines.Scan() // a line that is cut
	}
	for lines.Scan() {
		if text := lines.Text(); text != "" && utf8.ValidString(text) {
			h.entries = append(h.entries, text)
		}
	}
	h.bound()
	return h
}

func (h *history) bound() {
	size := 0
	for i := len(h.entries) - 1; i >= 0; i-- {
		if size += len(h.entries[i]) + 1; size > maxHistoryBytes || len(h.entries)-i > maxHistory {
			h.entries = h.entries[i+1:]
			break
		}
	}
	h.fresh = min(h.fresh, len(h.entries))
}

// add keeps what was typed, as one line where that means the same, and returns the
// entries that it became.
func (h *history) add(text string) []string {
	if text == "" || text[0] == ' ' || text[0] == '\t' || strings.TrimSpace(text) == "" || strings.ContainsRune(text, 0) {
		return nil
	}
	var added []string
	if !strings.Contains(text, "--") && !strings.ContainsAny(text, `'"$`) || !strings.Contains(text, "\n") {
		added = []string{strings.Join(strings.FieldsFunc(text, func(r rune) bool { return r == '\n' || r == '\r' }), " ")}
	} else {
		for line := range strings.SplitSeq(text, "\n") {
			if strings.TrimSpace(line) != "" {
				added = append(added, strings.TrimRight(line, "\r"))
			}
		}
	}
	if n := len(h.entries); n > 0 && len(added) == 1 && h.entries[n-1] == added[0] {
		return nil
	}
	h.entries = append(h.entries, added...)
	h.fresh += len(added)
	h.bound()
	return added
}

// save adds what is fresh to the file, which other shells may have added to, and
// rewrites it when it is too large.
func (h *history) save() error {
	if h.fresh == 0 || h.path == "" {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(h.path), 0o700); err != nil {
		return fmt.Errorf("keep the history: %w", err)
	}
	merged := loadHistory(h.path)
	merged.entries = append(merged.entries, h.entries[len(h.entries)-h.fresh:]...)
	merged.bound()
	h.fresh = 0
	var out bytes.Buffer
	for _, e := range merged.entries {
		out.WriteString(e + "\n")
	}
	f, err := os.CreateTemp(filepath.Dir(h.path), ".sql_history") // mode 0600
	if err != nil {
		return fmt.Errorf("keep the history: %w", err)
	}
	_, err = f.Write(out.Bytes())
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), h.path)
	}
	if err != nil {
		os.Remove(f.Name()) //nolint:errcheck // it is only rubbish
		return fmt.Errorf("keep the history: %w", err)
	}
	return nil
}
