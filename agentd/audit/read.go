package audit

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/postern-dev/postern/proto/auditchain"
)

// maxPageBytes bounds what Read returns at once.
const maxPageBytes = 4 << 20

// TamperedError says that the log was changed by somebody else than its writer,
// or damaged by the disk.
type TamperedError struct {
	File string
	Err  error // a *auditchain.BrokenError, where the chain says it
}

// Error is one line with what to do.
func (e *TamperedError) Error() string {
	return fmt.Sprintf("the audit log was tampered with or damaged: %s: %v: run agentd audit verify, keep the directory as evidence, and move it aside to begin a new chain", e.File, e.Err)
}

// Unwrap returns the cause.
func (e *TamperedError) Unwrap() error { return e.Err }

// segments lists the segment files of dir in order; a gap is tampering. Those at the
// beginning may have been retired.
func segments(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("audit log: %w", err)
	}
	var numbers []int
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".jsonl")
		n, err := strconv.Atoi(name)
		if ok && err == nil && n > 0 {
			numbers = append(numbers, n)
		}
	}
	slices.Sort(numbers)
	var files []string
	for i, n := range numbers {
		file := filepath.Join(dir, fmt.Sprintf("%06d.jsonl", n))
		if want := numbers[0] + i; n != want {
			return nil, &TamperedError{file, fmt.Errorf("segment %d is missing", want)}
		}
		files = append(files, file)
	}
	return files, nil
}

// scan calls f with each complete line and its offset. It returns the bytes
// after the last newline.
func scan(file string, f func(line []byte, offset int64) error) (torn []byte, err error) {
	in, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer in.Close() //nolint:errcheck // it is only read
	r := bufio.NewReaderSize(in, 64<<10)
	var offset int64
	for {
		line, err := readLine(r)
		if errors.Is(err, io.EOF) {
			return line, nil
		} else if err != nil {
			return nil, err
		}
		if err := f(line[:len(line)-1], offset); err != nil {
			return nil, err
		}
		offset += int64(len(line))
	}
}

// readLine reads to the newline, refusing what no entry can be.
func readLine(r *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		line = append(line, part...)
		if !errors.Is(err, bufio.ErrBufferFull) {
			return line, err
		}
		if len(line) > 2*auditchain.MaxLine {
			return nil, fmt.Errorf("a line of more than %d bytes", 2*auditchain.MaxLine)
		}
	}
}

// errStop ends a scan early.
var errStop = errors.New("stop")

// recover finds the end of the chain.
func (l *Log) recover() (Recovery, error) {
	var recovery Recovery
	files, err := segments(l.dir)
	if err != nil {
		return recovery, err
	}
	for _, file := range files {
		st, err := os.Stat(file)
		if err != nil {
			return recovery, err
		}
		l.bytes += st.Size()
	}
	if len(files) == 0 {
		return recovery, nil
	}
	last := files[len(files)-1]
	l.segment = numberOf(last)
	if recovery.Torn, err = l.moveTorn(last); err != nil {
		return recovery, err
	}
	if l.base, err = baseOf(files); err != nil {
		return recovery, err
	}
	l.first = l.base.Sequence + 1
	if l.head, err = seam(files[:len(files)-1]); err != nil {
		return recovery, err
	}
	if l.head.Sequence == 0 {
		l.head = l.base
	}
	first, err := firstEntry(last)
	if err != nil {
		return recovery, tampered(last, err)
	}
	l.since = first.Time
	v := auditchain.NewVerifier(l.head)
	if _, err := scan(last, func(line []byte, _ int64) error { return v.Add(line) }); err != nil {
		return recovery, tampered(last, err)
	}
	l.head = v.Head()
	if recovery.Begun, err = begun(files); err != nil {
		return recovery, err
	}
	f, err := os.OpenFile(last, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return recovery, fmt.Errorf("audit log: %w", err)
	}
	st, err := f.Stat()
	if err != nil {
		return recovery, errors.Join(err, f.Close())
	}
	l.file, l.size = f, st.Size()
	return recovery, nil
}

func tampered(file string, err error) error {
	var path *fs.PathError
	if errors.As(err, &path) {
		return fmt.Errorf("audit log: %w", err)
	}
	return &TamperedError{file, err}
}

// seam is the head at the end of these segments: their last entry, whose own
// segment was checked when it was the newest. An empty segment is one that a
// crash left before its first entry.
func seam(files []string) (auditchain.Head, error) {
	for _, file := range slices.Backward(files) {
		var head auditchain.Head
		var lastLine []byte
		torn, err := scan(file, func(line []byte, _ int64) error {
			lastLine = append(lastLine[:0], line...)
			return nil
		})
		if err != nil {
			return head, tampered(file, err)
		}
		if len(torn) > 0 {
			return head, &TamperedError{file, errors.New("it ends within a line, and it is not the newest")}
		}
		if lastLine == nil {
			continue
		}
		e, err := auditchain.Decode(lastLine)
		if err != nil {
			return head, &TamperedError{file, err}
		}
		return headOf(e)
	}
	return auditchain.Head{}, nil
}

// moveTorn moves a half-written last line of the newest segment aside.
func (l *Log) moveTorn(file string) (string, error) {
	var end int64
	torn, err := scan(file, func(line []byte, offset int64) error {
		end = offset + int64(len(line)) + 1
		return nil
	})
	if err != nil {
		return "", tampered(file, err)
	}
	if len(torn) == 0 {
		return "", nil
	}
	aside := filepath.Join(l.dir, "torn-"+time.Now().UTC().Format("20060102T150405.000000000Z"))
	if err := os.WriteFile(aside, torn, 0o600); err != nil {
		return "", fmt.Errorf("audit log: keep a torn line: %w", err)
	}
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		return "", err
	}
	defer f.Close() //nolint:errcheck // synced below
	if err := f.Truncate(end); err != nil {
		return "", fmt.Errorf("audit log: %w", err)
	}
	return aside, f.Sync()
}

var (
	beginMark = []byte(`"action":"` + ActionBegin + `"`)
	runMark   = []byte(`"action":"` + ActionRun + `"`)
	lostMark  = []byte(`"action":"` + ActionLost + `"`)
	openMark  = []byte(`"action":"` + ActionWireOpen + `"`)
	closeMark = []byte(`"action":"` + ActionWireClose + `"`)
	startMark = []byte(`"action":"` + ActionStart + `"`)
)

// Actions of the host's chain that the log itself knows.
const (
	// ActionStart is agentd's start; what was begun before it is settled.
	ActionStart = "host.start"
	// ActionBegin is written before a statement is sent to the database.
	ActionBegin = "sql.begin"
	// ActionRun is how a statement ended; it repeats what ActionBegin said.
	ActionRun = "sql.run"
	// ActionLost stands for ActionRun when agentd died meanwhile.
	ActionLost = "sql.lost"
	// ActionWireOpen and ActionWireClose are the ends of a session of PostgreSQL's own
	// protocol.
	ActionWireOpen  = "wire.open"
	ActionWireClose = "wire.close"
)

// wireKey names a session among queries.
func wireKey(e auditchain.Entry) string { return "wire " + e.SessionID }

// begun finds the queries and sessions without an end since the last start of agentd.
func begun(files []string) ([]auditchain.Entry, error) {
	var order []string
	open := map[string]auditchain.Entry{}
	closed := map[string]bool{} // ended in a later segment than they began in
	for _, file := range slices.Backward(files) {
		here := map[string]auditchain.Entry{}
		var names []string
		started := false
		_, err := scan(file, func(line []byte, _ int64) error {
			begin := bytes.Contains(line, beginMark)
			start := bytes.Contains(line, startMark)
			opens := bytes.Contains(line, openMark)
			if !begin && !start && !opens && !bytes.Contains(line, runMark) && !bytes.Contains(line, lostMark) && !bytes.Contains(line, closeMark) {
				return nil
			}
			e, err := auditchain.Decode(line)
			if err != nil {
				return err
			}
			switch e.Action { // the marks may have stood in a statement's text
			case ActionStart:
				clear(here)
				names, started = names[:0], true
			case ActionBegin:
				if !closed[e.QueryID] {
					here[e.QueryID] = e
					names = append(names, e.QueryID)
				}
			case ActionRun, ActionLost:
				delete(here, e.QueryID)
				closed[e.QueryID] = true
			case ActionWireOpen:
				if id := wireKey(e); !closed[id] {
					here[id] = e
					names = append(names, id)
				}
			case ActionWireClose:
				delete(here, wireKey(e))
				closed[wireKey(e)] = true
			}
			return nil
		})
		if err != nil {
			return nil, tampered(file, err)
		}
		for id, e := range here {
			open[id] = e
		}
		order = append(slices.Clone(names), order...)
		if started {
			break
		}
	}
	var entries []auditchain.Entry
	for _, id := range order {
		if e, ok := open[id]; ok {
			entries = append(entries, e)
			delete(open, id)
		}
	}
	return entries, nil
}

// Read returns the lines of entries from sequence number from on (1-based), at
// most limit and about 4 MiB; an empty page is the end. If from was retired, they begin
// with the first that is kept.
func (l *Log) Read(from uint64, limit int) (lines [][]byte, err error) {
	head := l.Head()
	err = again(func() error {
		lines, err = read(l.dir, from, limit, head.Sequence)
		return err
	})
	return lines, err
}

func read(dir string, from uint64, limit int, to uint64) ([][]byte, error) {
	files, err := segments(dir)
	if err != nil {
		return nil, err
	}
	// The first segment to look at is the last that begins at or before from.
	begin := 0
	for i, file := range files {
		first, err := firstSequence(file)
		if err != nil {
			return nil, tampered(file, err)
		}
		if first == 0 || first > from {
			break
		}
		begin = i
	}
	var lines [][]byte
	size := 0
	sequence := uint64(0)
	for _, file := range files[min(begin, len(files)):] {
		first, err := firstSequence(file)
		if err != nil {
			return nil, tampered(file, err)
		}
		sequence = first
		_, err = scan(file, func(line []byte, _ int64) error {
			if sequence > to || len(lines) >= limit || size >= maxPageBytes {
				return errStop
			}
			if sequence >= from {
				lines = append(lines, bytes.Clone(line))
				size += len(line)
			}
			sequence++
			return nil
		})
		if errors.Is(err, errStop) {
			break
		} else if err != nil {
			return nil, tampered(file, err)
		}
	}
	return lines, nil
}

// firstSequence is the number of a segment's first entry; 0 if it has none.
func firstSequence(file string) (uint64, error) {
	e, err := firstEntry(file)
	return e.Sequence, err
}

// List calls f with each entry of the log below stateDir, from sequence number
// from on, until f fails. It needs no running agentd and passes over a last line
// that is being written.
func List(stateDir string, from uint64, f func(line []byte, e auditchain.Entry) error) error {
	return again(func() error {
		files, err := segments(Dir(stateDir))
		if err != nil {
			return err
		}
		for _, file := range files {
			_, err := scan(file, func(line []byte, _ int64) error {
				e, err := auditchain.Decode(line)
				if err != nil {
					return &TamperedError{file, err}
				}
				if e.Sequence < from {
					return nil
				}
				from = e.Sequence + 1
				return f(line, e)
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// Found is what Verify found to be whole.
type Found struct {
	// Head is the last entry; zero for an empty log.
	Head auditchain.Head
	// Kept is the part that is there: all of it, or what was not retired.
	Kept auditchain.Kept
	// Torn tells that the log ends within a line, which a crash or a write under way explains.
	Torn bool
}

// String says how many entries there are, and from where on.
func (f Found) String() string {
	text := fmt.Sprintf("%d entries", f.Kept.Entries())
	if from := f.Kept.String(); from != "" {
		text += " " + from
	}
	return text
}

// Verify checks every entry of the log below stateDir. It needs no running agentd. What
// is missing at the beginning must be stood for by an entry that is there.
func Verify(stateDir string) (found Found, err error) {
	err = again(func() error {
		found, err = verify(Dir(stateDir))
		return err
	})
	return found, err
}

func verify(dir string) (found Found, err error) {
	files, err := segments(dir)
	if err != nil {
		return found, err
	}
	var v auditchain.KeptVerifier
	for i, file := range files {
		if i == 0 && numberOf(file) == 1 {
			// Nothing was retired: it begins with entry 1, whatever later entries say.
			if first, err := firstEntry(file); err == nil && first.Sequence > 1 {
				return found, &TamperedError{file, &auditchain.BrokenError{Sequence: 1, Reason: "removed: the first segment begins with entry " + strconv.FormatUint(first.Sequence, 10)}}
			}
		}
		rest, err := scan(file, func(line []byte, _ int64) error { return v.Add(line) })
		found.Head, found.Kept = v.Head(), v.Kept()
		if err != nil {
			return found, tampered(file, err)
		}
		if len(rest) > 0 {
			if i < len(files)-1 {
				return found, &TamperedError{file, errors.New("it ends within a line, and it is not the newest")}
			}
			found.Torn = true
		}
	}
	if err := v.End(); err != nil {
		return found, &TamperedError{files[0], err}
	}
	return found, nil
}

func headOf(e auditchain.Entry) (auditchain.Head, error) {
	var v auditchain.Head
	v.Sequence = e.Sequence
	hash, err := hex.DecodeString(e.Hash)
	if err != nil || len(hash) != len(v.Hash) {
		return v, fmt.Errorf("entry %d has no hash", e.Sequence)
	}
	copy(v.Hash[:], hash)
	return v, nil
}
