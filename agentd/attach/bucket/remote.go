package bucket

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/postern-dev/postern/proto"
)

// Path is where Handler answers: Path NAME "/" OPERATION. Arguments are in the query.
//
//	POST head   key                 -> Object
//	POST list   directory token limit -> Page
//	POST read   key etag off n      -> n bytes; fewer are an error
//	POST write  key; body           -> Object
//	POST copy   key from            -> Object
//	POST delete key
const Path = "/postern/v1/bucket/"

// changedHeader marks the answer to a read of a version that is gone.
const changedHeader = "Postern-Object-Changed"

// maxAnswer bounds an answer that is not a body: a page of the longest keys.
const maxAnswer = 8 << 20

// Handler answers Clients. find gives the Store of a name and a function to call when it is
// not needed any more; an error of POLICY_DENIED or NOT_FOUND is what the asker gets.
func Handler(find func(ctx context.Context, name string) (*Store, func(), error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name, op, ok := strings.Cut(strings.TrimPrefix(r.URL.Path, Path), "/")
		if !ok || r.Method != http.MethodPost {
			proto.WriteHTTPError(w, proto.Errorf(proto.CodeNotFound, "no such question about a bucket"))
			return
		}
		s, done, err := find(r.Context(), name)
		if err != nil {
			proto.WriteHTTPError(w, err)
			return
		}
		defer done()
		answer(w, r, s, op)
	})
}

func answer(w http.ResponseWriter, r *http.Request, s *Store, op string) {
	q, ctx := r.URL.Query(), r.Context()
	number := func(name string) int64 {
		n, err := strconv.ParseInt(q.Get(name), 10, 64)
		if err != nil {
			return -1
		}
		return n
	}
	var out any = struct{}{}
	var err error
	switch op {
	case "head":
		out, err = s.Head(ctx, q.Get("key"))
	case "list":
		out, err = s.List(ctx, q.Get("directory"), q.Get("token"), int(number("limit")))
	case "read":
		body := &lateHeader{w: w, n: number("n")}
		if err = s.Read(ctx, q.Get("key"), q.Get("etag"), number("off"), body.n, body); err == nil {
			_, err = body.Write(nil)
		}
		s.cfg.Metrics.got(body.sent)
		if err != nil && body.begun {
			s.cfg.Metrics.ended(op, err)
			// The length tells the asker, who asks for what is missing and then hears why.
			http.NewResponseController(w).Flush() //nolint:errcheck // it has gone, or not
			panic(http.ErrAbortHandler)
		}
		if err == nil {
			s.cfg.Metrics.ended(op, nil)
			return
		}
	case "write":
		if r.ContentLength < 0 {
			err = proto.Errorf(proto.CodeInvalid, "the body's length is missing")
			break
		}
		if out, err = s.WriteStream(ctx, q.Get("key"), r.Body, r.ContentLength); err == nil {
			s.cfg.Metrics.took(r.ContentLength)
		}
	case "copy":
		out, err = s.Copy(ctx, q.Get("key"), q.Get("from"))
	case "delete":
		err = s.Delete(ctx, q.Get("key"))
	default:
		err = proto.Errorf(proto.CodeNotFound, "no such question about a bucket")
	}
	if slices.Contains(operations, op) {
		s.cfg.Metrics.ended(op, err)
	}
	if err != nil {
		if Changed(err) {
			w.Header().Set(changedHeader, "1")
			err = &proto.Error{Code: proto.CodeAlreadyExists, Message: err.Error()}
		}
		proto.WriteHTTPError(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(out) //nolint:errcheck // the asker has gone
}

// lateHeader writes the header before the first byte: until then an error can be told.
type lateHeader struct {
	w     http.ResponseWriter
	n     int64
	sent  int64
	begun bool
}

// Write implements io.Writer.
func (l *lateHeader) Write(b []byte) (int, error) {
	if !l.begun {
		l.begun = true
		l.w.Header().Set("Content-Type", "application/octet-stream")
		l.w.Header().Set("Content-Length", strconv.FormatInt(l.n, 10))
		l.w.WriteHeader(http.StatusOK)
	}
	n, err := l.w.Write(b)
	l.sent += int64(n)
	return n, err
}

// Client is a Remote by agentd's unix socket. It waits for an agentd that is being
// restarted as long as the context lets it.
type Client struct {
	name string
	http *http.Client
}

var _ Remote = (*Client)(nil)

// Dial returns a Client of the bucket name at the socket; it connects when it is used.
func Dial(socket, name string) *Client {
	return &Client{name: name, http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
		MaxIdleConnsPerHost: 32, IdleConnTimeout: time.Minute, DisableCompression: true, WriteBufferSize: 256 << 10, ReadBufferSize: 256 << 10,
	}}}
}

// Close closes connections that are idle.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// lost is a failure between here and agentd: asking again may help.
type lost struct{ err error }

// Error implements error.
func (l lost) Error() string { return l.err.Error() }

// Unwrap returns the cause.
func (l lost) Unwrap() error { return l.err }

// ask does a request until agentd answers it.
func (c *Client) ask(ctx context.Context, op string, q url.Values, body func() (io.Reader, int64), take func(*http.Response) error) error {
	pause := firstPause
	for {
		err := c.once(ctx, op, q, body, take)
		var gone lost
		if err == nil || !errors.As(err, &gone) {
			return err
		}
		if ctx.Err() != nil || !sleep(ctx, pause) {
			if cause := context.Cause(ctx); errors.Is(cause, context.Canceled) {
				return cause
			}
			return proto.Errorf(proto.CodeUnavailable, "bucket %s: agentd does not answer: is it running? (%v)", c.name, gone.err)
		}
		pause = min(2*pause, lastPause)
	}
}

func (c *Client) once(ctx context.Context, op string, q url.Values, body func() (io.Reader, int64), take func(*http.Response) error) error {
	var in io.Reader
	var size int64
	if body != nil {
		in, size = body()
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://agentd"+Path+c.name+"/"+op+"?"+q.Encode(), in)
	if err != nil {
		return err
	}
	if body != nil {
		req.ContentLength = size
		if size == 0 {
			req.Body = http.NoBody
		}
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return lost{err}
	}
	defer resp.Body.Close() //nolint:errcheck // it was read
	if resp.StatusCode != http.StatusOK {
		err := proto.ReadHTTPError(resp)
		if resp.Header.Get(changedHeader) != "" {
			return fmt.Errorf("%w: %w", errChanged, err)
		}
		return err
	}
	return take(resp)
}

func into(out any) func(*http.Response) error {
	return func(resp *http.Response) error {
		text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
		if err != nil {
			return lost{err}
		}
		return json.Unmarshal(text, out)
	}
}

// Head implements Remote.
func (c *Client) Head(ctx context.Context, key string) (o Object, err error) {
	err = c.ask(ctx, "head", url.Values{"key": {key}}, nil, into(&o))
	return o, err
}

// List implements Remote.
func (c *Client) List(ctx context.Context, directory, token string, limit int) (p Page, err error) {
	err = c.ask(ctx, "list", url.Values{"directory": {directory}, "token": {token}, "limit": {strconv.Itoa(limit)}}, nil, into(&p))
	return p, err
}

// Read implements Remote.
func (c *Client) Read(ctx context.Context, key, etag string, off, n int64, w io.Writer) error {
	for n > 0 {
		var got int64
		err := c.ask(ctx, "read", url.Values{"key": {key}, "etag": {etag}, "off": {strconv.FormatInt(off, 10)}, "n": {strconv.FormatInt(n, 10)}}, nil,
			func(resp *http.Response) error {
				to := &taker{Writer: w}
				done, err := exactly(to, resp.Body, n)
				off, n, got = off+done, n-done, done
				if to.err != nil {
					return to.err
				}
				if err != nil && done == 0 {
					return lost{err}
				}
				return nil // what is missing is asked for anew
			})
		if err != nil {
			return err
		}
		if got == 0 {
			return lost{io.ErrUnexpectedEOF}
		}
	}
	return nil
}

// Write implements Remote.
func (c *Client) Write(ctx context.Context, key string, r io.ReaderAt, size int64) (o Object, err error) {
	body := func() (io.Reader, int64) { return io.NewSectionReader(r, 0, size), size }
	err = c.ask(ctx, "write", url.Values{"key": {key}}, body, into(&o))
	return o, err
}

// Copy implements Remote.
func (c *Client) Copy(ctx context.Context, dst, src string) (o Object, err error) {
	err = c.ask(ctx, "copy", url.Values{"key": {dst}, "from": {src}}, nil, into(&o))
	return o, err
}

// Delete implements Remote.
func (c *Client) Delete(ctx context.Context, key string) error {
	return c.ask(ctx, "delete", url.Values{"key": {key}}, nil, func(*http.Response) error { return nil })
}
