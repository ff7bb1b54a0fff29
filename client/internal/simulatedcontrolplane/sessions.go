package simulatedcontrolplane

import (
	"context"
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"
	gproto "google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// OpenSession implements SessionService: sessions are ses_1, ses_2, ... Only the
// source warehouse has any.
func (s *Server) OpenSession(_ context.Context, req *connect.Request[posternv1.OpenSQLSessionRequest]) (*connect.Response[posternv1.OpenSQLSessionResponse], error) {
	g, err := agentCalled(req.Msg.Agent)
	switch {
	case err != nil:
	case !g.Online:
		err = proto.Errorf(proto.CodeAgentOffline, "agent %s is offline: look at agentd on its host", g.Name)
	case req.Msg.Source != "warehouse":
		err = proto.Errorf(proto.CodeNotFound, "this agent has no data source %q: see postern source list", req.Msg.Source)
	}
	if err != nil {
		return respond[posternv1.OpenSQLSessionResponse](nil, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.opened++
	session := &posternv1.SQLSession{Id: fmt.Sprintf("ses_%d", s.opened), Source: "warehouse", Agent: g.Name, Transaction: "none", IdleTimeout: req.Msg.IdleTimeout}
	s.sessions[session.Id] = session
	return respond(&posternv1.OpenSQLSessionResponse{Session: session}, nil)
}

// CloseSession implements SessionService.
func (s *Server) CloseSession(_ context.Context, req *connect.Request[posternv1.CloseSQLSessionRequest]) (*connect.Response[posternv1.CloseSQLSessionResponse], error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sessions[req.Msg.SessionId] == nil {
		return respond[posternv1.CloseSQLSessionResponse](nil, noSession(req.Msg.SessionId))
	}
	delete(s.sessions, req.Msg.SessionId)
	return respond(&posternv1.CloseSQLSessionResponse{}, nil)
}

// ListSessions implements SessionService.
func (s *Server) ListSessions(context.Context, *connect.Request[posternv1.ListSQLSessionsRequest]) (*connect.Response[posternv1.ListSQLSessionsResponse], error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	resp := &posternv1.ListSQLSessionsResponse{}
	for _, session := range s.sessions {
		resp.Sessions = append(resp.Sessions, gproto.CloneOf(session))
	}
	return respond(resp, nil)
}

// HoldSession opens a session as another client would, with a statement under way.
func (s *Server) HoldSession() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.opened++
	id := fmt.Sprintf("ses_%d", s.opened)
	s.sessions[id] = &posternv1.SQLSession{
		Id: id, Source: "warehouse", Agent: "edge-1", Principal: &posternv1.Principal{TokenName: "admin"}, Opened: at(1, 0), LastUsed: at(2, 0),
		IdleTimeout: durationpb.New(10 * time.Minute), Transaction: "open", Statements: 3, QueryId: "qry_1",
	}
}

// Sessions is how many sessions are open.
func (s *Server) Sessions() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.sessions)
}

// EndSessions ends all sessions, as an idle timeout would.
func (s *Server) EndSessions() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.sessions)
}

func noSession(id string) error {
	return proto.Errorf(proto.CodeNotFound, "session %s has ended: it was idle for 10m0s; what was open in it was rolled back", id)
}

// after sets the transaction as a statement with this text leaves it.
func (s *Server) after(id, text string, outcome *posternv1.QueryOutcome) {
	s.mu.Lock()
	defer s.mu.Unlock()
	session := s.sessions[id]
	if session == nil {
		return
	}
	session.QueryId = ""
	first, _, _ := strings.Cut(strings.ToLower(text), " ")
	switch {
	case outcome.Error != nil && session.Transaction == "open":
		session.Transaction = "failed"
	case outcome.Error != nil:
	case first == "begin":
		session.Transaction = "open"
	case first == "commit", first == "rollback":
		session.Transaction = "none"
	}
	outcome.Transaction = session.Transaction
}
