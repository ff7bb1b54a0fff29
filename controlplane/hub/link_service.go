package hub

import (
	"context"
	"net/http"
	"strings"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

// maxLinkRequest bounds a request of LinkService, in bytes.
const maxLinkRequest = 1 << 20

// linkService serves agents on their tunnels.
type linkService struct{ hub *Hub }

var _ posternv1connect.LinkServiceHandler = linkService{}

func (h *Hub) routes() http.Handler {
	mux := http.NewServeMux()
	path, handler := posternv1connect.NewLinkServiceHandler(linkService{h}, connect.WithReadMaxBytes(maxLinkRequest))
	mux.Handle(path, h.authorise(handler))
	var all http.Handler = mux
	if h.cfg.Members != nil {
		all = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if h.cfg.Members.Serves(r.URL.Path) {
				h.serveMember(w, r)
				return
			}
			mux.ServeHTTP(w, r)
		})
	}
	if h.cfg.Guard == nil {
		return all
	}
	guarded := h.cfg.Guard(all, func(r *http.Request) string {
		if p := peerOf(r.Context()); p.id.Agent != "" {
			return p.id.Agent
		}
		return "strangers" // together
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, procedures) {
			guarded.ServeHTTP(w, r)
			return
		}
		all.ServeHTTP(w, r) // bodies that are read piece by piece
	})
}

// procedures begins the paths of procedures, whose requests are read whole.
const procedures = "/postern.v1."

// serveMember serves an attached agent, whose standing is checked at every request.
func (h *Hub) serveMember(w http.ResponseWriter, r *http.Request) {
	p := peerOf(r.Context())
	h.mu.Lock()
	l := p.link
	h.mu.Unlock()
	var err error
	switch {
	case p.standing() != member:
		err = proto.Errorf(proto.CodeUnauthenticated, "only an agent with a valid certificate may do this")
	case l == nil:
		err = proto.Errorf(proto.CodeInvalid, "an agent says hello before anything else")
	default:
		err = h.cfg.Gate.CheckIdentity(r.Context(), p.id)
	}
	if err != nil {
		writeConnectError(w, r, err)
		return
	}
	m := Member{Organization: p.id.Organization, Agent: p.id.Agent, Name: l.Name}
	h.cfg.Members.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), memberKey{}, m)))
}

type memberKey struct{}

// MemberOf is the agent that asks, within a handler of Members.
func MemberOf(ctx context.Context) Member { return ctx.Value(memberKey{}).(Member) }

// standing is what a certificate makes of a peer.
type standing int

const (
	stranger standing = iota // no certificate
	lapsed                   // an expired one, within the grace period
	member                   // a valid one
)

// needs is the standing for each procedure; what is not listed is refused.
var needs = map[string]standing{
	posternv1connect.LinkServiceRegisterProcedure:         stranger,
	posternv1connect.LinkServiceRejoinProcedure:           lapsed,
	posternv1connect.LinkServiceRenewProcedure:            member,
	posternv1connect.LinkServiceHelloProcedure:            member,
	posternv1connect.LinkServiceUpdateInventoryProcedure:  member,
	posternv1connect.LinkServiceReportRowsProcedure:       member,
	posternv1connect.LinkServiceReportStatementsProcedure: member,
}

func (p *peer) standing() standing {
	switch {
	case p.id.Agent == "":
		return stranger
	case p.id.Expired:
		return lapsed
	}
	return member
}

// authorise checks every request, not only the first of a tunnel.
func (h *Hub) authorise(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p := r.Context().Value(peerKey{}).(*peer)
		need, known := needs[r.URL.Path]
		var err error
		switch have := p.standing(); {
		case !known:
			err = proto.Errorf(proto.CodeNotFound, "no such request on a tunnel: %q", r.URL.Path)
		case have == need && have == member:
			err = h.cfg.Gate.CheckIdentity(r.Context(), p.id)
		case have == need:
		case have == lapsed:
			err = proto.Errorf(proto.CodeIdentityExpired, "the agent's certificate has expired: it must rejoin before anything else")
		case have == stranger:
			err = proto.Errorf(proto.CodeUnauthenticated, "a host without a certificate may only register")
		default:
			err = proto.Errorf(proto.CodeInvalid, "a host with a certificate cannot do this: %q", r.URL.Path)
		}
		if err != nil {
			writeConnectError(w, r, err)
			return
		}
		next.ServeHTTP(w, r)
	})
}

func writeConnectError(w http.ResponseWriter, r *http.Request, err error) {
	connect.NewErrorWriter().Write(w, r, proto.ConnectError(err)) //nolint:errcheck // the peer has gone
}

func peerOf(ctx context.Context) *peer { return ctx.Value(peerKey{}).(*peer) }

// Register implements LinkService.
func (s linkService) Register(ctx context.Context, req *connect.Request[posternv1.RegisterRequest]) (*connect.Response[posternv1.RegisterResponse], error) {
	if _, err := proto.Negotiate(req.Msg.Version); err != nil {
		return nil, proto.ConnectError(err)
	}
	return reply(s.hub, "register", func() (*posternv1.RegisterResponse, error) {
		return s.hub.cfg.Joiner.Register(ctx, req.Msg, peerOf(ctx).tunnel.RemoteAddr().String())
	})
}

// Rejoin implements LinkService.
func (s linkService) Rejoin(ctx context.Context, req *connect.Request[posternv1.RenewRequest]) (*connect.Response[posternv1.RenewResponse], error) {
	return s.Renew(ctx, req)
}

// Renew implements LinkService.
func (s linkService) Renew(ctx context.Context, req *connect.Request[posternv1.RenewRequest]) (*connect.Response[posternv1.RenewResponse], error) {
	return reply(s.hub, "renew", func() (*posternv1.RenewResponse, error) {
		p := peerOf(ctx)
		return s.hub.cfg.Joiner.Renew(ctx, p.id, req.Msg, p.tunnel.RemoteAddr().String())
	})
}

// Hello implements LinkService.
func (s linkService) Hello(ctx context.Context, req *connect.Request[posternv1.HelloRequest]) (*connect.Response[posternv1.HelloResponse], error) {
	return reply(s.hub, "hello", func() (*posternv1.HelloResponse, error) {
		version, err := proto.Negotiate(req.Msg.Version)
		if err != nil {
			return nil, err
		}
		p := peerOf(ctx)
		resp, err := s.hub.cfg.Joiner.Hello(ctx, p.id, req.Msg)
		if err != nil {
			return nil, err
		}
		version.Software = proto.Software()
		resp.Version = version
		resp.Features = proto.CommonFeatures(proto.Features(), req.Msg.Features)
		resp.AgentId = p.id.Agent
		resp.ServerTime = timestamppb.Now()
		if err := s.hub.join(ctx, p, resp.Name); err != nil {
			return nil, err
		}
		return resp, nil
	})
}

// UpdateInventory implements LinkService.
func (s linkService) UpdateInventory(ctx context.Context, req *connect.Request[posternv1.UpdateInventoryRequest]) (*connect.Response[posternv1.UpdateInventoryResponse], error) {
	return reply(s.hub, "update inventory", func() (*posternv1.UpdateInventoryResponse, error) {
		return &posternv1.UpdateInventoryResponse{}, s.hub.cfg.Joiner.UpdateInventory(ctx, peerOf(ctx).id, req.Msg.Sources)
	})
}

// ReportRows implements LinkService.
func (s linkService) ReportRows(ctx context.Context, req *connect.Request[posternv1.ReportRowsRequest]) (*connect.Response[posternv1.ReportRowsResponse], error) {
	return reply(s.hub, "report rows", func() (*posternv1.ReportRowsResponse, error) {
		return &posternv1.ReportRowsResponse{}, s.hub.cfg.Rows.ReportRows(ctx, peerOf(ctx).id, req.Msg.QueryId, req.Msg.Rows)
	})
}

// ReportStatements implements LinkService.
func (s linkService) ReportStatements(ctx context.Context, req *connect.Request[posternv1.ReportStatementsRequest]) (*connect.Response[posternv1.ReportStatementsResponse], error) {
	return reply(s.hub, "report statements", func() (*posternv1.ReportStatementsResponse, error) {
		return s.hub.cfg.Reports.ReportStatements(ctx, peerOf(ctx).id, req.Msg)
	})
}

// reply turns f's result into a Connect reply, and logs what stays internal.
func reply[T any](h *Hub, what string, f func() (*T, error)) (*connect.Response[T], error) {
	msg, err := f()
	if err != nil {
		if proto.CodeOf(err) == proto.CodeInternal {
			h.log.Error("agent request failed", "request", what, "err", err)
		} else {
			h.log.Info("agent request refused", "request", what, "err", err)
		}
		return nil, proto.ConnectError(err)
	}
	return connect.NewResponse(msg), nil
}
