package journal

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
)

const sequenceFile = "sequence"

// Files are the names of a journal's files, in the order in which a copy has to read
// them while nothing is appended: records before the numbers that are beyond them.
func Files(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if FileName(e.Name()) && e.Name() != sequenceFile {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	return append(names, sequenceFile), nil
}

// FileName reports whether a journal has files of that name.
func FileName(name string) bool {
	if name == sequenceFile {
		return true
	}
	var index uint64
	n, err := fmt.Sscanf(name, "%d.seg", &index)
	return n == 1 && err == nil && strings.HasSuffix(name, ".seg") && fmt.Sprintf("%010d.seg", index) == name
}
