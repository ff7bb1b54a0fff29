package peer

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/postern-dev/postern/proto"
)

const (
	// dialTime bounds connecting to a peer, handshake excluded; handshakeTime that.
	dialTime      = 2 * time.Second
	handshakeTime = 3 * time.Second
	// openTime bounds opening a stream, the peer's own way to the agent included.
	openTime = 20 * time.Second
	// quietTime is how long a connection with streams may say nothing before it is
	// asked, pingTime how long the answer may take: a peer that vanished without a word
	// is noticed in their sum.
	quietTime = 2 * time.Second
	pingTime  = 3 * time.Second
	// idleTime is how long a connection without streams is kept.
	idleTime = 90 * time.Second
	// streamWindow is what a stream may hold here, in bytes, and connWindow all streams
	// of a connection together: a stream that nobody reads stops no other one.
	streamWindow = 256 << 10
	maxStreams   = 1000 // of a connection; more open another one
	connWindow   = streamWindow * maxStreams
	// lingerTime is how long what was written before Close may take to arrive.
	lingerTime = 5 * time.Second
	// maxAnswer bounds the answer to a call, in bytes; MaxCall a call.
	maxAnswer = 1 << 20
	// MaxCall bounds the body of a call, in bytes.
	MaxCall = 2 << 20
)

// remoteHeader says who the client of a lane is, to the peer.
const remoteHeader = "Postern-Remote"

// Client reaches peers.
type Client struct {
	transport *http.Transport
	metrics   *Metrics
}

// NewClient returns a client. Close ends its idle connections; streams end by
// themselves. metrics may be nil.
func NewClient(config *tls.Config, metrics *Metrics) *Client {
	protocols := new(http.Protocols)
	protocols.SetHTTP2(true)
	return &Client{metrics: metrics, transport: &http.Transport{
		DialContext:         (&net.Dialer{Timeout: dialTime, KeepAlive: 15 * time.Second}).DialContext,
		TLSClientConfig:     config.Clone(),
		TLSHandshakeTimeout: handshakeTime,
		Protocols:           protocols,
		DisableCompression:  true,
		IdleConnTimeout:     idleTime,
		HTTP2: &http.HTTP2Config{
			MaxReceiveBufferPerStream: streamWindow, MaxReceiveBufferPerConnection: connWindow,
			SendPingTimeout: quietTime, PingTimeout: pingTime, MaxConcurrentStreams: maxStreams,
		},
	}}
}

// Close ends the connections without streams.
func (c *Client) Close() { c.transport.CloseIdleConnections() }

// Stream opens a stream on the tunnel of an agent that the peer at base has, if it is of
// this generation. ctx bounds the opening. AGENT_OFFLINE means that the peer has no such tunnel;
// nothing has reached the agent then. UNAVAILABLE: the peer does not answer.
func (c *Client) Stream(ctx context.Context, base, agent string, generation int64, class string) (net.Conn, error) {
	values := url.Values{"agent": {agent}, "generation": {strconv.FormatInt(generation, 10)}, "class": {class}}
	conn, err := c.open(ctx, base, "/peer/v1/stream?"+values.Encode(), nil)
	c.metrics.forwarded(streams, err)
	return conn, err
}

// Lane opens a connection whose far end the peer at base serves as if a client had
// connected from remote.
func (c *Client) Lane(ctx context.Context, base, remote string) (net.Conn, error) {
	conn, err := c.open(ctx, base, "/peer/v1/lane", http.Header{remoteHeader: {remote}})
	c.metrics.forwarded(lanes, err)
	return conn, err
}

func (c *Client) open(ctx context.Context, base, path string, header http.Header) (net.Conn, error) {
	lifetime, cancel := context.WithCancel(context.WithoutCancel(ctx))
	opening, done := context.WithTimeout(ctx, openTime)
	defer done()
	stop := context.AfterFunc(opening, cancel)
	defer stop()
	reader, writer := io.Pipe()
	resp, err := c.do(lifetime, base, path, header, reader)
	if err != nil {
		cancel()
		_ = reader.CloseWithError(err)
		if cause := context.Cause(ctx); cause != nil {
			return nil, cause
		}
		return nil, err
	}
	if !stop() { // it was too late after all
		cancel()
		_ = resp.Body.Close()
		return nil, context.Cause(opening)
	}
	return &conn{body: resp.Body, writer: writer, cancel: cancel, peer: address(base)}, nil
}

func (c *Client) do(ctx context.Context, base, path string, header http.Header, body io.Reader) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, strings.TrimSuffix(base, "/")+path, body)
	if err != nil {
		return nil, err
	}
	for name, values := range header {
		req.Header[name] = values
	}
	resp, err := c.transport.RoundTrip(req)
	if err != nil {
		return nil, &proto.Error{Code: proto.CodeUnavailable, Message: "the control plane's replica at " + base + " does not answer: try again", Err: err}
	}
	if resp.StatusCode != http.StatusOK {
		defer func() { _ = resp.Body.Close() }()
		return nil, proto.ReadHTTPError(resp)
	}
	return resp, nil
}

// Call asks the peer at base a short question. Errors have the peer's code, or
// UNAVAILABLE if it does not answer.
func (c *Client) Call(ctx context.Context, base, name string, body []byte) ([]byte, error) {
	if len(body) > MaxCall {
		return nil, fmt.Errorf("call %s of a replica: %d bytes are too many", name, len(body))
	}
	resp, err := c.do(ctx, base, "/peer/v1/call/"+name, nil, bytes.NewReader(body))
	c.metrics.forwarded(calls, err)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return nil, fmt.Errorf("call %s of a replica: %w", name, err)
	}
	if len(answer) > maxAnswer {
		return nil, fmt.Errorf("call %s of a replica: its answer is too long", name)
	}
	return answer, nil
}

// errNoDeadlines is returned by the deadlines of a forwarded stream, which has none.
var errNoDeadlines = errors.New("a forwarded stream has no deadlines")

// conn is one HTTP/2 stream as a connection.
type conn struct {
	body   io.ReadCloser
	writer *io.PipeWriter
	cancel context.CancelFunc
	peer   address
	once   sync.Once
}

func (c *conn) Read(p []byte) (int, error)  { return c.body.Read(p) }
func (c *conn) Write(p []byte) (int, error) { return c.writer.Write(p) }

// Close ends both directions. What was written still reaches the peer.
func (c *conn) Close() error {
	c.once.Do(func() {
		_ = c.writer.Close()
		// The peer ends its half when it has read ours; what comes meanwhile nobody wants.
		timer := time.AfterFunc(lingerTime, c.cancel)
		go func() {
			_, _ = io.Copy(io.Discard, c.body)
			timer.Stop()
			c.cancel()
			_ = c.body.Close()
		}()
	})
	return nil
}

func (c *conn) LocalAddr() net.Addr              { return address("peer") }
func (c *conn) RemoteAddr() net.Addr             { return c.peer }
func (c *conn) SetDeadline(time.Time) error      { return errNoDeadlines }
func (c *conn) SetReadDeadline(time.Time) error  { return errNoDeadlines }
func (c *conn) SetWriteDeadline(time.Time) error { return errNoDeadlines }

// address is an address for people.
type address string

func (address) Network() string  { return "postern-peer" }
func (a address) String() string { return string(a) }
