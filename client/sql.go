package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/resultstream"
)

// SQL runs a statement and returns its rows as soon as the first is there. An
// error means that no row will come. ctx bounds the statement with its rows:
// its end cancels the statement in the database. Close the rows.
func (c *Client) SQL(ctx context.Context, agent, source string, statement *posternv1.RunSQLRequest) (*Rows, error) {
	body, err := protojson.Marshal(statement)
	if err != nil {
		return nil, fmt.Errorf("the statement is not valid UTF-8: %w", err)
	}
	address := c.base.String() + "/api/v1/sql/" + url.PathEscape(agent) + "/" + url.PathEscape(source) + "?format=arrow"
	ctx, cancel := context.WithCancel(ctx)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, address, bytes.NewReader(body))
	if err != nil {
		cancel()
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", resultstream.ContentType+", application/vnd.apache.arrow.stream;q=0.5")
	req.Header.Set("TE", "trailers") // of a server that knows no better
	req.GetBody = nil                // never sent twice
	resp, err := c.http.Do(req)
	if err != nil {
		cancel()
		var public *proto.Error
		if errors.As(err, &public) { // without *url.Error's prefix
			return nil, public
		}
		if ctxErr := ctx.Err(); ctxErr != nil {
			return nil, ctxErr
		}
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		defer cancel()
		defer resp.Body.Close() //nolint:errcheck // it was only read
		return nil, proto.ReadHTTPError(resp)
	}
	rows := &Rows{client: c, resp: resp, ctx: ctx, cancel: cancel, queryID: resp.Header.Get(proto.QueryIDHeader)}
	if resp.Header.Get("Content-Type") == resultstream.ContentType {
		rows.stream = resultstream.NewReader(resp.Body)
	}
	return rows, nil
}

// Rows is a result under way: an Arrow IPC stream to read to its end, and then
// the outcome. Not safe for concurrent use, but for Close.
type Rows struct {
	client  *Client
	resp    *http.Response
	ctx     context.Context // of the request
	cancel  context.CancelFunc
	queryID string
	stream  *resultstream.Reader // nil: bare Arrow, with a trailer
	bytes   uint64
	ended   bool
	outcome *posternv1.QueryOutcome
	err     error
}

// QueryID names the query, for CancelQuery and the history.
// It may become known only with the first row.
func (r *Rows) QueryID() string {
	if r.queryID == "" && r.stream != nil {
		return r.stream.QueryID()
	}
	return r.queryID
}

// Read implements io.Reader. io.EOF means that the server said how the statement
// ended, well or not: ask Outcome. Another error means that it did not, and that
// the rows are incomplete.
func (r *Rows) Read(p []byte) (int, error) {
	if r.ended {
		if r.outcome != nil {
			return 0, io.EOF
		}
		return 0, r.err
	}
	var n int
	var err error
	if r.stream != nil {
		n, err = r.stream.Read(p)
	} else {
		n, err = r.resp.Body.Read(p)
	}
	r.bytes += uint64(n)
	if err == nil {
		return n, nil
	}
	r.ended = true
	switch {
	case r.ctx.Err() != nil:
		r.err = r.ctx.Err()
	case !errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
		r.err = r.lost(err)
	case r.stream != nil:
		r.outcome = r.stream.Outcome()
		io.CopyN(io.Discard, r.resp.Body, 1) //nolint:errcheck // its end, so that the connection serves again
	default:
		r.finish()
	}
	if r.outcome != nil {
		return n, io.EOF
	}
	return n, r.err
}

func (r *Rows) lost(cause error) error {
	return &proto.Error{
		Code:    proto.CodeUnavailable,
		Message: "the control plane went away while the result was under way: the rows so far are incomplete",
		Err:     cause,
	}
}

// finish finds out how the statement ended, after a clean end of the body.
func (r *Rows) finish() {
	if text := r.resp.Trailer.Get(proto.OutcomeTrailer); text != "" {
		outcome, err := proto.DecodeOutcome(text)
		if err != nil {
			r.err = &proto.Error{Code: proto.CodeInternal, Message: "the control plane's answer ends in what is not an outcome: the rows may be incomplete", Err: err}
			return
		}
		r.outcome = outcome
		return
	}
	// Proxies may drop trailers (nginx does, by default). The history knows too,
	// and its count of bytes tells a whole result from a part.
	if r.queryID != "" {
		ctx, cancel := context.WithTimeout(r.ctx, 10*time.Second)
		defer cancel()
		if outcome := r.fromHistory(ctx); outcome != nil {
			r.outcome = outcome
			return
		}
	}
	r.err = r.lost(nil)
}

func (r *Rows) fromHistory(ctx context.Context) *posternv1.QueryOutcome {
	resp, err := r.client.Queries.GetQuery(ctx, connect.NewRequest(&posternv1.GetQueryRequest{QueryId: r.queryID}))
	if err != nil {
		return nil
	}
	q := resp.Msg.GetQuery()
	outcome := &posternv1.QueryOutcome{QueryId: r.queryID, Rows: q.GetRows(), Bytes: q.GetBytes(), Duration: q.GetDuration(), Error: q.GetError()}
	switch {
	case q.GetState() == "" || q.GetState() == "running" || q.GetBytes() != r.bytes:
		return nil
	case q.GetState() != "done" && outcome.Error == nil:
		return nil
	}
	return outcome
}

// Outcome says how the statement ended, once Read has returned io.EOF. Its error
// is the statement's: rows before it are valid but incomplete. The outcome is
// not nil unless the error is that it could not be had.
func (r *Rows) Outcome() (*posternv1.QueryOutcome, error) {
	switch {
	case r.outcome != nil && r.outcome.Error != nil:
		return r.outcome, proto.FromDetail(r.outcome.Error)
	case r.outcome != nil:
		return r.outcome, nil
	case r.err != nil:
		return nil, r.err
	}
	return nil, errors.New("the outcome was asked for before the end of the rows")
}

// Close gives up what has not been read: the server then cancels the statement.
// It may be called more than once, and while Read blocks.
func (r *Rows) Close() error {
	r.cancel()
	return r.resp.Body.Close()
}
