package link

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/tunnel"
)

// dialTimeout bounds a dial with all its steps.
const dialTimeout = 45 * time.Second

// dial makes a tunnel and says hello on it. The next certificate, if there is
// one, is tried first and promoted by its first use; an expired one is traded
// for a new one on the way.
func (k *Keeper) dial(ctx context.Context) (*tunnel.Tunnel, *posternv1.HelloResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	for range 4 { // next, its rejoin, current, its rejoin
		config, notAfter, next := k.cfg.Identity.Credential()
		t, err := tunnel.Dial(ctx, tunnel.DialConfig{
			Config: k.cfg.Tunnel, URL: k.cfg.URL, TLS: config, Carrier: k.cfg.Carrier, Proxy: k.cfg.Proxy,
		})
		var welcome *posternv1.HelloResponse
		expired := time.Now().After(notAfter)
		switch {
		case err != nil:
			err = Classify(err)
		case expired:
			err = k.trade(ctx, t, true)
			t.Close(nil) //nolint:errcheck // it served its turn
			if err == nil {
				k.logger.Info("rejoined after the certificate had expired")
				continue
			}
		default:
			welcome, err = k.hello(ctx, t)
		}
		if err != nil {
			if t != nil {
				t.Close(nil) //nolint:errcheck // err says why
			}
			if next && refused(err) {
				k.logger.Warn("renewed certificate refused, going back to the one before", "err", err)
				if err := k.cfg.Identity.Discard(); err != nil {
					return nil, nil, err
				}
				continue
			}
			return nil, nil, err
		}
		if next {
			if err := k.cfg.Identity.Promote(); err != nil {
				// The tunnel is good; Open finds the pair after a restart.
				k.logger.Error("renewed identity not kept in its place", "err", err)
			} else {
				k.logger.Info("identity renewed")
				if k.cfg.Renewed != nil {
					k.cfg.Renewed()
				}
			}
		}
		if len(welcome.Authorities) > 0 {
			if err := k.cfg.Identity.SetAuthorities(welcome.Authorities); err != nil {
				k.logger.Error("authorities not kept", "err", err)
			}
		}
		if welcome.RenewIdentity {
			k.logger.Info("renewing the identity: the control plane's authority is being replaced")
			k.Renew()
		}
		if k.cfg.Welcome != nil {
			k.cfg.Welcome(welcome)
		}
		return t, welcome, nil
	}
	return nil, nil, errors.New("no certificate of this host works: register it again with a new key")
}

// hello is the first request on a tunnel.
func (k *Keeper) hello(ctx context.Context, t *tunnel.Tunnel) (*posternv1.HelloResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, k.cfg.HelloTimeout)
	defer cancel()
	request := k.cfg.Hello()
	request.Version = proto.Version()
	request.Features = proto.Features()
	request.HostTime = timestamppb.Now()
	response, err := client(t).Hello(ctx, connect.NewRequest(request))
	if err != nil {
		return nil, callError("hello", t, err)
	}
	if _, err := proto.Negotiate(response.Msg.Version); err != nil {
		return nil, err
	}
	return response.Msg, nil
}

// callError is the error of a call to the control plane: its own words if it
// said something, else why the tunnel ended, else the transport's.
func callError(what string, t *tunnel.Tunnel, err error) error {
	var said *proto.Error
	if e := proto.FromConnect(err); errors.As(e, &said) {
		return said
	}
	if cause := t.Err(); cause != nil {
		return lost(cause)
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%s: the control plane did not answer in time", what)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// trade gets a new certificate over t: the next pair.
func (k *Keeper) trade(ctx context.Context, t *tunnel.Tunnel, rejoin bool) error {
	csr, err := k.cfg.Identity.Request()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, k.cfg.HelloTimeout)
	defer cancel()
	request := connect.NewRequest(&posternv1.RenewRequest{Csr: csr, HostTime: timestamppb.Now()})
	var response *connect.Response[posternv1.RenewResponse]
	what := "renew the identity"
	if rejoin {
		what = "rejoin"
		response, err = client(t).Rejoin(ctx, request)
	} else {
		response, err = client(t).Renew(ctx, request)
	}
	if err != nil {
		return callError(what, t, err)
	}
	return k.cfg.Identity.Accept(response.Msg.Certificate, response.Msg.Authorities)
}

func (k *Keeper) renew(ctx context.Context, t *tunnel.Tunnel) error { return k.trade(ctx, t, false) }

// renewIn is when two thirds of the certificate's life are over, give or take a
// twentieth, so that hosts that joined together do not renew together.
func (k *Keeper) renewIn() time.Duration {
	from, to := k.cfg.Identity.Validity()
	life := to.Sub(from)
	at := from.Add(life*2/3 - life/20 + jitter(life/10))
	return max(time.Until(at), 0)
}

// renewAgainIn spaces the tries: there is a third of the life for them.
func (k *Keeper) renewAgainIn(try int) time.Duration {
	from, to := k.cfg.Identity.Validity()
	bound := min(time.Second<<min(try, 10), max(to.Sub(from)/60, time.Second))
	return bound/2 + jitter(bound/2)
}

// jitter is anything between 0 and d.
func jitter(d time.Duration) time.Duration {
	if d <= 0 {
		return 0
	}
	return rand.N(d)
}

// Classify gives the error of tunnel.Dial a code, where it has one: what the
// verification of the server's certificate said, or a refusal.
func Classify(err error) error {
	var said *proto.Error
	if errors.As(err, &said) {
		return said
	}
	var d *tunnel.DialError
	if !errors.As(err, &d) {
		return err
	}
	var refusal *tunnel.Refusal
	errors.As(err, &refusal)
	text := ""
	if refusal != nil {
		text = ": " + refusal.Text
	}
	switch {
	case d.Refusal == tunnel.RefusedVersion:
		return &proto.Error{Code: proto.CodeVersionMismatch, Message: "control plane and agent have no tunnel version in common" + text + ": upgrade the older one", Err: err}
	case d.Refusal == tunnel.RefusedNotAdmitted && refusal != nil:
		return &proto.Error{Code: proto.CodeUnauthenticated, Message: "the control plane did not admit this host" + text, Err: err}
	case d.Step == tunnel.StepInnerTLS && remoteAlert(err):
		return &proto.Error{Code: proto.CodeUnauthenticated, Message: err.Error(), Err: err}
	}
	return err
}

// remoteAlert reports whether the other side refused our certificate.
func remoteAlert(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "remote error"
}

// refused reports whether another certificate might do better.
func refused(err error) bool {
	switch proto.CodeOf(err) {
	case proto.CodeUnauthenticated, proto.CodeAgentRevoked, proto.CodeIdentityExpired, proto.CodeRoleDenied:
		return true
	}
	return false
}
