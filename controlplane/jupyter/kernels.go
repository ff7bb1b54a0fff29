package jupyter

import (
	"encoding/json"
	"mime"
	"net/http"
	"path"
	"strings"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// kernelModel is a kernel as Jupyter's API has it.
type kernelModel struct {
	ID           string `json:"id"`
	Name         string `json:"name"`
	LastActivity string `json:"last_activity"`
	State        string `json:"execution_state"`
	Connections  uint32 `json:"connections"`
	Reason       string `json:"reason,omitempty"`
}

func modelOf(k *posternv1.Kernel) kernelModel {
	last := k.GetLastActivity()
	if last == nil {
		last = k.GetStarted()
	}
	return kernelModel{ID: k.GetId(), Name: k.GetSpec(), LastActivity: timeText(last.AsTime()), State: stateOf(k.GetState()), Connections: k.GetConnections(), Reason: k.GetReason()}
}

// stateOf is a kernel's state in Jupyter's words. A kernel that is checkpointed or
// restored answers later, as a busy one does; one that is suspended has no word.
func stateOf(s posternv1.KernelState) string {
	switch s {
	case posternv1.KernelState_KERNEL_STATE_STARTING:
		return "starting"
	case posternv1.KernelState_KERNEL_STATE_IDLE:
		return "idle"
	case posternv1.KernelState_KERNEL_STATE_BUSY, posternv1.KernelState_KERNEL_STATE_CHANGING:
		return "busy"
	case posternv1.KernelState_KERNEL_STATE_DEAD:
		return "dead"
	}
	return "unknown"
}

// here fails unless the kernel of the path is the agent's.
func (s *Server) here(q *request) (string, error) {
	id := q.r.PathValue("kernel")
	where, err := s.cfg.Kernels.Where(q.r.Context(), q.c, id)
	if err == nil && where != q.agent.Id {
		err = proto.Errorf(proto.CodeNotFound, "kernel %.80q is not on agent %s", id, q.agent.Name)
	}
	return id, err
}

// mine are the caller's kernels on the agent; operators see others' only in the API.
func (s *Server) mine(q *request) ([]*posternv1.Kernel, error) {
	list, err := s.cfg.Kernels.List(q.r.Context(), q.c, q.agent.Id)
	if err != nil {
		return nil, err
	}
	if len(list.Silent) > 0 {
		return nil, proto.Errorf(proto.CodeUnavailable, "agent %s does not answer: try again", q.agent.Name)
	}
	var all []*posternv1.Kernel
	for _, k := range list.Kernels {
		if k.Kernel.GetOwner().GetTokenId() != q.c.TokenId {
			continue
		}
		if !k.Online {
			return nil, proto.Errorf(proto.CodeAgentOffline, "agent %s is offline: its kernels go on there", q.agent.Name)
		}
		all = append(all, k.Kernel)
	}
	return all, nil
}

func (s *Server) listKernels(q *request) error {
	list, err := s.mine(q)
	if err != nil {
		return err
	}
	models := make([]kernelModel, len(list))
	for i, k := range list {
		models[i] = modelOf(k)
	}
	writeJSON(q.w, http.StatusOK, models)
	return nil
}

func (s *Server) startKernel(q *request) error {
	var asked struct {
		Name string         `json:"name"`
		Env  map[string]any `json:"env"`
	}
	if err := q.body(&asked); err != nil {
		return err
	}
	environment := map[string]string{}
	for name, value := range asked.Env {
		text, ok := value.(string)
		if !ok {
			return proto.Errorf(proto.CodeInvalid, "the environment's %.80q is no text", name)
		}
		environment[name] = text
	}
	k, err := s.cfg.Kernels.Start(q.r.Context(), q.c, q.agent.Id, asked.Name, environment)
	if err != nil {
		return err
	}
	q.w.Header().Set("Location", q.base+"/api/kernels/"+k.Kernel.Id)
	writeJSON(q.w, http.StatusCreated, modelOf(k.Kernel))
	return nil
}

func (s *Server) getKernel(q *request) error {
	id, err := s.here(q)
	if err != nil {
		return err
	}
	k, err := s.cfg.Kernels.Get(q.r.Context(), q.c, id)
	if err != nil {
		return err
	}
	writeJSON(q.w, http.StatusOK, modelOf(k.Kernel))
	return nil
}

func (s *Server) stopKernel(q *request) error {
	id, err := s.here(q)
	if err == nil {
		err = s.cfg.Kernels.Stop(q.r.Context(), q.c, id)
	}
	if err == nil {
		q.w.WriteHeader(http.StatusNoContent)
	}
	return err
}

func (s *Server) interruptKernel(q *request) error {
	id, err := s.here(q)
	if err == nil {
		_, err = s.cfg.Kernels.Interrupt(q.r.Context(), q.c, id)
	}
	if err == nil {
		q.w.WriteHeader(http.StatusNoContent)
	}
	return err
}

func (s *Server) restartKernel(q *request) error {
	id, err := s.here(q)
	if err != nil {
		return err
	}
	k, err := s.cfg.Kernels.Restart(q.r.Context(), q.c, id)
	if err != nil {
		return err
	}
	writeJSON(q.w, http.StatusOK, modelOf(k.Kernel))
	return nil
}

// specModel is a kernelspec as Jupyter's API has it.
func (q *request) specModel(spec *posternv1.KernelSpec) map[string]any {
	inner := map[string]any{}
	if spec.MetadataJson != "" {
		if err := json.Unmarshal([]byte(spec.MetadataJson), &inner); err != nil || inner == nil {
			inner = map[string]any{}
		}
	}
	// What runs on the host is the host's: clients only want the fields to be there.
	inner["argv"], inner["env"] = []string{}, map[string]string{}
	inner["display_name"], inner["language"] = spec.DisplayName, spec.Language
	if spec.InterruptMode != "" {
		inner["interrupt_mode"] = spec.InterruptMode
	}
	if inner["metadata"] == nil {
		inner["metadata"] = map[string]any{}
	}
	resources := map[string]string{}
	for file := range spec.Resources {
		resources[strings.TrimSuffix(file, path.Ext(file))] = q.base + "/kernelspecs/" + spec.Name + "/" + file
	}
	return map[string]any{"name": spec.Name, "spec": inner, "resources": resources}
}

func (s *Server) getSpecs(q *request) error {
	list, err := s.cfg.Kernels.Specs(q.r.Context(), q.c, q.agent.Id)
	if err != nil {
		return err
	}
	all := map[string]any{}
	for _, spec := range list.Specs {
		all[spec.Name] = q.specModel(spec)
	}
	writeJSON(q.w, http.StatusOK, map[string]any{"default": list.Default, "kernelspecs": all})
	return nil
}

func (s *Server) spec(q *request) (*posternv1.KernelSpec, error) {
	list, err := s.cfg.Kernels.Specs(q.r.Context(), q.c, q.agent.Id)
	if err != nil {
		return nil, err
	}
	for _, spec := range list.Specs {
		if spec.Name == q.r.PathValue("name") {
			return spec, nil
		}
	}
	return nil, proto.Errorf(proto.CodeNotFound, "agent %s offers no kernelspec %.80q", q.agent.Name, q.r.PathValue("name"))
}

func (s *Server) getSpec(q *request) error {
	spec, err := s.spec(q)
	if err != nil {
		return err
	}
	writeJSON(q.w, http.StatusOK, q.specModel(spec))
	return nil
}

func (s *Server) getResource(q *request) error {
	spec, err := s.spec(q)
	if err != nil {
		return err
	}
	file := q.r.PathValue("file")
	content, ok := spec.Resources[file]
	if !ok {
		return proto.Errorf(proto.CodeNotFound, "kernelspec %s has no file %.80q", spec.Name, file)
	}
	// The files are the host's: nothing of them is to be run in a page of ours.
	kind := mime.TypeByExtension(path.Ext(file))
	if !strings.HasPrefix(kind, "image/") {
		kind = "application/octet-stream"
	}
	h := q.w.Header()
	h.Set("Content-Type", kind)
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; sandbox")
	q.w.WriteHeader(http.StatusOK)
	q.w.Write(content) //nolint:errcheck // the client has gone
	return nil
}
