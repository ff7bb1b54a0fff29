package journal

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
)

// scan reads a segment at Open: it takes up what is remembered and finds its end.
// torn is how many bytes behind that are no record.
func (j *Journal) scan(s *segment) (torn int64, err error) {
	f, err := os.Open(s.path)
	if err != nil {
		return 0, err
	}
	defer f.Close() //nolint:errcheck // it was read
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	in := bufio.NewReaderSize(f, 256<<10)
	for {
		var raw [headerSize]byte
		if _, err := io.ReadFull(in, raw[:]); err != nil {
			break
		}
		h, err := parseHeader(raw[:])
		if err != nil || int64(h.length) > info.Size()-s.size {
			break
		}
		sum := crc32.Update(0, castagnoli, raw[8:])
		var body []byte
		if h.kind == kindMessage {
			// Its payload is not needed, and may be large.
			sum, err = sumOf(in, int64(h.length), sum)
		} else {
			body = make([]byte, h.length)
			_, err = io.ReadFull(in, body)
			sum = crc32.Update(sum, castagnoli, body)
		}
		if err != nil || sum != h.sum {
			break
		}
		s.size += headerSize + int64(h.length)
		j.take(s, h, body)
	}
	return info.Size() - s.size, nil
}

func sumOf(in io.Reader, n int64, sum uint32) (uint32, error) {
	var b [32 << 10]byte
	for n > 0 {
		got, err := io.ReadFull(in, b[:min(n, int64(len(b)))])
		sum = crc32.Update(sum, castagnoli, b[:got])
		n -= int64(got)
		if err != nil {
			return sum, err
		}
	}
	return sum, nil
}

// take takes a record up.
func (j *Journal) take(s *segment, h header, body []byte) {
	client, payload := "", body
	if h.kind != kindMessage {
		client, payload = string(body[:h.client]), body[h.client:]
	}
	switch h.kind {
	case kindMessage:
		if s.first == 0 {
			s.first = h.sequence
		}
		j.next = max(j.next, h.sequence+1)
	case kindSnapshot:
		var state snapshot
		if json.Unmarshal(payload, &state) != nil || state.Clients == nil || state.Requests == nil {
			return
		}
		for name, p := range state.Clients {
			if p == nil {
				delete(state.Clients, name)
				continue
			}
			j.heard = max(j.heard, p.Heard)
		}
		j.state = state
		s.first = max(1, state.Next)
		j.next = max(j.next, state.Next)
	case kindConfirm:
		if len(payload) == 8 && client != "" {
			p := j.positionLocked(client)
			p.Confirmed = max(p.Confirmed, binary.LittleEndian.Uint64(payload))
		}
	case kindSent:
		var r Request
		if json.Unmarshal(payload, &r) == nil {
			j.state.Requests[r.ID] = r
		}
	case kindAnswered:
		delete(j.state.Requests, string(payload))
	}
}

// smallRecord is up to which size a record is read into memory, in bytes.
const smallRecord = 128 << 10

// A Record is a message for a reader, or a gap.
type Record struct {
	// Sequence is the message's, or the last of the gap.
	Sequence uint64
	// GapFrom is the first of a gap; 0: it is a message.
	GapFrom uint64
	// Size is the length of the message's protobuf in bytes.
	Size int64

	small []byte
	file  *os.File
	at    int64
}

// WriteTo writes the message's protobuf (posternv1.KernelMessage). It is valid until
// the reader's next call.
func (r *Record) WriteTo(w io.Writer) (int64, error) {
	if r.small != nil {
		n, err := w.Write(r.small)
		return int64(n), err
	}
	return io.CopyBuffer(struct{ io.Writer }{w}, io.NewSectionReader(r.file, r.at, r.Size), make([]byte, smallRecord))
}

// Reader reads a client's messages in order.
type Reader struct {
	j      *Journal
	client string
	want   uint64 // the next sequence number

	seg   *segment
	file  *os.File
	at    int64 // of the next record
	limit int64 // what is committed, as far as is known

	buf        []byte // bytes of the file from start on
	start, end int64
}

// Reader returns a reader of what is for client and for everybody, from the message
// after sequence on. The caller closes it.
func (j *Journal) Reader(client string, after uint64) *Reader {
	j.mu.Lock()
	defer j.mu.Unlock()
	return &Reader{j: j, client: client, want: min(after+1, j.next)}
}

// Position is up to where it has read.
func (r *Reader) Position() uint64 { return r.want - 1 }

// Close lets go of the file.
func (r *Reader) Close() error {
	if r.file == nil {
		return nil
	}
	err := r.file.Close()
	r.file = nil
	return err
}

// Try is Next that does not wait: nil when there is nothing.
func (r *Reader) Try() (*Record, error) {
	record, _, err := r.try()
	return record, err
}

// Next waits for the next message. ErrClosed means that the journal was closed.
func (r *Reader) Next(ctx context.Context) (*Record, error) {
	for {
		record, news, err := r.try()
		if record != nil || err != nil {
			return record, err
		}
		select {
		case <-news:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// Poll is Next that does not wait: without a record it returns a channel that is
// closed when there may be one.
func (r *Reader) Poll() (*Record, <-chan struct{}, error) { return r.try() }

func (r *Reader) try() (*Record, <-chan struct{}, error) {
	for {
		r.j.mu.Lock()
		news, next, closed := r.j.news, r.j.next, r.j.closed
		if r.seg == nil {
			r.findLocked()
		}
		if r.seg != nil {
			r.limit = r.seg.size
		}
		last := len(r.j.segs) == 0 || r.seg == r.j.segs[len(r.j.segs)-1]
		r.j.mu.Unlock()
		if closed {
			return nil, nil, ErrClosed
		}
		if r.seg != nil && r.file == nil {
			f, err := os.Open(r.seg.path)
			if errors.Is(err, fs.ErrNotExist) {
				r.leave() // it went meanwhile: the oldest that is there comes next
				continue
			}
			if err != nil {
				return nil, nil, fmt.Errorf("kernel's journal: %w", err)
			}
			r.file, r.at, r.start, r.end = f, 0, 0, 0
		}
		record, err := r.scan()
		if record != nil || err != nil {
			return record, nil, err
		}
		if !last {
			// The whole segment was read. Its successor says what is missing.
			if !r.advance() {
				r.leave()
			}
			continue
		}
		if r.want < next {
			// Not kept: the numbers up to the newest are in no record.
			gap := &Record{GapFrom: r.want, Sequence: next - 1}
			r.want = next
			return gap, nil, nil
		}
		return nil, news, nil
	}
}

// findLocked chooses the segment that has what is wanted, or the oldest.
func (r *Reader) findLocked() {
	for i, s := range r.j.segs {
		if i == 0 || s.first <= r.want {
			r.seg = s
		}
	}
}

// advance goes to the segment after this one; false: it is gone, too.
func (r *Reader) advance() bool {
	r.j.mu.Lock()
	defer r.j.mu.Unlock()
	for _, s := range r.j.segs {
		if s.index == r.seg.index+1 {
			_ = r.Close()
			r.seg = s
			return true
		}
	}
	return false
}

func (r *Reader) leave() {
	_ = r.Close()
	r.seg = nil
}

// scan returns the next record of the segment, nil at its end.
func (r *Reader) scan() (*Record, error) {
	for r.at+headerSize <= r.limit {
		raw, err := r.bytes(r.at, headerSize)
		if err != nil {
			return nil, err
		}
		h, err := parseHeader(raw)
		if err != nil {
			return nil, fmt.Errorf("kernel's journal: %s is damaged at byte %d", r.file.Name(), r.at)
		}
		end := r.at + headerSize + int64(h.length)
		if end > r.limit {
			return nil, nil
		}
		if h.kind != kindMessage || h.sequence < r.want {
			r.at = end
			continue
		}
		if h.sequence > r.want {
			gap := &Record{GapFrom: r.want, Sequence: h.sequence - 1}
			r.want = h.sequence
			return gap, nil
		}
		head, err := r.bytes(r.at, headerSize+int64(h.client))
		if err != nil {
			return nil, err
		}
		owner := string(head[headerSize:])
		record := &Record{Sequence: h.sequence, Size: int64(h.length) - int64(h.client), at: r.at + headerSize + int64(h.client), file: r.file}
		r.want = h.sequence + 1
		r.at = end
		if owner != "" && owner != r.client {
			continue
		}
		if record.Size <= smallRecord {
			if record.small, err = r.bytes(record.at, record.Size); err != nil {
				return nil, err
			}
			if record.small == nil {
				record.small = []byte{}
			}
		}
		return record, nil
	}
	return nil, nil
}

// bytes are n bytes of the file, at most smallRecord and a header, valid until the next call.
func (r *Reader) bytes(at, n int64) ([]byte, error) {
	if at < r.start || at+n > r.end {
		if r.buf == nil {
			r.buf = make([]byte, 2*smallRecord)
		}
		size := min(int64(len(r.buf)), r.limit-at)
		got, err := r.file.ReadAt(r.buf[:size], at)
		if int64(got) < n {
			if err == nil || err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return nil, fmt.Errorf("kernel's journal: %w", err)
		}
		r.start, r.end = at, at+int64(got)
	}
	return r.buf[at-r.start : at-r.start+n], nil
}
