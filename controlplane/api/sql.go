package api

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/resultstream"
	"github.com/postern-dev/postern/proto/rowfmt"
)

// copyBuffer is how much of a result is in hand at once, in bytes.
const copyBuffer = 128 << 10

var copyBuffers = sync.Pool{New: func() any { b := make([]byte, copyBuffer); return &b }}

// signOfLife is how often a result that is silent says that it goes on: reverse
// proxies commonly end a response that is silent for 60 s.
const signOfLife = 15 * time.Second

// serveSQL runs a statement and streams its rows, in one of two ways: in the
// frames of package resultstream for clients that accept them, else bare, in a
// format that anybody reads.
func (a *API) serveSQL(w http.ResponseWriter, r *http.Request, c Caller) {
	format, statement, err := readStatement(w, r, c)
	if err != nil {
		writeError(w, r, err)
		return
	}
	start := func() (Result, error) {
		return a.cfg.Queries.Start(r.Context(), c, r.PathValue("agent"), r.PathValue("source"), statement)
	}
	if format == rowfmt.Arrow && strings.Contains(r.Header.Get("Accept"), resultstream.ContentType) {
		a.framed(w, r, start)
		return
	}
	if statement.SessionId != "" {
		start = early(start)
	}
	bare(w, r, start, format)
}

// early turns an error before the first row, which in a session comes with the
// outcome, into one of start, so that it becomes the response's status.
func early(start func() (Result, error)) func() (Result, error) {
	return func() (Result, error) {
		result, err := start()
		if err != nil {
			return nil, err
		}
		p := &peeked{Result: result, rows: bufio.NewReader(result)}
		if _, err := p.rows.Peek(1); errors.Is(err, io.EOF) {
			if outcome := result.Finish(nil); outcome.Error != nil {
				return nil, proto.FromDetail(outcome.Error)
			}
		}
		return p, nil
	}
}

// peeked is a result whose first rows have been waited for.
type peeked struct {
	Result
	rows *bufio.Reader
}

// Read implements io.Reader.
func (p *peeked) Read(b []byte) (int, error) { return p.rows.Read(b) }

func resultHeader(h http.Header, contentType string) {
	h.Set("Content-Type", contentType)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store")
	h.Set("X-Accel-Buffering", "no") // nginx would collect the rows first
}

// framed streams Arrow with signs of life and the outcome at its end.
func (a *API) framed(w http.ResponseWriter, r *http.Request, start func() (Result, error)) {
	out := resultstream.NewWriter(frameSink{w, http.NewResponseController(w)}, a.cfg.SignOfLife)
	defer out.Close()
	result, err := start()
	if err != nil {
		if out.Stop() {
			writeError(w, r, err)
		} else {
			out.End(&posternv1.QueryOutcome{Error: proto.Detail(err)})
		}
		return
	}
	out.QueryID(result.QueryID())
	_, err = out.ReadFrom(result)
	var hangup *resultstream.SinkError
	if errors.As(err, &hangup) {
		err = hungUp(err)
	}
	out.End(result.Finish(err))
}

// frameSink begins the response when its first frame is there.
type frameSink struct {
	http.ResponseWriter
	control *http.ResponseController
}

// SetQueryID implements resultstream.Sink.
func (s frameSink) SetQueryID(id string) { s.Header().Set(proto.QueryIDHeader, id) }

// Begin implements resultstream.Sink.
func (s frameSink) Begin() {
	resultHeader(s.Header(), resultstream.ContentType)
	s.WriteHeader(http.StatusOK)
}

// Flush implements resultstream.Sink.
func (s frameSink) Flush() error { return s.control.Flush() }

// bare streams the rows alone. The outcome is a trailer for clients that want
// trailers; for others a result that ends early breaks the connection.
func bare(w http.ResponseWriter, r *http.Request, start func() (Result, error), format rowfmt.Format) {
	result, err := start()
	if err != nil {
		writeError(w, r, err)
		return
	}
	h := w.Header()
	resultHeader(h, format.ContentType())
	h.Set(proto.QueryIDHeader, result.QueryID())
	trailers := strings.Contains(strings.ToLower(r.Header.Get("TE")), "trailers")
	if trailers {
		h.Set("Trailer", proto.OutcomeTrailer)
	}
	w.WriteHeader(http.StatusOK)
	outcome := result.Finish(stream(r.Context(), w, result, format))
	switch {
	case trailers:
		h.Set(proto.OutcomeTrailer, proto.EncodeOutcome(outcome))
	case outcome.Error != nil:
		// The client would take a clean end for a whole result.
		panic(http.ErrAbortHandler)
	}
}

func readStatement(w http.ResponseWriter, r *http.Request, c Caller) (rowfmt.Format, *posternv1.RunSQLRequest, error) {
	var zero rowfmt.Format
	if err := permit(c, runSQL); err != nil {
		return zero, nil, err
	}
	name := r.URL.Query().Get("format")
	if name == "" {
		name = "arrow"
	}
	format, err := rowfmt.ParseFormat(name)
	if err != nil {
		return zero, nil, proto.Errorf(proto.CodeInvalid, "format: %w", err)
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, proto.MaxSQLRequest))
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return zero, nil, proto.Errorf(proto.CodeBodyTooLarge, "the request has more than %d bytes", proto.MaxSQLRequest)
	case err != nil:
		return zero, nil, proto.Errorf(proto.CodeInvalid, "the request did not arrive whole")
	}
	var statement posternv1.RunSQLRequest
	if err := protojson.Unmarshal(body, &statement); err != nil {
		return zero, nil, proto.Errorf(proto.CodeInvalid, "the request is not a RunSQLRequest in JSON: %v", err)
	}
	if strings.TrimSpace(statement.Sql) == "" {
		return zero, nil, proto.Errorf(proto.CodeInvalid, "the statement is empty")
	}
	return format, &statement, nil
}

// stream copies the rows to w. What arrives is sent on at once: a buffer that is
// not full means that the database has no more just now.
func stream(ctx context.Context, w http.ResponseWriter, rows io.Reader, format rowfmt.Format) error {
	flusher := http.NewResponseController(w)
	if format != rowfmt.Arrow {
		err := rowfmt.Convert(ctx, &flushingWriter{w, flusher}, rows, format, rowfmt.Options{})
		if err == nil {
			// The converter stops at Arrow's end mark; how it ended comes after.
			_, err = io.Copy(io.Discard, rows)
		}
		return err
	}
	buffer := copyBuffers.Get().(*[]byte)
	defer copyBuffers.Put(buffer)
	for {
		n, err := rows.Read(*buffer)
		if n > 0 {
			if _, werr := w.Write((*buffer)[:n]); werr != nil {
				return hungUp(werr)
			}
			if ferr := flusher.Flush(); ferr != nil {
				return hungUp(ferr)
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
	}
}

func hungUp(err error) error {
	return &proto.Error{Code: proto.CodeCancelled, Message: "the client hung up", Err: err}
}

// flushingWriter sends each write on at once; converters write in large pieces.
type flushingWriter struct {
	w http.ResponseWriter
	f *http.ResponseController
}

// Write implements io.Writer.
func (fw *flushingWriter) Write(p []byte) (int, error) {
	n, err := fw.w.Write(p)
	if err == nil {
		err = fw.f.Flush()
	}
	if err != nil {
		return n, hungUp(err)
	}
	return n, nil
}
