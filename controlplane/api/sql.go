package api

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/rowfmt"
)

// copyBuffer is how much of a result is in hand at once, in bytes.
const copyBuffer = 128 << 10

var copyBuffers = sync.Pool{New: func() any { b := make([]byte, copyBuffer); return &b }}

// serveSQL runs a statement and streams its rows.
func (a *API) serveSQL(w http.ResponseWriter, r *http.Request, c Caller) {
	format, statement, err := readStatement(w, r, c)
	if err != nil {
		writeError(w, r, err)
		return
	}
	result, err := a.cfg.Queries.Start(r.Context(), c, r.PathValue("agent"), r.PathValue("source"), statement)
	if err != nil {
		writeError(w, r, err)
		return
	}
	h := w.Header()
	h.Set("Content-Type", format.ContentType())
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store")
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
