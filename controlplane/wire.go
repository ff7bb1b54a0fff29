package main

import (
	"context"
	"crypto/tls"
	"net/http"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/controlplane/api"
	"github.com/postern-dev/postern/controlplane/audit"
	"github.com/postern-dev/postern/controlplane/catalog"
	"github.com/postern-dev/postern/controlplane/hub"
	"github.com/postern-dev/postern/controlplane/jupyter"
	"github.com/postern-dev/postern/controlplane/masterkey"
	"github.com/postern-dev/postern/controlplane/notebook"
	"github.com/postern-dev/postern/controlplane/pgwire"
	"github.com/postern-dev/postern/controlplane/pki"
	"github.com/postern-dev/postern/controlplane/query"
	"github.com/postern-dev/postern/controlplane/registration"
	"github.com/postern-dev/postern/controlplane/secret"
	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/controlplane/token"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
	"github.com/postern-dev/postern/tunnel"
)

// Each consumer's interface, and who fills it.
var (
	_ hub.Gate       = gate{}
	_ hub.Joiner     = joiner{}
	_ hub.Rows       = (*rows)(nil)
	_ hub.Events     = events{}
	_ catalog.Store  = (*store.Store)(nil)
	_ catalog.Agent  = catalogAgent{}
	_ api.Catalogs   = (*catalog.Service)(nil)
	_ query.Agent    = queryAgent{}
	_ query.Audit    = queryAudit{}
	_ query.History  = (*store.Store)(nil)
	_ query.Box      = (*masterkey.Box)(nil)
	_ api.Tokens     = tokens{}
	_ api.Keys       = (*registration.Service)(nil)
	_ api.Store      = (*store.Store)(nil)
	_ api.Agents     = agents{}
	_ api.Queries    = queries{}
	_ api.Audit      = (*audit.Log)(nil)
	_ api.CA         = (*pki.Authority)(nil)
	_ pgwire.Agent   = pgAgent{}
	_ pgwire.Tokens  = pgTokens{}
	_ pgwire.Journal = pgJournal{}
)

// gate lets peers in: pki knows certificates, registration what became of them.
type gate struct {
	ca    *pki.Authority
	joins *registration.Service
}

func (g gate) Identify(state tls.ConnectionState) (hub.Identity, error) {
	id, err := g.ca.Identify(state)
	return hub.Identity(id), err
}

func (g gate) Admit(ctx context.Context, id hub.Identity, remote string) error {
	return g.joins.Admit(ctx, registration.Identity(id), remote)
}

func (g gate) CheckIdentity(ctx context.Context, id hub.Identity) error {
	return g.joins.CheckIdentity(ctx, registration.Identity(id))
}

// joiner serves LinkService.
type joiner struct {
	*registration.Service
	catalogs *catalog.Service
	sessions *sessionCloser
	outdated func(context.Context, hub.Identity) bool
	head     func(ctx context.Context, organization string) (auditchain.Head, error)
}

func (j joiner) Renew(ctx context.Context, id hub.Identity, req *posternv1.RenewRequest, remote string) (*posternv1.RenewResponse, error) {
	return j.Service.Renew(ctx, registration.Identity(id), req, remote)
}

func (j joiner) Hello(ctx context.Context, id hub.Identity, req *posternv1.HelloRequest) (*posternv1.HelloResponse, error) {
	resp, err := j.Service.Hello(ctx, registration.Identity(id), req)
	if err == nil && req.OpenSessions+req.Kernels > 0 {
		j.sessions.expect(id.Agent)
	}
	if err == nil {
		resp.RenewIdentity = j.outdated(ctx, id)
		var head auditchain.Head
		if head, err = j.head(ctx, id.Organization); err != nil {
			return nil, err
		}
		resp.OrganizationAuditHead = head.Proto()
	}
	if err == nil && req.FirstSinceStart {
		j.catalogs.Restarted(id.Organization, id.Agent)
	}
	return resp, err
}

func (j joiner) UpdateInventory(ctx context.Context, id hub.Identity, sources []*posternv1.SourceInfo) error {
	err := j.Service.UpdateInventory(ctx, registration.Identity(id), sources)
	if err == nil {
		j.catalogs.Changed(id.Organization, id.Agent)
	}
	return err
}

// events are links that come and go, for the store, the catalogs and secrets.
type events struct {
	*linkEvents
	catalogs *catalog.Service
	sessions *sessionCloser
	server   *Server
}

func (e events) LinkUp(id hub.Identity, remote string) {
	e.linkEvents.LinkUp(id, remote)
	e.catalogs.Came(id.Organization, id.Agent)
	e.sessions.came(id)
	e.server.secrets.AgentUp(id.Organization, id.Agent)
}

// catalogAgent asks an agent for a catalog, on a lane for bulk.
type catalogAgent struct{ *hub.Link }

// maxPage bounds a page of a catalog, in bytes.
const maxPage = 16 << 20

func (c catalogAgent) Introspect(ctx context.Context, r *posternv1.IntrospectRequest, take func(*posternv1.CatalogPage) error) error {
	client := posternv1connect.NewHostServiceClient(c.HTTP(tunnel.Bulk), "http://agent", connect.WithReadMaxBytes(maxPage))
	stream, err := client.Introspect(ctx, connect.NewRequest(r))
	if err != nil {
		return c.explain(err)
	}
	defer stream.Close() //nolint:errcheck // read to its end or not
	for stream.Receive() {
		if err := take(stream.Msg()); err != nil {
			return err
		}
	}
	if err := stream.Err(); err != nil {
		return c.explain(err)
	}
	return nil
}

func (c catalogAgent) explain(err error) error {
	if lost := c.Err(); lost != nil {
		return lost
	}
	return proto.FromConnect(err)
}

// rows takes the rows that agents report.
type rows struct{ server *Server }

func (r *rows) ReportRows(ctx context.Context, id hub.Identity, queryID string, kept *posternv1.KeptRows) error {
	err := r.server.queries.ReportRows(ctx, id.Organization, id.Agent, queryID, kept)
	if proto.CodeOf(err) != proto.CodeNotFound {
		return err
	}
	if found, perr := r.server.replicas.reportRows(ctx, id, queryID, kept); found {
		return perr
	}
	return err
}

// tokens tells the API who calls.
type tokens struct {
	*token.Service
	pg        *pgwire.Server
	jupyter   *jupyter.Server
	notebooks *notebook.Service
	secrets   *secret.Service
}

// Revoke revokes a token and ends what its clients have open.
func (t tokens) Revoke(ctx context.Context, organization, idOrName string) (*posternv1.Token, error) {
	revoked, err := t.Service.Revoke(ctx, organization, idOrName)
	if err == nil {
		t.pg.CutToken(revoked.Id)
		t.jupyter.CutToken(revoked.Id)
		t.notebooks.CutToken(revoked.Id)
		t.secrets.TokenRevoked(organization, revoked.Id)
	}
	return revoked, err
}

func (t tokens) Authenticate(ctx context.Context, bearer, remote string) (api.Caller, error) {
	p, err := t.Service.Authenticate(ctx, bearer, remote)
	return api.Caller(p), err
}

// agents are the tunnels for the API.
type agents struct {
	hub       *hub.Hub
	store     *store.Store
	replicas  *replicas
	joins     *registration.Service
	tokens    *token.Service
	pg        *pgwire.Server
	jupyter   *jupyter.Server
	notebooks *notebook.Service
}

func (a agents) Agent(id string) (api.LiveAgent, error) {
	l, err := a.hub.Agent(id)
	if err != nil {
		return nil, err
	}
	return liveAgent{l}, nil
}

func (a agents) Here(id string) api.LiveAgent {
	if l := a.hub.Local(id); l != nil {
		return liveAgent{l}
	}
	return nil
}

func (a agents) Elsewhere(ctx context.Context, organization string) (map[string]bool, error) {
	return a.replicas.elsewhere(ctx, organization)
}

func (a agents) AuditHead(ctx context.Context, id string) (auditchain.Head, error) {
	return a.store.AgentAuditHead(ctx, id)
}

func (a agents) Disconnect(id string) {
	a.joins.Forget()
	a.hub.Disconnect(id, hub.ErrRevoked)
}

func (a agents) DisconnectOrganization(id string) {
	a.joins.Forget()
	a.tokens.Forget()
	a.pg.CutOrganization(id)
	a.jupyter.CutOrganization(id)
	a.notebooks.CutOrganization(id)
	a.hub.DisconnectOrganization(id, hub.ErrDisabled)
}

// liveAgent calls an agent on the API's behalf.
type liveAgent struct{ *hub.Link }

func (l liveAgent) CheckSource(ctx context.Context, req *posternv1.CheckSourceRequest) (*posternv1.CheckSourceResponse, error) {
	return unwrap(l.Link, func() (*connect.Response[posternv1.CheckSourceResponse], error) {
		return l.Host().CheckSource(ctx, connect.NewRequest(req))
	})
}

func (l liveAgent) ReadAudit(ctx context.Context, req *posternv1.ReadAuditRequest) (*posternv1.ReadAuditResponse, error) {
	return unwrap(l.Link, func() (*connect.Response[posternv1.ReadAuditResponse], error) {
		return l.Host().ReadAudit(ctx, connect.NewRequest(req))
	})
}

func (l liveAgent) OpenSession(ctx context.Context, req *posternv1.OpenSessionRequest) (*posternv1.OpenSessionResponse, error) {
	return unwrap(l.Link, func() (*connect.Response[posternv1.OpenSessionResponse], error) {
		return l.Host().OpenSession(ctx, connect.NewRequest(req))
	})
}

func (l liveAgent) CloseSession(ctx context.Context, req *posternv1.CloseSessionRequest) (*posternv1.CloseSessionResponse, error) {
	return unwrap(l.Link, func() (*connect.Response[posternv1.CloseSessionResponse], error) {
		return l.Host().CloseSession(ctx, connect.NewRequest(req))
	})
}

func (l liveAgent) ListSessions(ctx context.Context, req *posternv1.ListSessionsRequest) (*posternv1.ListSessionsResponse, error) {
	return unwrap(l.Link, func() (*connect.Response[posternv1.ListSessionsResponse], error) {
		return l.Host().ListSessions(ctx, connect.NewRequest(req))
	})
}

func (l liveAgent) Get(ctx context.Context, path string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := l.HTTP(tunnel.Control).Do(req)
	if lost := l.Err(); err != nil && lost != nil {
		return nil, lost
	}
	return resp, err
}

// unwrap turns a Connect reply into its message, and a lost tunnel into the error
// that says so.
func unwrap[T any](l *hub.Link, call func() (*connect.Response[T], error)) (*T, error) {
	resp, err := call()
	if err == nil {
		return resp.Msg, nil
	}
	err = proto.FromConnect(err)
	if lost := l.Err(); lost != nil {
		return nil, lost
	}
	return nil, err
}

// queryAgent runs statements on an agent.
type queryAgent struct{ *hub.Link }

func (q queryAgent) Do(r *http.Request) (*http.Response, error) { return q.HTTP(tunnel.Solo).Do(r) }

func (q queryAgent) CancelQuery(ctx context.Context, req *posternv1.CancelQueryRequest) error {
	_, err := unwrap(q.Link, func() (*connect.Response[posternv1.CancelQueryResponse], error) {
		return q.Host().CancelQuery(ctx, connect.NewRequest(req))
	})
	return err
}

// queries runs statements for the API.
type queries struct {
	*query.Runner
	journal  *query.Journal
	replicas *replicas
}

// Cancel ends a statement, of whatever client.
func (q queries) Cancel(ctx context.Context, by *posternv1.Principal, id string, may func(owner *posternv1.Principal) error) (bool, error) {
	if found, err := q.Runner.Cancel(ctx, by, id, may); found || err != nil {
		return found, err
	}
	if found, err := q.journal.Cancel(ctx, by, id, may); found || err != nil {
		return found, err
	}
	return q.replicas.cancelQuery(ctx, by, id)
}

// cancelHere is Cancel for a statement that runs at this replica, when another one has
// decided that it may be.
func (q queries) cancelHere(ctx context.Context, by *posternv1.Principal, id string) (bool, error) {
	may := func(*posternv1.Principal) error { return nil }
	if found, err := q.Runner.Cancel(ctx, by, id, may); found || err != nil {
		return found, err
	}
	return q.journal.Cancel(ctx, by, id, may)
}

func (q queries) Start(ctx context.Context, c api.Caller, agent, source string, statement *posternv1.RunSQLRequest) (api.Result, error) {
	res, err := q.Runner.Start(ctx, query.Request{
		Principal: c.Principal, Agent: agent, Source: source, Statement: statement, Remote: c.Remote,
	})
	if err != nil {
		return nil, err
	}
	return result{res}, nil
}

// result is a query.Result with the API's method names.
type result struct{ *query.Result }

func (r result) QueryID() string            { return r.Result.QueryID }
func (r result) Read(p []byte) (int, error) { return r.Body.Read(p) }

// queryAudit writes the entry of a finished query.
type queryAudit struct{ log *audit.Log }

func (a queryAudit) Append(ctx context.Context, e query.Entry) error {
	return a.log.Append(ctx, a.entry(e))
}

// appendAll writes entries of one organization.
func (a queryAudit) appendAll(ctx context.Context, entries []query.Entry) error {
	all := make([]auditchain.Entry, len(entries))
	for i, e := range entries {
		all[i] = a.entry(e)
	}
	return a.log.AppendAll(ctx, all)
}

func (a queryAudit) entry(e query.Entry) auditchain.Entry {
	q := e.Query
	action := e.Action
	if action == "" {
		action = "sql.run"
	}
	return auditchain.Entry{
		Time: time.Now(), Organization: e.Principal.Organization, Actor: "token " + e.Principal.TokenName, Role: e.Principal.Role,
		Action: action, Target: e.Target, Agent: q.Agent, Source: q.Source, QueryID: q.Id, SessionID: e.SessionID, Verdict: e.Verdict, Statement: q.Sql,
		Outcome: q.State, Error: q.Error.GetMessage(), Rows: q.Rows, Bytes: q.Bytes,
		DurationMillis: q.Duration.AsDuration().Milliseconds(), Remote: e.Remote,
	}
}
