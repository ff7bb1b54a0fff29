package tunnel

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"

	"github.com/coder/websocket"
)

// maxHTTPHeader bounds the header of a proxy's or server's answer.
const maxHTTPHeader = 64 << 10

// verifyOuter verifies a chain against the system's roots, then against extra.
// (Two x509.CertPools cannot be merged.)
func verifyOuter(extra *x509.CertPool, name string) func(tls.ConnectionState) error {
	return func(cs tls.ConnectionState) error {
		opts := x509.VerifyOptions{DNSName: name, Intermediates: x509.NewCertPool()}
		for _, c := range cs.PeerCertificates[1:] {
			opts.Intermediates.AddCert(c)
		}
		_, err := cs.PeerCertificates[0].Verify(opts)
		if err != nil && extra != nil {
			opts.Roots = extra
			if _, err2 := cs.PeerCertificates[0].Verify(opts); err2 == nil {
				return nil
			}
		}
		if err != nil {
			return &tls.CertificateVerificationError{UnverifiedCertificates: cs.PeerCertificates, Err: err}
		}
		return nil
	}
}

// outerTLS runs the outer TLS handshake for a server or an https proxy.
func (o *outer) outerTLS(ctx context.Context, conn net.Conn, name string) (*tls.Conn, error) {
	cfg := o.tls.Clone()
	cfg.ServerName = name
	if o.roots != nil {
		cfg.InsecureSkipVerify = true //nolint:gosec // verified by VerifyConnection, against two pools
		cfg.VerifyConnection = verifyOuter(o.roots, name)
	}
	tc := tls.Client(conn, cfg)
	return tc, tc.HandshakeContext(ctx)
}

// connect makes the connection beneath the WebSocket: TCP, through a proxy if one
// is to be used, and the outer TLS for wss.
func (o *outer) connect(a *attempt) (net.Conn, *DialError) {
	target := o.address()
	proxy, err := o.chosenProxy()
	if err != nil {
		return nil, proxyError(target)
	}
	var conn net.Conn
	if proxy == nil {
		a.begins(StepTCP, target)
		conn, err = o.tcp(a, target)
		if err != nil {
			return nil, tcpError(a.err(err), target, "")
		}
	} else {
		var derr *DialError
		if conn, derr = o.throughProxy(a, proxy, target); derr != nil {
			return nil, derr
		}
	}
	a.step(conn)
	if o.url.Scheme != "wss" {
		return conn, nil
	}
	a.begins(StepOuterTLS, target)
	tc, err := o.outerTLS(a.ctx, conn, o.url.Hostname())
	if err != nil {
		return nil, &DialError{Step: StepOuterTLS, Target: target, Err: err, Hint: outerHint(err)}
	}
	return tc, nil
}

func (o *outer) tcp(a *attempt, address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(a.ctx, o.stepTimeout)
	defer cancel()
	var nd net.Dialer
	conn, err := nd.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	a.step(conn)
	return conn, nil
}

// proxyError says that the proxy's URL is malformed. url.Parse's error would hold it
// with its password.
func proxyError(target string) *DialError {
	return &DialError{Step: StepProxy, Target: target, Err: errors.New("the proxy's URL cannot be parsed"), Hint: "check HTTPS_PROXY and HTTP_PROXY"}
}

func tcpError(err error, target, via string) *DialError {
	e := &DialError{Step: StepTCP, Target: target, Err: err, Hint: "check that the host and port are right and that the firewall lets this host out; where only a proxy may, set HTTPS_PROXY"}
	var dns *net.DNSError
	if errors.As(err, &dns) {
		e.Step = StepDNS
		e.Hint = "check the host name and this host's resolver"
	}
	if via != "" {
		e.Hint = "check the proxy's address in " + via
	}
	return e
}

func outerHint(err error) string {
	var (
		unknown x509.UnknownAuthorityError
		host    x509.HostnameError
		invalid x509.CertificateInvalidError
		record  tls.RecordHeaderError
	)
	switch {
	case errors.As(err, &unknown):
		return "an inspecting proxy may have replaced the certificate: give its CA in ca_file"
	case errors.As(err, &host):
		return "the certificate is for another name: check url"
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return "the certificate is expired or not yet valid: check this host's clock"
	case errors.As(err, &record):
		return "the server does not speak TLS on this port: check url"
	}
	return ""
}

// throughProxy connects to target by CONNECT. The proxy's credentials never
// appear in an error.
func (o *outer) throughProxy(a *attempt, proxy *url.URL, target string) (net.Conn, *DialError) {
	port := proxy.Port()
	if port == "" {
		port = "80"
		if proxy.Scheme == "https" {
			port = "443"
		}
	}
	address := net.JoinHostPort(proxy.Hostname(), port)
	if proxy.Scheme != "http" && proxy.Scheme != "https" {
		return nil, &DialError{Step: StepProxy, Target: address, Err: fmt.Errorf("proxies of type %q are not supported", proxy.Scheme), Hint: "use an http or https proxy that allows CONNECT"}
	}
	a.begins(StepProxy, address)
	conn, err := o.tcp(a, address)
	if err != nil {
		e := tcpError(a.err(err), address, "HTTPS_PROXY")
		e.Step = StepProxy
		return nil, e
	}
	if proxy.Scheme == "https" {
		tc, err := o.outerTLS(a.ctx, conn, proxy.Hostname())
		if err != nil {
			return nil, &DialError{Step: StepProxy, Target: address, Err: err, Hint: outerHint(err)}
		}
		conn = tc
	}
	req := &http.Request{
		Method: http.MethodConnect,
		URL:    &url.URL{Opaque: target},
		Host:   target,
		Header: http.Header{"User-Agent": {userAgent}},
	}
	if u := proxy.User; u != nil {
		password, _ := u.Password()
		req.Header.Set("Proxy-Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(u.Username()+":"+password)))
	}
	if err := req.Write(conn); err != nil {
		return nil, &DialError{Step: StepProxy, Target: address, Err: err}
	}
	// Byte by byte up to the end of the header, so that nothing of the tunnel is
	// taken; it is a few hundred bytes, once.
	resp, err := http.ReadResponse(bufio.NewReaderSize(&headerReader{r: conn, left: maxHTTPHeader}, 16), req)
	if err != nil {
		return nil, &DialError{Step: StepProxy, Target: address, Err: fmt.Errorf("answer to CONNECT: %w", err), Hint: "check that this is an HTTP proxy"}
	}
	if resp.StatusCode/100 == 2 {
		return conn, nil
	}
	hint := "ask the proxy's operator to allow CONNECT to " + target
	switch resp.StatusCode {
	case http.StatusProxyAuthRequired, http.StatusUnauthorized: // tinyproxy says 401 to a wrong password, and means 407
		hint = "the proxy wants other credentials (407): set user and password in HTTPS_PROXY"
		if proxy.User == nil {
			hint = "the proxy wants credentials: set user and password in HTTPS_PROXY"
		}
		if m := resp.Header.Get("Proxy-Authenticate"); m != "" && !strings.HasPrefix(strings.ToLower(m), "basic") {
			hint += " (it asks for " + oneLine(strings.Fields(m)[0], 20) + "; only Basic is supported)"
		}
	case http.StatusForbidden, http.StatusMethodNotAllowed:
		hint = "the proxy refuses CONNECT to " + target + ": ask its operator to allow it"
	case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		hint = "the proxy cannot reach " + target
	}
	return nil, &DialError{Step: StepProxy, Target: address, Status: resp.StatusCode, Err: fmt.Errorf("CONNECT answered %d %s", resp.StatusCode, http.StatusText(resp.StatusCode)), Hint: hint}
}

// headerReader gives one byte at a time.
type headerReader struct {
	r    io.Reader
	left int
}

func (h *headerReader) Read(p []byte) (int, error) {
	if h.left--; h.left < 0 {
		return 0, errors.New("header too large")
	}
	return h.r.Read(p[:min(len(p), 1)])
}

const userAgent = "postern-tunnel/1"

// upgrade turns the wire into a WebSocket.
func (o *outer) upgrade(ctx context.Context, w *wire, id [idSize]byte, class Class) (*websocket.Conn, *DialError) {
	header := o.header.Clone()
	if header == nil {
		header = http.Header{}
	}
	if header.Get("User-Agent") == "" {
		header.Set("User-Agent", userAgent)
	}
	if class != Control {
		header.Set(tunnelHeader, formatID(id))
	}
	ws, resp, err := websocket.Dial(ctx, o.target(), &websocket.DialOptions{
		HTTPClient: &http.Client{
			Transport:     upgrader{w},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		HTTPHeader:      header,
		CompressionMode: websocket.CompressionDisabled,
		OnPingReceived:  ignorePing,
	})
	if err == nil {
		return ws, nil
	}
	e := &DialError{Step: StepUpgrade, Target: o.target(), Err: err}
	if resp == nil {
		e.Err = unwrapURL(err)
		e.Hint = "check that url is the control plane's and that proxies on the way let WebSockets through"
		return nil, e
	}
	e.Status = resp.StatusCode
	text := ""
	if resp.Body != nil {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, 200))
		text = oneLine(strings.TrimSpace(string(b)), 120)
	}
	e.Err = fmt.Errorf("answered %d %s", resp.StatusCode, http.StatusText(resp.StatusCode))
	if text != "" && strings.HasPrefix(resp.Header.Get("Content-Type"), "text/plain") {
		e.Err = fmt.Errorf("%w (%s)", e.Err, text)
	}
	switch c := resp.StatusCode; {
	case c == http.StatusNotFound:
		e.Hint = "there is no tunnel endpoint here: check url"
	case c == http.StatusServiceUnavailable, c == http.StatusTooManyRequests:
		e.Hint = "the control plane is busy or draining: it will be tried again"
	case c/100 == 3:
		e.Hint = "it points to " + oneLine(resp.Header.Get("Location"), 200) + ": set url to that"
	case c == http.StatusSwitchingProtocols:
		e.Err, e.Hint = err, "something on the way does not pass WebSockets on unchanged"
	case c == http.StatusUpgradeRequired, c == http.StatusBadRequest, c == http.StatusOK:
		e.Hint = "something on the way removes the WebSocket upgrade: a load balancer must pass Connection and Upgrade on"
	case c/100 == 5:
		e.Hint = "the load balancer does not reach the control plane"
	}
	return nil, e
}

// unwrapURL drops what net/http puts around an error.
func unwrapURL(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

// upgrader is the http.RoundTripper of one upgrade on a connection that exists.
type upgrader struct{ w *wire }

func (u upgrader) RoundTrip(req *http.Request) (*http.Response, error) {
	u.w.cork()
	err := req.Write(u.w)
	if uerr := u.w.uncork(); err == nil {
		err = uerr
	}
	if err != nil {
		return nil, err
	}
	br := bufio.NewReaderSize(io.LimitReader(u.w, maxHTTPHeader), 4096)
	resp, err := http.ReadResponse(br, req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		return resp, nil
	}
	early := make([]byte, br.Buffered())
	_, _ = io.ReadFull(br, early)
	u.w.startFrames(early)
	resp.Body = u.w
	return resp, nil
}
