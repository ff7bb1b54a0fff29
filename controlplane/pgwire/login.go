package pgwire

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/wirestream"
)

// login is a connection on its way to a session.
type login struct {
	server   *Server
	raw      net.Conn
	conn     net.Conn // raw, or TLS above it
	host     string   // the peer's address
	loopback bool
	secure   bool
	out      *gather // below TLS; nil without
	// admitted is called when it is no stranger any more, and at its end.
	admitted func()
}

// alpn is the protocol's name in TLS.
const alpn = "postgresql"

// tlsHandshake is the first byte of a TLS client's.
const tlsHandshake = 0x16

// farewell is how long a client may take to take the last message.
const farewell = time.Second

func (l *login) run() {
	defer l.admitted()
	defer l.server.forget(l.raw)
	l.raw.SetDeadline(time.Now().Add(l.server.limits.Handshake)) //nolint:errcheck // a connection that can't has ended
	session, err := l.session()
	if err != nil {
		l.refuse(err)
		return
	}
	if session != nil {
		session.run()
	}
	l.raw.Close() //nolint:errcheck // it is done with
}

// refuse tells the client why there is no session, if it is one.
func (l *login) refuse(err error) {
	defer l.raw.Close() //nolint:errcheck // it is given up
	var f *fatal
	reason := reasonHungUp
	var netErr net.Error
	var quiet *silent
	switch {
	case errors.As(err, &quiet):
		reason = quiet.reason
	case errors.As(err, &f):
		reason = f.reason
		l.conn.SetWriteDeadline(time.Now().Add(farewell)) //nolint:errcheck // see run
		l.conn.Write(f.encode())                          //nolint:errcheck // it may have gone
		if l.secure {
			l.conn.Close() //nolint:errcheck // says goodbye in TLS
		}
	case errors.Is(err, errNoise):
		reason = reasonNoise
	case errors.As(err, &netErr) && netErr.Timeout():
		reason = reasonSlow
	}
	l.server.cfg.Metrics.refused(reason)
	l.server.log.Debug("no session for a PostgreSQL client", "remote", l.host, "reason", reason, "err", err)
}

// session does all that comes before a session. It returns nil, nil for a
// connection that wanted none.
func (l *login) session() (*session, error) {
	asked, err := l.greet()
	if asked == nil || err != nil {
		return nil, err
	}
	caller, err := l.authenticate(asked)
	if err != nil {
		return nil, err
	}
	l.admitted()
	if err := l.server.reserve(caller.Principal); err != nil {
		return nil, err
	}
	one, err := l.open(asked, caller)
	if err != nil {
		l.server.release(caller.Principal)
	}
	return one, err
}

// greet negotiates TLS and reads the startup message; nil, nil after a cancel
// request.
func (l *login) greet() (*startup, error) {
	var first [1]byte
	if _, err := io.ReadFull(l.raw, first[:]); err != nil {
		return nil, err
	}
	in := &prefixed{Conn: l.raw, early: first[:]}
	l.conn = in
	if first[0] == tlsHandshake {
		if err := l.encrypt(in, true); err != nil {
			return nil, err
		}
	}
	gss := false
	for {
		code, rest, err := readStartup(l.conn)
		if err != nil {
			return nil, err
		}
		switch {
		case code == codeCancel:
			l.server.cancelRequest(rest, l.host)
			return nil, nil
		case code == codeTLS && len(rest) == 0 && !l.secure && l.server.cfg.TLS != nil:
			if _, err := l.raw.Write([]byte{'S'}); err != nil {
				return nil, err
			}
			if err := l.encrypt(l.raw, false); err != nil {
				return nil, err
			}
		case code == codeTLS && len(rest) == 0 && !l.secure, code == codeGSS && len(rest) == 0 && !gss:
			gss = gss || code == codeGSS
			if _, err := l.conn.Write([]byte{'N'}); err != nil {
				return nil, err
			}
			// Once a client has been told that there is no TLS, it asks no more.
			if code == codeTLS && gss {
				continue
			}
		case code == codeTLS || code == codeGSS:
			return nil, fatalf(reasonProtocol, stateProtocolViolation, "unexpected request to encrypt the connection")
		case !l.secure && !l.loopback:
			f := fatalf(reasonTLS, stateInvalidAuth, "no encryption: API tokens and data go through TLS only")
			if l.server.cfg.TLS == nil {
				return nil, f.with("this control plane has no certificate: connect from its own machine, or start it with --tls-cert and --tls-key")
			}
			return nil, f.with("connect with sslmode=verify-full, or at least sslmode=require")
		default:
			return parseStartup(code, rest)
		}
	}
}

// encrypt puts TLS above a connection. direct is without being asked, which
// takes the protocol's name in ALPN.
func (l *login) encrypt(below net.Conn, direct bool) error {
	if l.server.cfg.TLS == nil {
		return fmt.Errorf("%w: TLS without a certificate", errNoise)
	}
	l.out = &gather{Conn: below}
	secure := tls.Server(l.out, l.server.cfg.TLS)
	ctx, cancel := context.WithTimeout(l.server.ctx, l.server.limits.Handshake)
	defer cancel()
	if err := secure.HandshakeContext(ctx); err != nil {
		l.server.log.Debug("TLS handshake of a PostgreSQL client failed", "remote", l.host, "err", err)
		return &silent{fatalf(reasonTLS, stateProtocolViolation, "TLS handshake failed")}
	}
	l.conn, l.secure = secure, true
	if direct && secure.ConnectionState().NegotiatedProtocol != alpn {
		return fatalf(reasonTLS, stateProtocolViolation, "received direct SSL connection request without ALPN protocol negotiation extension")
	}
	return nil
}

// silent is a failure that the client can't be told of.
type silent struct{ *fatal }

// authenticate asks for the password and finds whose token it is.
func (l *login) authenticate(asked *startup) (Caller, error) {
	var b []byte
	if asked.downgraded {
		b = asked.negotiation(b)
	}
	b = message(b, 'R', 0, 0, 0, 3) // AuthenticationCleartextPassword
	if _, err := l.conn.Write(b); err != nil {
		return Caller{}, err
	}
	password, err := readPassword(l.conn)
	if err != nil {
		return Caller{}, err
	}
	ctx, cancel := context.WithTimeout(l.server.ctx, l.server.limits.Handshake)
	defer cancel()
	caller, err := l.server.cfg.Tokens.AuthenticateAs(ctx, asked.user, password, l.host)
	if proto.CodeOf(err) == proto.CodeUnauthenticated {
		f := fatalf(reasonPassword, stateInvalidPassword, "password authentication failed for user %q", clip(asked.user))
		f.detail = proto.Detail(err).Message
		return Caller{}, f.with("the password is an API token, and the user the token's name")
	}
	if err != nil {
		return Caller{}, explain(reasonPassword, err)
	}
	if !l.server.cfg.Requests.Allow(caller.TokenId) {
		return Caller{}, fatalf(reasonLimit, stateConfigurationLimit, "token %s connects too often: slow down", caller.TokenName)
	}
	if err := l.server.cfg.Permit(caller.Principal); err != nil {
		return Caller{}, explain(reasonRole, err)
	}
	return caller, nil
}

// clip bounds what a client said in a message to it.
func clip(text string) string {
	if len(text) > 128 {
		return strings.ToValidUTF8(text[:128], "") + "…"
	}
	return text
}

// open finds the agent and has the host open the session.
func (l *login) open(asked *startup, caller Caller) (*session, error) {
	name, source, ok := strings.Cut(asked.database, "/")
	if !ok || name == "" || source == "" {
		return nil, fatalf(reasonSource, stateInvalidCatalog, "database %q does not exist", clip(asked.database)).
			with("name a data source: dbname=AGENT/SOURCE; see `postern source list`")
	}
	l.raw.SetDeadline(time.Time{}) //nolint:errcheck // see run
	ctx, cancel := context.WithTimeout(l.server.ctx, l.server.limits.Opening)
	defer cancel()
	found, err := l.server.cfg.Find(ctx, caller.Organization, name)
	if proto.CodeOf(err) == proto.CodeNotFound {
		return nil, fatalf(reasonSource, stateInvalidCatalog, "database %q does not exist: there is no agent %q", clip(asked.database), clip(name)).
			with("name a data source: dbname=AGENT/SOURCE; see `postern source list`")
	}
	if err != nil {
		return nil, explain(reasonUnavailable, err)
	}
	agent, err := l.server.cfg.Connect(found.Id)
	if proto.CodeOf(err) == proto.CodeAgentOffline {
		return nil, fatalf(reasonAgent, stateCannotConnectNow, "agent %s is offline: it has no tunnel at present", found.Name).with("see `agentd status` on its host")
	}
	if err != nil {
		return nil, explain(reasonUnavailable, err)
	}
	one := &session{server: l.server, raw: l.raw, conn: l.conn, out: l.out, agent: agent, expires: caller.Expires, done: make(chan struct{})}
	one.info = Session{
		ID: newSessionID(), Principal: caller.Principal, AgentID: found.Id, Agent: found.Name, Source: source,
		Remote: l.host, Application: asked.setting("application_name"), Cancel: one.cancel,
	}
	if one.entries, err = l.server.cfg.Journal.Open(ctx, one.info); err != nil {
		return nil, explain(reasonUnavailable, err)
	}
	err = l.connect(ctx, one, asked)
	if err != nil {
		one.entries.Close(err)
		return nil, err
	}
	return one, nil
}

// connect has the host open the session and tells the client that it has one.
func (l *login) connect(ctx context.Context, one *session, asked *startup) error {
	stream, err := wirestream.Dial(ctx, one.agent, &posternv1.WireRequest{
		SessionId: one.info.ID, Source: one.info.Source, Principal: one.info.Principal, Settings: asked.settings, Remote: l.host,
	})
	if err != nil {
		return explain(reasonHost, l.lost(ctx, one, err))
	}
	one.stream, one.w, one.r = stream, wirestream.NewWriter(stream), wirestream.NewReader(stream)
	patience := context.AfterFunc(ctx, func() { stream.Close() }) //nolint:errcheck // the reader learns of it
	opened, err := one.opened()
	if err == nil && !patience() {
		err = ctx.Err()
	}
	if err != nil {
		patience()
		stream.Close() //nolint:errcheck // it is given up
		return explain(reasonHost, l.lost(ctx, one, err))
	}
	one.begin(asked.minor)
	b := message(nil, 'R', 0, 0, 0, 0) // AuthenticationOk
	for _, p := range opened.Parameters {
		b = parameter(b, p.Name, p.Value)
	}
	b = one.key.backendKeyData(b)
	b = message(b, 'Z', 'I')
	l.conn.SetWriteDeadline(time.Now().Add(l.server.limits.Handshake)) //nolint:errcheck // see run
	_, err = l.conn.Write(b)
	l.conn.SetWriteDeadline(time.Time{}) //nolint:errcheck // likewise
	if err == nil && !l.server.add(one) {
		err = errStopping
	}
	if err != nil {
		l.server.keys.remove(one.key)
		stream.Close() //nolint:errcheck // likewise
	}
	return err
}

// lost makes an error of what broke while the host was to open the session.
func (l *login) lost(ctx context.Context, one *session, err error) error {
	if proto.CodeOf(err) != proto.CodeInternal && ctx.Err() == nil {
		return err
	}
	if l.server.ctx.Err() != nil {
		return errStopping
	}
	if ctx.Err() != nil {
		return proto.Errorf(proto.CodeTimeout, "agent %s did not open a session within %s: is the database reachable from its host?", one.info.Agent, l.server.limits.Opening)
	}
	if lost := one.agent.Err(); lost != nil {
		return lost
	}
	var refused *proto.Error
	if errors.As(err, &refused) {
		return refused
	}
	return &proto.Error{Code: proto.CodeAgentLost, Message: fmt.Sprintf("agent %s went away while it opened the session", one.info.Agent), Err: err}
}

// prefixed is a connection of which something was read already.
type prefixed struct {
	net.Conn
	early []byte
}

// Read implements net.Conn.
func (p *prefixed) Read(b []byte) (int, error) {
	if len(p.early) > 0 {
		n := copy(b, p.early)
		p.early = p.early[n:]
		return n, nil
	}
	return p.Conn.Read(b)
}
