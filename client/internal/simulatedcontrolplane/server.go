package simulatedcontrolplane

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	protobuf "google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

// Tokens that the server knows, by role.
const (
	AdminToken  = "tok-admin-secret"
	ViewerToken = "tok-viewer-secret"
)

// Server is a simulated control plane on a loopback port.
type Server struct {
	*httptest.Server

	mu        sync.Mutex
	hangups   int
	cancelled map[string]chan struct{}
	queries   map[string]*posternv1.Query
	requests  []*http.Request
	broken    bool
	sessions  map[string]*posternv1.SQLSession
	opened    int
	calledOff atomic.Bool // the rotation of the master key
}

// Start starts a server; TLS if secure. The caller closes it.
func Start(secure bool) *Server {
	s := &Server{cancelled: map[string]chan struct{}{}, queries: map[string]*posternv1.Query{}, sessions: map[string]*posternv1.SQLSession{}}
	mux := http.NewServeMux()
	for _, service := range []func() (string, http.Handler){
		func() (string, http.Handler) { return posternv1connect.NewIdentityServiceHandler(s) },
		func() (string, http.Handler) { return posternv1connect.NewTokenServiceHandler(s) },
		func() (string, http.Handler) { return posternv1connect.NewKeyServiceHandler(s) },
		func() (string, http.Handler) { return posternv1connect.NewAgentServiceHandler(s) },
		func() (string, http.Handler) { return posternv1connect.NewSourceServiceHandler(s) },
		func() (string, http.Handler) { return posternv1connect.NewQueryServiceHandler(s) },
		func() (string, http.Handler) { return posternv1connect.NewSessionServiceHandler(s) },
		func() (string, http.Handler) { return posternv1connect.NewAuditServiceHandler(s) },
		func() (string, http.Handler) { return posternv1connect.NewOrganizationServiceHandler(s) },
		func() (string, http.Handler) { return posternv1connect.NewCAServiceHandler(s) },
		func() (string, http.Handler) { return posternv1connect.NewMasterKeyServiceHandler(s) },
		func() (string, http.Handler) { return posternv1connect.NewFileKeyServiceHandler(s) },
	} {
		path, handler := service()
		mux.Handle(path, s.guard(handler.ServeHTTP, func(w http.ResponseWriter, r *http.Request, err error) {
			connect.NewErrorWriter().Write(w, r, proto.ConnectError(err)) //nolint:errcheck // a test's peer
		}))
	}
	mux.Handle("POST /api/v1/sql/{agent}/{source}", s.guard(s.serveSQL, func(w http.ResponseWriter, _ *http.Request, err error) {
		proto.WriteHTTPError(w, err)
	}))
	mux.HandleFunc("/elsewhere/", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "http://other.example.com/", http.StatusFound)
	})
	mux.HandleFunc("/webserver/", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		w.Write([]byte("<html>hello</html>")) //nolint:errcheck // a test's peer
	})
	s.Server = httptest.NewUnstartedServer(mux)
	s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	if secure {
		s.StartTLS()
	} else {
		s.Server.Start()
	}
	return s
}

// Hangups is how many statements ended because the client hung up.
func (s *Server) Hangups() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.hangups
}

// Requests are the requests so far, with their headers.
func (s *Server) Requests() []*http.Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]*http.Request(nil), s.requests...)
}

// Running says whether a statement is under way.
func (s *Server) Running() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, q := range s.queries {
		if q.State == "running" {
			return true
		}
	}
	return false
}

// BreakAudit makes the host's chain verify no more.
func (s *Server) BreakAudit() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.broken = true
}

type roleKey struct{}

func (s *Server) guard(next http.HandlerFunc, fail func(http.ResponseWriter, *http.Request, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.requests = append(s.requests, r)
		s.mu.Unlock()
		role := map[string]string{"Bearer " + AdminToken: "admin", "Bearer " + ViewerToken: "viewer"}[r.Header.Get("Authorization")]
		switch {
		case role == "":
			fail(w, r, proto.Errorf(proto.CodeUnauthenticated, "the API token is unknown, expired or revoked: run `postern login`"))
		case role == "viewer" && !strings.Contains(r.URL.Path, "WhoAmI") && !strings.Contains(r.URL.Path, "List") && !strings.Contains(r.URL.Path, "Get"):
			fail(w, r, proto.Errorf(proto.CodeRoleDenied, "role viewer may not do this: ask for a token with role analyst"))
		default:
			next(w, r.WithContext(context.WithValue(r.Context(), roleKey{}, role)))
		}
	})
}

// at is a time on the day everything in here happened.
func at(hour, minute int) *timestamppb.Timestamp {
	return timestamppb.New(time.Date(2026, 11, 22, hour, minute, 0, 0, time.UTC))
}

func respond[T any](m *T, err error) (*connect.Response[T], error) {
	if err != nil {
		return nil, proto.ConnectError(err)
	}
	return connect.NewResponse(m), nil
}

// WhoAmI implements IdentityService.
func (s *Server) WhoAmI(ctx context.Context, _ *connect.Request[posternv1.WhoAmIRequest]) (*connect.Response[posternv1.WhoAmIResponse], error) {
	role := ctx.Value(roleKey{}).(string)
	return respond(&posternv1.WhoAmIResponse{Organization: "default", TokenId: "tok_1", TokenName: role, Role: role, ServerVersion: "0.1.0 (simulated)"}, nil)
}

// CreateToken implements TokenService.
func (s *Server) CreateToken(_ context.Context, req *connect.Request[posternv1.CreateTokenRequest]) (*connect.Response[posternv1.CreateTokenResponse], error) {
	if req.Msg.Name == "taken" {
		return respond[posternv1.CreateTokenResponse](nil, proto.Errorf(proto.CodeAlreadyExists, "a token called taken exists already: choose another name"))
	}
	t := &posternv1.Token{Id: "tok_2", Name: req.Msg.Name, Role: req.Msg.Role, Created: at(1, 0)}
	if req.Msg.Ttl != nil {
		t.Expires = timestamppb.New(at(1, 0).AsTime().Add(req.Msg.Ttl.AsDuration()))
	}
	return respond(&posternv1.CreateTokenResponse{Token: t, Secret: "new-token-secret"}, nil)
}

// ListTokens implements TokenService.
func (s *Server) ListTokens(context.Context, *connect.Request[posternv1.ListTokensRequest]) (*connect.Response[posternv1.ListTokensResponse], error) {
	return respond(&posternv1.ListTokensResponse{Tokens: []*posternv1.Token{
		{Id: "tok_1", Name: "admin", Role: "admin", Created: at(0, 30), LastUsed: at(1, 0)},
		{Id: "tok_2", Name: "old", Role: "viewer", Created: at(0, 31), Expires: at(2, 0), Revoked: at(1, 0)},
	}}, nil)
}

// RotateToken implements TokenService.
func (s *Server) RotateToken(_ context.Context, req *connect.Request[posternv1.RotateTokenRequest]) (*connect.Response[posternv1.RotateTokenResponse], error) {
	if req.Msg.Token != "notebooks" {
		return respond[posternv1.RotateTokenResponse](nil, proto.Errorf(proto.CodeNotFound, "no token %q: see `postern token list`", req.Msg.Token))
	}
	return respond(&posternv1.RotateTokenResponse{
		Token: &posternv1.Token{Id: "tok_2", Name: "notebooks", Role: "analyst", Created: at(0, 30), Expires: at(2, 0)}, Secret: "rotated-secret",
		FormerUntil: timestamppb.New(at(1, 0).AsTime().Add(req.Msg.Overlap.AsDuration())),
	}, nil)
}

// RevokeToken implements TokenService.
func (s *Server) RevokeToken(_ context.Context, req *connect.Request[posternv1.RevokeTokenRequest]) (*connect.Response[posternv1.RevokeTokenResponse], error) {
	if req.Msg.Token != "notebooks" {
		return respond[posternv1.RevokeTokenResponse](nil, proto.Errorf(proto.CodeNotFound, "no token %q: see `postern token list`", req.Msg.Token))
	}
	return respond(&posternv1.RevokeTokenResponse{Token: &posternv1.Token{Id: "tok_2", Name: "notebooks", Revoked: at(1, 0)}}, nil)
}

// CreateKey implements KeyService.
func (s *Server) CreateKey(_ context.Context, req *connect.Request[posternv1.CreateKeyRequest]) (*connect.Response[posternv1.CreateKeyResponse], error) {
	return respond(&posternv1.CreateKeyResponse{Secret: "prk1_simulated", Key: &posternv1.Key{
		Id: "key_1", Labels: req.Msg.Labels, MaxUses: req.Msg.MaxUses, Expires: timestamppb.New(at(1, 0).AsTime().Add(max(req.Msg.Ttl.AsDuration(), time.Hour))),
	}}, nil)
}

// ListKeys implements KeyService.
func (s *Server) ListKeys(context.Context, *connect.Request[posternv1.ListKeysRequest]) (*connect.Response[posternv1.ListKeysResponse], error) {
	return respond(&posternv1.ListKeysResponse{Keys: []*posternv1.Key{
		{Id: "key_1", Labels: map[string]string{"site": "lab", "env": "test"}, MaxUses: 5, Uses: 2, Created: at(0, 30), Expires: at(1, 30), CreatedBy: "admin"},
	}}, nil)
}

// RevokeKey implements KeyService.
func (s *Server) RevokeKey(_ context.Context, req *connect.Request[posternv1.RevokeKeyRequest]) (*connect.Response[posternv1.RevokeKeyResponse], error) {
	return respond(&posternv1.RevokeKeyResponse{Key: &posternv1.Key{Id: req.Msg.KeyId, Revoked: at(1, 0)}}, nil)
}

func agents() []*posternv1.Agent {
	return []*posternv1.Agent{
		{
			Id: "agt_1", Name: "edge-1", Labels: map[string]string{"site": "lab"}, Online: true, Software: "0.1.0", Hostname: "edge-1.lab", Os: "Debian 12", Arch: "amd64",
			Kernel: "6.1.0", Registered: at(0, 30), LastSeen: at(1, 0), CertificateExpires: at(23, 0), Sources: []*posternv1.SourceInfo{warehouse()},
			RemoteAddress: "192.0.2.7", RoundTrip: durationpb.New(12345 * time.Microsecond), LinkEvents: []*posternv1.LinkEvent{{Time: at(0, 30), State: "up"}},
		},
		// A host says its own name: it must not drive the terminal.
		{Id: "agt_2", Name: "edge-2", Hostname: "evil\x1b[31m", Registered: at(0, 40)},
	}
}

func warehouse() *posternv1.SourceInfo {
	return &posternv1.SourceInfo{
		Name: "warehouse", Engine: "postgres", Mode: "read-only", MaxRows: 1_000_000, MaxBytes: 1 << 30, StatementTimeout: durationpb.New(5 * time.Minute), Concurrency: 8,
	}
}

func agentCalled(name string) (*posternv1.Agent, error) {
	for _, g := range agents() {
		if g.Name == name || g.Id == name {
			return g, nil
		}
	}
	return nil, proto.Errorf(proto.CodeNotFound, "no agent %q: see `postern agent list`", name)
}

// ListAgents implements AgentService.
func (s *Server) ListAgents(context.Context, *connect.Request[posternv1.ListAgentsRequest]) (*connect.Response[posternv1.ListAgentsResponse], error) {
	return respond(&posternv1.ListAgentsResponse{Agents: agents()}, nil)
}

// GetAgent implements AgentService.
func (s *Server) GetAgent(_ context.Context, req *connect.Request[posternv1.GetAgentRequest]) (*connect.Response[posternv1.GetAgentResponse], error) {
	g, err := agentCalled(req.Msg.Agent)
	return respond(&posternv1.GetAgentResponse{Agent: g}, err)
}

// RevokeAgent implements AgentService.
func (s *Server) RevokeAgent(_ context.Context, req *connect.Request[posternv1.RevokeAgentRequest]) (*connect.Response[posternv1.RevokeAgentResponse], error) {
	g, err := agentCalled(req.Msg.Agent)
	return respond(&posternv1.RevokeAgentResponse{Agent: g}, err)
}

// ListSources implements SourceService.
func (s *Server) ListSources(_ context.Context, req *connect.Request[posternv1.ListOrganizationSourcesRequest]) (*connect.Response[posternv1.ListOrganizationSourcesResponse], error) {
	if req.Msg.Agent != "" {
		if _, err := agentCalled(req.Msg.Agent); err != nil {
			return respond[posternv1.ListOrganizationSourcesResponse](nil, err)
		}
	}
	return respond(&posternv1.ListOrganizationSourcesResponse{Sources: []*posternv1.OrganizationSource{{Agent: "edge-1", Online: true, Source: warehouse()}}}, nil)
}

// CheckSource implements SourceService.
func (s *Server) CheckSource(_ context.Context, req *connect.Request[posternv1.CheckOrganizationSourceRequest]) (*connect.Response[posternv1.CheckSourceResponse], error) {
	g, err := agentCalled(req.Msg.Agent)
	switch {
	case err != nil:
		return respond[posternv1.CheckSourceResponse](nil, err)
	case !g.Online:
		return respond[posternv1.CheckSourceResponse](nil, proto.Errorf(proto.CodeAgentOffline, "agent %s is offline: look at agentd on its host", g.Name))
	}
	checks := []*posternv1.Check{{Name: "reachable", Result: "ok", Message: "127.0.0.1:5432 answers"}}
	if req.Msg.Source == "broken" {
		checks = append(checks, &posternv1.Check{Name: "credentials", Result: "failed", Message: "password refused", Remedy: "check the password file"})
	}
	return respond(&posternv1.CheckSourceResponse{Checks: checks}, nil)
}

// Introspect implements SourceService: two pages, or what has "order" in its name.
func (s *Server) Introspect(_ context.Context, req *connect.Request[posternv1.IntrospectSourceRequest]) (*connect.Response[posternv1.IntrospectSourceResponse], error) {
	g, err := agentCalled(req.Msg.Agent)
	switch {
	case err != nil:
		return respond[posternv1.IntrospectSourceResponse](nil, err)
	case !g.Online:
		return respond[posternv1.IntrospectSourceResponse](nil, proto.Errorf(proto.CodeAgentOffline, "agent %s is offline: look at agentd on its host", g.Name))
	}
	resp := &posternv1.IntrospectSourceResponse{Refreshed: at(1, 0)}
	if req.Msg.PageToken == "" {
		resp.Schemas = []*posternv1.CatalogSchema{{Name: "public", Comment: "the usual"}}
		resp.Tables = []*posternv1.CatalogTable{{
			Schema: "public", Name: "orders", Kind: "table", Comment: "evil\x1b[31m", Rows: protobuf.Uint64(12000), Bytes: protobuf.Uint64(750_000),
			Columns: []*posternv1.CatalogColumn{
				{Name: "id", Type: "bigint", NotNull: true, Generated: "identity"}, {Name: "customer", Type: "integer", HasDefault: true, Comment: "who"},
			},
			Keys: []*posternv1.CatalogKey{
				{Name: "orders_pkey", Kind: "primary", Columns: []string{"id"}},
				{Kind: "foreign", Columns: []string{"customer"}, ReferencesHidden: true},
				{Name: "fk", Kind: "foreign", Columns: []string{"id"}, References: &posternv1.CatalogName{Schema: "public", Name: "items"}, ReferencedColumns: []string{"id"}},
			},
			Indexes:  []*posternv1.CatalogIndex{{Name: "orders_pkey", Method: "btree", Unique: true, Columns: []string{"id"}}},
			Triggers: []string{"audit_orders"},
		}}
		resp.NextPageToken = "more"
		return respond(resp, nil)
	}
	resp.Tables = []*posternv1.CatalogTable{{Schema: "public", Name: "recent_orders", Kind: "view"}}
	resp.Functions = []*posternv1.CatalogFunction{{
		Schema: "public", Name: "order_total", Kind: "function", Result: "numeric", ReturnsSet: true,
		Arguments: []*posternv1.CatalogArgument{{Name: "id", Type: "bigint", Mode: "in"}, {Type: "text", Mode: "variadic"}},
	}}
	resp.Types = []*posternv1.CatalogType{
		{Schema: "public", Name: "order_state", Kind: "enum", Labels: []string{"new", "it's paid"}, Comment: "where it stands"},
		{Schema: "public", Name: "order_price", Kind: "domain", Base: "numeric(10,2)", NotNull: true},
		{Schema: "public", Name: "order_place", Kind: "composite", Attributes: []*posternv1.CatalogColumn{{Name: "street", Type: "text"}, {Name: "zip", Type: "integer"}}},
	}
	resp.Sequences = []*posternv1.CatalogSequence{{Schema: "public", Name: "orders_id_seq", Type: "bigint", Owner: &posternv1.CatalogName{Schema: "public", Name: "orders"}, OwnerColumn: "id"}}
	return respond(resp, nil)
}

// ListQueries implements QueryService.
func (s *Server) ListQueries(context.Context, *connect.Request[posternv1.ListQueriesRequest]) (*connect.Response[posternv1.ListQueriesResponse], error) {
	return respond(&posternv1.ListQueriesResponse{Queries: []*posternv1.Query{cannedQuery()}}, nil)
}

func cannedQuery() *posternv1.Query {
	return &posternv1.Query{
		Id: "qry_1", Agent: "edge-1", Source: "warehouse", TokenName: "admin", Sql: "select *\n  from orders", State: "failed", Started: at(1, 0), SessionId: "ses_1",
		Duration: durationpb.New(1234 * time.Millisecond), Rows: 5, Bytes: 640,
		Error: &posternv1.ErrorDetail{Code: proto.CodeSQL, Message: "division by zero", Sql: &posternv1.SQLErrorDetail{Sqlstate: "22012"}},
	}
}

// GetQuery implements QueryService.
func (s *Server) GetQuery(_ context.Context, req *connect.Request[posternv1.GetQueryRequest]) (*connect.Response[posternv1.GetQueryResponse], error) {
	switch id := req.Msg.QueryId; {
	case id == "qry_1":
		return respond(&posternv1.GetQueryResponse{Query: cannedQuery()}, nil)
	case id == "qry_now":
		q := cannedQuery()
		q.Id, q.Sql, q.State, q.Error = id, "plan", "done", nil
		return respond(&posternv1.GetQueryResponse{Query: q}, nil)
	case id == "qry_rows" || id == "qry_few" || id == "qry_plan":
		return respond(cannedRows(id, req.Msg.IncludeRows), nil)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if q := s.queries[req.Msg.QueryId]; q != nil {
		return respond(&posternv1.GetQueryResponse{Query: protobuf.CloneOf(q)}, nil)
	}
	return respond[posternv1.GetQueryResponse](nil, proto.Errorf(proto.CodeNotFound, "no query %q: see `postern query list`", req.Msg.QueryId))
}

// CancelQuery implements QueryService.
func (s *Server) CancelQuery(_ context.Context, req *connect.Request[posternv1.CancelOrganizationQueryRequest]) (*connect.Response[posternv1.CancelOrganizationQueryResponse], error) {
	if req.Msg.QueryId == "qry_1" {
		return respond(&posternv1.CancelOrganizationQueryResponse{Query: cannedQuery()}, nil)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	stop := s.cancelled[req.Msg.QueryId]
	if stop == nil {
		return respond[posternv1.CancelOrganizationQueryResponse](nil, proto.Errorf(proto.CodeNotFound, "no query %q: see `postern query list`", req.Msg.QueryId))
	}
	delete(s.cancelled, req.Msg.QueryId)
	close(stop)
	return respond(&posternv1.CancelOrganizationQueryResponse{Query: protobuf.CloneOf(s.queries[req.Msg.QueryId])}, nil)
}

// ListAudit implements AuditService.
func (s *Server) ListAudit(_ context.Context, r *connect.Request[posternv1.ListAuditRequest]) (*connect.Response[posternv1.ListAuditResponse], error) {
	var head auditchain.Head
	var lines [][]byte
	for _, e := range []auditchain.Entry{
		{Action: "key.create", Actor: "token admin", Role: "admin", Target: "key_1", Outcome: "done"},
		{Action: "sql.run", Actor: "token admin", Role: "admin", Agent: "edge-1", Source: "warehouse", QueryID: "qry_1", Verdict: "allowed", Outcome: "done", Rows: 5, Statement: "select *\nfrom orders"},
	} {
		e.Time = at(1, 0).AsTime()
		head = e.Seal(head)
		if head.Sequence >= r.Msg.From {
			lines = append(lines, e.Encode())
		}
	}
	return respond(&posternv1.ListAuditResponse{Entries: lines}, nil)
}

// VerifyAudit implements AuditService.
func (s *Server) VerifyAudit(context.Context, *connect.Request[posternv1.VerifyAuditRequest]) (*connect.Response[posternv1.VerifyAuditResponse], error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	host := &posternv1.ChainReport{Chain: "edge-1", Entries: 7, Ok: true}
	if s.broken {
		host = &posternv1.ChainReport{Chain: "edge-1", Entries: 3, Message: "entry 4: its hash does not follow from entry 3"}
	}
	return respond(&posternv1.VerifyAuditResponse{Reports: []*posternv1.ChainReport{{Chain: "control plane", Entries: 12, Ok: true}, host}}, nil)
}

// CreateOrganization implements OrganizationService.
func (s *Server) CreateOrganization(_ context.Context, req *connect.Request[posternv1.CreateOrganizationRequest]) (*connect.Response[posternv1.CreateOrganizationResponse], error) {
	return respond(&posternv1.CreateOrganizationResponse{Organization: &posternv1.Organization{Id: "org_2", Name: req.Msg.Name, Created: at(1, 0)}, AdminToken: "acme-admin-secret"}, nil)
}

// ListOrganizations implements OrganizationService.
func (s *Server) ListOrganizations(context.Context, *connect.Request[posternv1.ListOrganizationsRequest]) (*connect.Response[posternv1.ListOrganizationsResponse], error) {
	return respond(&posternv1.ListOrganizationsResponse{Organizations: []*posternv1.Organization{{Id: "org_1", Name: "default", Created: at(0, 30)}, {Id: "org_2", Name: "acme", Created: at(1, 0), Disabled: true}}}, nil)
}

// SetOrganizationDisabled implements OrganizationService.
func (s *Server) SetOrganizationDisabled(_ context.Context, req *connect.Request[posternv1.SetOrganizationDisabledRequest]) (*connect.Response[posternv1.SetOrganizationDisabledResponse], error) {
	return respond(&posternv1.SetOrganizationDisabledResponse{Organization: &posternv1.Organization{Id: "org_2", Name: req.Msg.Organization, Disabled: req.Msg.Disabled}}, nil)
}

// ShowCA implements CAService.
func (s *Server) ShowCA(context.Context, *connect.Request[posternv1.ShowCARequest]) (*connect.Response[posternv1.ShowCAResponse], error) {
	return respond(&posternv1.ShowCAResponse{Authorities: []*posternv1.Authority{{Fingerprint: strings.Repeat("ab", 32), Subject: "CN=Postern CA", NotBefore: at(0, 0), NotAfter: at(23, 0), State: "active"}}}, nil)
}

// caStatus is what a rotation under way is like.
func caStatus(stage string) *posternv1.CAStatus {
	return &posternv1.CAStatus{
		Stage: stage, TakesOver: at(1, 0), BehindTotal: 1, Keys: 2,
		Authorities: []*posternv1.Authority{{Fingerprint: strings.Repeat("ab", 32), Subject: "CN=Postern CA", NotBefore: at(0, 0), NotAfter: at(23, 0), State: "active"}},
		Behind:      []*posternv1.AgentOfAuthority{{Organization: "default", Agent: "berlin", Online: true, LastSeen: at(2, 0), CertificateExpires: at(3, 0)}},
	}
}

// RotateCA implements CAService.
func (s *Server) RotateCA(_ context.Context, r *connect.Request[posternv1.RotateCARequest]) (*connect.Response[posternv1.CAStatus], error) {
	if r.Msg.Force {
		return respond[posternv1.CAStatus](nil, proto.Errorf(proto.CodeInvalid, "there is no old certificate authority to drop"))
	}
	return respond(caStatus("announced"), nil)
}

// GetCAStatus implements CAService.
func (s *Server) GetCAStatus(context.Context, *connect.Request[posternv1.GetCAStatusRequest]) (*connect.Response[posternv1.CAStatus], error) {
	return respond(caStatus("renewing"), nil)
}

// masterKeyStatus is what a rotation under way is like.
func masterKeyStatus(stage string) *posternv1.MasterKeyStatus {
	return &posternv1.MasterKeyStatus{
		Stage: stage, TakesOver: at(1, 0), Began: at(1, 0), Moved: at(2, 0),
		Waits: []*posternv1.MasterKeyWait{{What: "control plane two: it does not have the new key yet", Since: at(1, 0), Replica: "two"}},
		Keys:  []*posternv1.MasterKey{{Id: "1", State: "active", Made: at(0, 0), Since: at(0, 0)}, {Id: "0123456789abcdef", State: "announced", Made: at(1, 0), Since: at(1, 0)}},
		Left:  []*posternv1.SealedCount{{Kind: "secrets", Count: 7}},
		Replicas: []*posternv1.MasterKeyReplica{
			{Name: "one", Keys: []string{"1", "0123456789abcdef"}, Active: "1"}, {Name: "two", Keys: []string{"1"}, Active: "1", Problem: "it does not have the new key yet"},
		},
	}
}

// RotateMasterKey implements MasterKeyService.
func (s *Server) RotateMasterKey(context.Context, *connect.Request[posternv1.RotateMasterKeyRequest]) (*connect.Response[posternv1.MasterKeyStatus], error) {
	return respond(masterKeyStatus("announced"), nil)
}

// CancelMasterKeyRotation implements MasterKeyService.
func (s *Server) CancelMasterKeyRotation(context.Context, *connect.Request[posternv1.CancelMasterKeyRotationRequest]) (*connect.Response[posternv1.MasterKeyStatus], error) {
	if s.calledOff.Swap(true) {
		return respond[posternv1.MasterKeyStatus](nil, proto.Errorf(proto.CodeInvalid, "no rotation of the master key is under way: there is nothing to call off"))
	}
	return respond(&posternv1.MasterKeyStatus{Stage: "stable", Keys: []*posternv1.MasterKey{{Id: "1", State: "active", Made: at(0, 0), Since: at(0, 0)}}}, nil)
}

// GetMasterKeyStatus implements MasterKeyService.
func (s *Server) GetMasterKeyStatus(context.Context, *connect.Request[posternv1.GetMasterKeyStatusRequest]) (*connect.Response[posternv1.MasterKeyStatus], error) {
	return respond(masterKeyStatus("sealing"), nil)
}

// RotateFileKey implements FileKeyService.
func (s *Server) RotateFileKey(ctx context.Context, r *connect.Request[posternv1.RotateFileKeyRequest]) (*connect.Response[posternv1.FileKeyStatus], error) {
	if r.Msg.Force {
		return respond[posternv1.FileKeyStatus](nil, proto.Errorf(proto.CodeInvalid, "there is no old key to drop"))
	}
	return s.GetFileKeyStatus(ctx, nil)
}

// GetFileKeyStatus implements FileKeyService.
func (s *Server) GetFileKeyStatus(context.Context, *connect.Request[posternv1.GetFileKeyStatusRequest]) (*connect.Response[posternv1.FileKeyStatus], error) {
	return respond(&posternv1.FileKeyStatus{Stage: "sealing", Keys: []*posternv1.FileKey{
		{Generation: 2, Made: at(1, 0), Objects: 5, MasterKey: "1"}, {Generation: 1, Made: at(0, 0), Objects: 1200, Damaged: 3, MasterKey: "1"},
	}}, nil)
}

// decode reads a JSON request without protojson's help, as any program may send
// it.
func decode(r *http.Request) (sql string, fields map[string]any, err error) {
	if err := json.NewDecoder(r.Body).Decode(&fields); err != nil {
		return "", nil, err
	}
	sql, _ = fields["sql"].(string)
	return sql, fields, nil
}
