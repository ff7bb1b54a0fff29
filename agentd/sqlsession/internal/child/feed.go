package child

import (
	"errors"
	"io"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/proto"
)

// cell is one value of a row on its way into a batch: text for layouts of
// variable length, bits (an integer, or a float's bits) for the others.
type cell struct {
	null bool
	text []byte // valid until the next row
	bits int64
}

// cursor is a result of a database whose library hands out rows.
type cursor interface {
	// next reads a row into cells, one for each field of the batch; io.EOF at the
	// end. A *valueError is a value that the column can't hold.
	next(cells []cell) error
	// rest throws the rest of the rows away, so that the database is done with the
	// statement. It may be called from another goroutine than next, not at the same
	// time.
	rest() error
}

// feed takes the rows of a cursor into a batch, within the statement's limits. A
// goroutine of its own sends on what waits while the database pauses.
type feed struct {
	sink    *sink
	request *frame.RunRequest
	st      *statement
	cursor  cursor
	cells   []cell
	value   *valueError
	// drained is set while, or after, another goroutine throws the rest away: see
	// stalled. It is run's own.
	drained chan error

	// lock is held (has an element) by who uses what follows.
	lock    chan struct{}
	batch   *batch
	seen    uint64 // the rows at the last look
	ticking bool   // it is tick that flushes
}

// newFeed begins a statement's stream.
func newFeed(s *sink, r *frame.RunRequest, st *statement, fields []field, c cursor) *feed {
	s.start()
	f := &feed{
		sink: s, request: r, st: st, cursor: c, cells: make([]cell, len(fields)),
		lock: make(chan struct{}, 1), batch: newFieldBatch(fields, s),
	}
	f.batch.limit, f.batch.exceeded = r.MaxBytes, func() { st.stop(byteLimit) }
	f.batch.keep = newKeeper(f.batch.columns, r.KeepFirst, r.KeepLast)
	return f
}

// run takes all rows. The error is what the cursor said, nil at the end.
func (f *feed) run() error {
	f.sink.wait = f.stalled
	defer func() { f.sink.wait = nil }()
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		f.tick(stop)
	}()
	err := f.rows()
	close(stop)
	<-stopped
	if f.drained != nil {
		err = <-f.drained
		f.drained <- err
	}
	if f.batch.hides && err == nil && f.drained == nil {
		// Masked rows may turn out too long: that is known before the verdict.
		err = f.batch.flush()
	}
	return err
}

func (f *feed) rows() error {
	for {
		if f.drained != nil {
			return nil
		}
		if f.st.isStopped() {
			return f.cursor.rest()
		}
		err := f.cursor.next(f.cells)
		switch {
		case err == io.EOF:
			return nil
		case errors.As(err, &f.value):
			f.st.stop(badValue)
			continue
		case err != nil:
			return err
		}
		if err := f.take(); err != nil {
			return err
		}
	}
}

// take adds the row in the cells.
func (f *feed) take() error {
	select {
	case f.lock <- struct{}{}:
	case <-f.st.stopped:
		return nil // tick may wait for a slow reader, and no more rows are wanted
	}
	defer func() { <-f.lock }()
	b := f.batch
	if b.total() >= f.request.MaxRows {
		f.st.stop(rowLimit)
		return nil
	}
	size := 0
	for i := range f.cells {
		n := -1
		if !f.cells[i].null {
			n = len(f.cells[i].text)
		}
		size += b.columns[i].valueSize(n)
	}
	if !b.fitsMore(f.request.MaxBytes, size) {
		f.st.stop(byteLimit)
		return nil
	}
	if size >= giantRow {
		// A giant row gets a batch of its own.
		if err := b.flush(); err != nil || f.drained != nil {
			return err
		}
	}
	for i := range f.cells {
		b.columns[i].setCell(b.rows, &f.cells[i])
	}
	b.endRow(size)
	if b.full() || size >= giantRow {
		return b.flush()
	}
	return nil
}

// tick sends rows on that have waited while no more came.
func (f *feed) tick(stop <-chan struct{}) {
	t := time.NewTicker(firstDelay)
	defer t.Stop()
	for first := true; ; {
		select {
		case <-stop:
			return
		case <-t.C:
		}
		select {
		case f.lock <- struct{}{}:
		case <-stop:
			return
		}
		if f.batch.rows > 0 && f.batch.total() == f.seen && !f.st.isStopped() {
			f.ticking = true
			// What is wrong with the stream is seen by the next flush, too.
			_ = f.batch.flush()
			f.ticking = false
		}
		f.seen = f.batch.total()
		if first && !f.batch.first {
			first = false
			t.Reset(laterDelay)
		}
		<-f.lock
	}
}

// stalled is called when the result's reader is slow and the sink has no free
// buffer. If the statement is stopped meanwhile, the database is freed at once:
// one that waits for us to read may see no cancel. When it is tick that waits, run
// sees the stop by itself.
func (f *feed) stalled(free <-chan []byte) []byte {
	if f.drained == nil && !f.ticking {
		select {
		case b := <-free:
			return b
		case <-f.st.stopped:
		}
		f.drained = make(chan error, 1)
		go func() { f.drained <- f.cursor.rest() }()
	}
	return <-free
}

// end closes the stream of a statement that ended with failure, or without, and
// says how many rows it has.
func (f *feed) end(failure *proto.Error) (rows uint64, problem *proto.Error) {
	if failure != nil && f.sink.submitted == 0 && f.batch.total() == 0 {
		f.sink.discard()
	} else if err := f.batch.close(); err != nil && failure == nil {
		failure = proto.Errorf(proto.CodeInternal, "encode the result: %w", err)
	}
	if f.sink.submitted > 0 && f.batch.keep != nil {
		if payload, err := f.batch.keep.encode(f.batch.schema); err == nil && payload != nil {
			_ = f.sink.send(frame.Kept, payload)
		}
	}
	return f.batch.flushed, failure
}
