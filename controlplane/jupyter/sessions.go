package jupyter

import (
	"context"
	"net/http"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/jupyter"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// sessionBody is what clients send of a session.
type sessionBody struct {
	Path   *string `json:"path"`
	Name   *string `json:"name"`
	Type   *string `json:"type"`
	Kernel struct {
		ID   *string `json:"id"`
		Name *string `json:"name"`
	} `json:"kernel"`
	// Notebook is how older clients say the path.
	Notebook struct {
		Path *string `json:"path"`
	} `json:"notebook"`
}

func sessionModel(one Session, k *posternv1.Kernel) map[string]any {
	model := map[string]any{"id": one.ID, "path": one.Path, "name": one.Name, "type": one.Type, "kernel": modelOf(k)}
	if one.Type == "notebook" {
		model["notebook"] = map[string]string{"path": one.Path, "name": one.Name}
	}
	return model
}

// living are the caller's sessions on the agent, with their kernels.
func (s *Server) living(q *request) ([]Session, map[string]*posternv1.Kernel, error) {
	list, err := s.mine(q)
	if err != nil {
		return nil, nil, err
	}
	kernels := map[string]*posternv1.Kernel{}
	for _, k := range list {
		kernels[k.Id] = k
	}
	all, err := s.cfg.Sessions.Sessions(q.r.Context(), q.c.Principal, q.agent.Id)
	if err != nil {
		return nil, nil, err
	}
	var living []Session
	for _, one := range all {
		if kernels[one.Kernel] != nil { // others are about to be forgotten
			living = append(living, one)
		}
	}
	return living, kernels, nil
}

func (s *Server) listSessions(q *request) error {
	all, kernels, err := s.living(q)
	if err != nil {
		return err
	}
	models := make([]map[string]any, len(all))
	for i, one := range all {
		models[i] = sessionModel(one, kernels[one.Kernel])
	}
	writeJSON(q.w, http.StatusOK, models)
	return nil
}

func (s *Server) session(q *request) (Session, *posternv1.Kernel, error) {
	all, kernels, err := s.living(q)
	if err != nil {
		return Session{}, nil, err
	}
	for _, one := range all {
		if one.ID == q.r.PathValue("session") {
			return one, kernels[one.Kernel], nil
		}
	}
	return Session{}, nil, proto.Errorf(proto.CodeNotFound, "session %.80q not found", q.r.PathValue("session"))
}

func (s *Server) getSession(q *request) error {
	one, k, err := s.session(q)
	if err != nil {
		return err
	}
	writeJSON(q.w, http.StatusOK, sessionModel(one, k))
	return nil
}

// take fills in what a client said.
func (b *sessionBody) take(one *Session) {
	for _, f := range []struct {
		from *string
		to   *string
	}{{b.Notebook.Path, &one.Path}, {b.Path, &one.Path}, {b.Name, &one.Name}, {b.Type, &one.Type}} {
		if f.from != nil {
			*f.to = *f.from
		}
	}
}

// kernel is the kernel that a client wants in a session: one that is there, or a new
// one, and nil if it says nothing of it. made says that it is new.
func (s *Server) kernel(q *request, b *sessionBody) (k *posternv1.Kernel, made bool, err error) {
	if b.Kernel.ID != nil && *b.Kernel.ID != "" {
		where, err := s.cfg.Kernels.Where(q.r.Context(), q.c, *b.Kernel.ID)
		if err == nil && where != q.agent.Id {
			err = proto.Errorf(proto.CodeNotFound, "kernel %.80q is not on agent %s", *b.Kernel.ID, q.agent.Name)
		}
		if err != nil {
			return nil, false, err
		}
		got, err := s.cfg.Kernels.Get(q.r.Context(), q.c, *b.Kernel.ID)
		return got.GetKernel(), false, err
	}
	if b.Kernel.Name == nil {
		return nil, false, nil
	}
	got, err := s.cfg.Kernels.Start(q.r.Context(), q.c, q.agent.Id, *b.Kernel.Name, nil)
	return got.GetKernel(), err == nil, err
}

// keep keeps a session; a kernel that was made for it goes if that fails.
func (s *Server) keep(q *request, one Session, made bool) error {
	err := s.cfg.Sessions.PutSession(q.r.Context(), q.c.Principal, q.agent.Id, one)
	if err != nil && made {
		if serr := s.cfg.Kernels.Stop(context.WithoutCancel(q.r.Context()), q.c, one.Kernel); serr != nil {
			s.cfg.Logger.Warn("kernel of a session that was not kept is not stopped", "kernel", one.Kernel, "err", serr)
		}
	}
	return err
}

func (s *Server) startSession(q *request) error {
	var b sessionBody
	if err := q.body(&b); err != nil {
		return err
	}
	one := Session{ID: jupyter.NewID(), Type: "notebook"}
	b.take(&one)
	if one.Path == "" {
		return proto.Errorf(proto.CodeInvalid, "the request has no path for the session")
	}
	all, kernels, err := s.living(q)
	if err != nil {
		return err
	}
	for _, there := range all {
		if there.Path == one.Path && there.Type == one.Type {
			s.created(q, there, kernels[there.Kernel])
			return nil
		}
	}
	k, made, err := s.kernel(q, &b)
	if err == nil && k == nil {
		name := ""
		b.Kernel.Name = &name // the default
		k, made, err = s.kernel(q, &b)
	}
	if err != nil {
		return err
	}
	one.Kernel = k.Id
	if err := s.keep(q, one, made); err != nil {
		return err
	}
	s.created(q, one, k)
	return nil
}

func (s *Server) created(q *request, one Session, k *posternv1.Kernel) {
	q.w.Header().Set("Location", q.base+"/api/sessions/"+one.ID)
	writeJSON(q.w, http.StatusCreated, sessionModel(one, k))
}

func (s *Server) changeSession(q *request) error {
	var b sessionBody
	if err := q.body(&b); err != nil {
		return err
	}
	one, k, err := s.session(q)
	if err != nil {
		return err
	}
	before := one.Kernel
	b.take(&one)
	other, made, err := s.kernel(q, &b)
	if err != nil {
		return err
	}
	if other != nil {
		one.Kernel, k = other.Id, other
	}
	if err := s.keep(q, one, made); err != nil {
		return err
	}
	if one.Kernel != before { // as a Jupyter server does
		if err := s.cfg.Kernels.Stop(q.r.Context(), q.c, before); err != nil && proto.CodeOf(err) != proto.CodeNotFound {
			return err
		}
	}
	writeJSON(q.w, http.StatusOK, sessionModel(one, k))
	return nil
}

func (s *Server) stopSession(q *request) error {
	one, _, err := s.session(q)
	if err != nil {
		return err
	}
	// The kernel first: a session is what finds it again.
	if err := s.cfg.Kernels.Stop(q.r.Context(), q.c, one.Kernel); err != nil && proto.CodeOf(err) != proto.CodeNotFound {
		return err
	}
	if err := s.cfg.Sessions.DeleteSession(q.r.Context(), q.c.Principal, q.agent.Id, one.ID); err != nil && proto.CodeOf(err) != proto.CodeNotFound {
		return err
	}
	q.w.WriteHeader(http.StatusNoContent)
	return nil
}
