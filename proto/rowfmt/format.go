package rowfmt

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
)

// Format is the name of an output format.
type Format string

// The formats, under the names that users type.
const (
	Table   Format = "table"
	CSV     Format = "csv"
	JSON    Format = "json"
	NDJSON  Format = "ndjson"
	Arrow   Format = "arrow"
	Parquet Format = "parquet"
)

// Formats lists every format.
func Formats() []Format { return []Format{Table, CSV, JSON, NDJSON, Arrow, Parquet} }

// ErrNoSchema is returned when the source ends before an Arrow schema.
var ErrNoSchema = errors.New("the result has no Arrow schema: it is empty")

// ErrGarbled is returned, wrapped with what is wrong, when the source is not an
// Arrow IPC stream as a SQL session writes it.
var ErrGarbled = errors.New("the result is not a valid Arrow stream")

// ParseFormat returns the format called name; the error lists them all.
func ParseFormat(name string) (Format, error) {
	for _, f := range Formats() {
		if string(f) == name {
			return f, nil
		}
	}
	names := make([]string, 0, 6)
	for _, f := range Formats() {
		names = append(names, string(f))
	}
	return "", fmt.Errorf("unknown format %q: choose one of %s", name, strings.Join(names, ", "))
}

// ContentType is the media type of f.
func (f Format) ContentType() string {
	switch f {
	case CSV:
		return "text/csv; charset=utf-8; header=present"
	case JSON:
		return "application/json"
	case NDJSON:
		return "application/x-ndjson"
	case Arrow:
		return "application/vnd.apache.arrow.stream"
	case Parquet:
		return "application/vnd.apache.parquet"
	default:
		return "text/plain; charset=utf-8"
	}
}

// Binary says whether f does not belong on a terminal.
func (f Format) Binary() bool { return f == Arrow || f == Parquet }

// DefaultMaxMessage is Options.MaxMessage when that is 0, in bytes.
const DefaultMaxMessage = 256 << 20

// Options tune Convert; the zero value is right for most callers.
type Options struct {
	// Null is what a NULL looks like in a table; empty as in psql.
	Null string
	// Expanded shows each row of a table as a block, with a line for each column.
	Expanded bool
	// MaxMessage bounds one message (a batch of rows) of the source, in bytes;
	// 0 means DefaultMaxMessage. Not looked at for Arrow, which is copied.
	MaxMessage int64
	// Rows, if not nil, is called after each batch with the rows so far, on
	// Convert's goroutine. Never called for Arrow.
	Rows func(rows int64)
	// Excerpt says which rows the source lacks; the zero value: none. Tables alone
	// show it.
	Excerpt Excerpt
}

// Excerpt is a gap in the rows: Missing rows are not there behind the first After.
type Excerpt struct{ After, Missing int64 }

// Convert reads an Arrow IPC stream from src until its end and writes it to dst
// as f. Rows are written as they come: nothing waits for the next batch, except
// in a table for its first 1,000 rows and in parquet for its row group. When src
// fails, what came before is written and the error returned; JSON then lacks
// its closing bracket and parquet its footer, so that no reader takes a part for
// the whole. ctx is looked at between batches; to interrupt a blocked read or
// write, close src or dst.
//
// Errors: ErrNoSchema, ErrGarbled, ctx's, and those of src and dst.
func Convert(ctx context.Context, dst io.Writer, src io.Reader, f Format, opts Options) error {
	if opts.MaxMessage <= 0 {
		opts.MaxMessage = DefaultMaxMessage
	}
	switch f {
	case Arrow:
		return copyContext(ctx, dst, src)
	case Table, CSV, JSON, NDJSON, Parquet:
	default:
		return fmt.Errorf("convert to %q: no such format", string(f))
	}
	s := newStream(src, opts.MaxMessage)
	// Parquet's writer may keep references into a batch beyond the write.
	s.fresh = f == Parquet
	if err := s.readSchema(); err != nil {
		return err
	}
	o := &out{w: dst}
	var e encoder
	switch f {
	case CSV:
		e = newCSV(o, s.columns)
	case JSON, NDJSON:
		e = newJSON(o, s.columns, f == NDJSON)
	case Table:
		if opts.Expanded {
			e = newExpanded(o, s.columns, opts.Null)
			break
		}
		table := newTable(o, s.columns, opts.Null)
		table.excerpt = opts.Excerpt
		e = table
	case Parquet:
		p, err := newParquet(o, s)
		if err != nil {
			return err
		}
		e = p
	}
	if err := convertBatches(ctx, s, e, opts.Rows); err != nil {
		// What came is worth having; the first error is the one that counts.
		e.abort()
		_ = o.flush()
		return err
	}
	if err := e.end(); err != nil {
		return err
	}
	return o.flush()
}

// encoder writes one format. Its methods run in the order begin, batch..., then
// end or abort.
type encoder interface {
	begin() error
	// batch writes the rows of the columns as they stand.
	batch(rows int) error
	end() error
	// abort gives out rows that are held back, without what makes the output
	// look complete.
	abort()
}

func convertBatches(ctx context.Context, s *stream, e encoder, progress func(int64)) error {
	if err := e.begin(); err != nil {
		return err
	}
	var total int64
	for {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		rows, err := s.next()
		if err == io.EOF { //nolint:errorlint // next returns it bare
			return nil
		}
		if err != nil {
			return err
		}
		if err := e.batch(rows); err != nil {
			return err
		}
		total += int64(rows)
		if progress != nil {
			progress(total)
		}
	}
}

func copyContext(ctx context.Context, dst io.Writer, src io.Reader) error {
	buf := make([]byte, 128<<10)
	for {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		n, err := src.Read(buf)
		if n > 0 {
			if _, werr := dst.Write(buf[:n]); werr != nil {
				return werr
			}
		}
		if err == io.EOF { //nolint:errorlint // the contract of io.Reader
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// flushAt is when buffered output is written, in bytes; large enough that the
// call does not count, small enough for a cache.
const flushAt = 64 << 10

// out is a buffer that encoders append to. Its error sticks.
type out struct {
	w   io.Writer
	buf []byte
	err error
}

// Write lets the parquet writer use the same sink.
func (o *out) Write(p []byte) (int, error) {
	if len(o.buf)+len(p) > flushAt {
		if err := o.flush(); err != nil {
			return 0, err
		}
	}
	if len(p) >= flushAt {
		n, err := o.w.Write(p)
		o.err = err
		return n, err
	}
	o.buf = append(o.buf, p...)
	return len(p), nil
}

func (o *out) full() bool { return len(o.buf) >= flushAt }

func (o *out) flush() error {
	if o.err == nil && len(o.buf) > 0 {
		_, o.err = o.w.Write(o.buf)
	}
	o.buf = o.buf[:0]
	return o.err
}
