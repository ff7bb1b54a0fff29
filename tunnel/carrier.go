package tunnel

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"time"
)

// Carrier makes the connections beneath the inner TLS of one tunnel's lanes
// somewhere else: name resolution, proxy, TCP, outer TLS, HTTP upgrade and WebSocket
// are its work, all that stays here is a stream of bytes in which the inner TLS is
// spoken. A Carrier is not trusted: it can cut and delay, as the network can.
type Carrier interface {
	// Open returns a new connection whose other end a CarrierServer serves. ctx
	// bounds the call. It may be called by several goroutines at once.
	Open(ctx context.Context) (net.Conn, error)

	// Close ends the Carrier and its connections, and does not wait. What was
	// written to the connections before is still sent, in bounded time; with lost
	// it is not: the Carrier may be what hangs, and must be gone, or as good as
	// gone, when Close returns. It may be called again, with lost as well.
	Close(lost bool)
}

// CarrierConfig is what a CarrierServer is to know. It is meant to be sent as JSON,
// and not to be kept: Proxy may hold a password.
type CarrierConfig struct {
	URL         string        `json:"url"`             // of the acceptor, ws or wss
	Proxy       string        `json:"proxy,omitempty"` // URL; "" for none
	OuterCAs    [][]byte      `json:"outer_cas,omitempty"`
	Header      http.Header   `json:"header,omitempty"`
	StepTimeout time.Duration `json:"step_timeout"` // nanoseconds
	SoloQuiet   time.Duration `json:"solo_quiet"`
}

// On a connection of a Carrier, the tunnel speaks first:
//
//	u32 length of the request (at most maxCarrierRequest), carrierRequest as JSON
//
// and the CarrierServer answers with any number of
//
//	u8 carrierStep, u16 length, carrierStepInfo as JSON      a step of the dial begins
//
// and one
//
//	u8 carrierResult, u16 length, carrierAnswer as JSON
//
// After an answer without an error what follows is the lane's bytes, both ways.
// After one with an error the connection ends.
const (
	carrierStep   = 1
	carrierResult = 2

	maxCarrierRequest = 1 << 10
	maxCarrierText    = 600 // of any text in an answer
)

type carrierRequest struct {
	Class  Class  `json:"class"`
	Tunnel string `json:"tunnel"` // 32 hex digits
}

type carrierStepInfo struct {
	Step   Step   `json:"step"`
	Target string `json:"target"`
}

type carrierAnswer struct {
	Error  *carrierError `json:"error,omitempty"`
	Local  string        `json:"local,omitempty"`
	Remote string        `json:"remote,omitempty"`
	RTT    time.Duration `json:"rtt,omitempty"`
}

// carrierLimit is how long a tunnel waits for its Carrier to say of a step that its
// limit has passed: half as long again, so that a busy host is no error.
func carrierLimit(step time.Duration) time.Duration { return step + step/2 }

// startCarrier starts the dialer's Carrier, if it shall have one.
func (d *dialer) startCarrier() error {
	if d.cfg.Carrier == nil {
		return nil
	}
	proxy, err := d.chosenProxy()
	if err != nil {
		return proxyError(d.address())
	}
	c := CarrierConfig{URL: d.url.String(), Header: d.header, StepTimeout: d.stepTimeout, SoloQuiet: d.cfg.SoloQuiet}
	if proxy != nil {
		c.Proxy = proxy.String()
	}
	if d.carrier, err = d.cfg.Carrier(c); err != nil {
		return &DialError{Step: StepUplink, Target: d.target(), Err: err}
	}
	return nil
}

func (d *dialer) endCarrier(lost bool) {
	if d.carrier != nil {
		d.carrier.Close(lost)
	}
}

// carried has the Carrier make the connection for one lane.
func (d *dialer) carried(a *attempt, class Class, id [idSize]byte) (*wsConn, time.Duration, *DialError) {
	fail := func(err error) (*wsConn, time.Duration, *DialError) {
		e := &DialError{Step: StepUplink, Target: d.target(), Err: err, Hint: "agentd's own process for connections did not do its work: it is started anew"}
		if a.at != "" && a.ctx.Err() != nil && !a.isLate() { // the time for all of the dial is over
			e.Step, e.Target, e.Hint = a.at, a.where, ""
		}
		return nil, 0, e
	}
	limit := a.limit
	a.setLimit(carrierLimit(limit))
	conn, err := d.carrier.Open(a.ctx)
	if err != nil {
		return fail(err)
	}
	a.step(conn)
	request, err := json.Marshal(carrierRequest{Class: class, Tunnel: formatID(id)})
	if err != nil {
		return fail(err)
	}
	if _, err := conn.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(request))), request...)); err != nil {
		return fail(err)
	}
	for {
		kind, body, err := readCarried(conn)
		if err != nil {
			return fail(err)
		}
		switch kind {
		case carrierStep:
			var info carrierStepInfo
			if err := json.Unmarshal(body, &info); err != nil || !carriedStep(info.Step) {
				return fail(errCarrier)
			}
			a.at, a.where = info.Step, oneLine(info.Target, maxCarrierText)
			a.step(conn)
		case carrierResult:
			var answer carrierAnswer
			if err := json.Unmarshal(body, &answer); err != nil {
				return fail(errCarrier)
			}
			if answer.Error != nil {
				e := answer.Error.decode()
				if e == nil {
					return fail(errCarrier)
				}
				return nil, 0, e
			}
			if d.cfg.TestHookConn != nil {
				conn = d.cfg.TestHookConn(class, conn)
			}
			w := newWire(conn)
			w.local, w.remote = address(answer.Local), address(answer.Remote)
			a.setLimit(limit)
			return &wsConn{wire: w}, max(answer.RTT, time.Microsecond), nil
		default:
			return fail(errCarrier)
		}
	}
}

var errCarrier = errors.New("it does not speak as agreed")

func readCarried(r io.Reader) (kind byte, body []byte, err error) {
	var head [3]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, carriedEnd(err)
	}
	body = make([]byte, binary.BigEndian.Uint16(head[1:]))
	if _, err := io.ReadFull(r, body); err != nil {
		return 0, nil, carriedEnd(err)
	}
	return head[0], body, nil
}

func carriedEnd(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: it ended", ErrLost)
	}
	return err
}

// tcpAddress is an address of TCP as text, where it is not known as more.
type tcpAddress string

func (tcpAddress) Network() string  { return "tcp" }
func (a tcpAddress) String() string { return string(a) }

// address is what a Carrier says of an address: it is shown, and believed by nobody.
func address(text string) net.Addr {
	if a, err := netip.ParseAddrPort(text); err == nil {
		return net.TCPAddrFromAddrPort(a)
	}
	return tcpAddress(oneLine(text, 64))
}
