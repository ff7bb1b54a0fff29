package workspace_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	protobuf "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/controlplane/blob"
	"github.com/postern-dev/postern/controlplane/filekey"
	"github.com/postern-dev/postern/controlplane/pki"
	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/controlplane/workspace"
	"github.com/postern-dev/postern/e2e/storetest"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	"github.com/postern-dev/postern/proto/filechunk"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

var ctx = context.Background()

type always struct{}

func (always) Allow(string) bool { return true }

type agentKey struct{}

type callerKey struct{}

// kit is a service on a real store and a real directory, behind HTTP.
type kit struct {
	t      testing.TB
	store  *store.Store
	blobs  *blob.Store
	dir    string
	s      *workspace.Service
	server *httptest.Server
	org    string

	// organizationNodes bounds the nodes of an organization; 0: no limit.
	organizationNodes uint64
	// grace is how long chunks wait that nothing refers to; 0: a day.
	grace time.Duration
	// ask answers for agents; nil: they are offline.
	ask func(agent string) (*posternv1.GetAttachStatusResponse, error)

	// agents are registered agents' names by id, as the store does not know ours.
	agents map[string]string

	mu    sync.Mutex
	audit []auditchain.Entry
}

// agentNames are who may say to be an agent, by a header.
const agentHeader, userHeader = "X-Agent", "X-User"

func newKit(t testing.TB, s *store.Store) *kit {
	t.Helper()
	o, err := s.CreateOrganization(ctx, "acme", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	k := &kit{t: t, store: s, dir: filepath.Join(storetest.Dir(t), "blob"), org: o.Id}
	k.open("")
	return k
}

// open starts the service; where is the object store, or empty for a directory.
func (k *kit) open(where string) {
	k.t.Helper()
	k.start(where, slog.New(slog.NewTextHandler(testWriter{k.t}, nil)))
	k.t.Cleanup(k.close)
}

func (k *kit) start(where string, serviceLog *slog.Logger) {
	t := k.t
	t.Helper()
	ca, err := pki.Open(ctx, pki.Config{Store: k.store, MasterKeyFile: filepath.Join(filepath.Dir(k.dir), "master.key")})
	if err != nil {
		t.Fatal(err)
	}
	if where == "" {
		where = k.dir
	}
	log := slog.New(slog.DiscardHandler)
	k.blobs, err = blob.Open(ctx, where, blob.Config{Logger: log, Index: k.store, Grace: k.grace, Keys: filekey.New(k.store, ca.Keys())})
	if err != nil {
		t.Fatal(err)
	}
	k.s = workspace.New(workspace.Config{
		Logger: serviceLog, Store: kitStore{k.store, k}, Chunks: k.blobs, Ops: always{}, OrganizationNodes: k.organizationNodes, SignOfLife: 200 * time.Millisecond,
		Ask: func(_ context.Context, agent string, _ *posternv1.GetAttachStatusRequest) (*posternv1.GetAttachStatusResponse, error) {
			if k.ask == nil {
				return nil, proto.Errorf(proto.CodeAgentOffline, "offline")
			}
			return k.ask(agent)
		},
		Append: func(_ context.Context, entries []auditchain.Entry) error {
			k.mu.Lock()
			defer k.mu.Unlock()
			k.audit = append(k.audit, entries...)
			return nil
		},
		Caller: func(ctx context.Context) workspace.Caller { return ctx.Value(callerKey{}).(workspace.Caller) },
		Agent:  func(ctx context.Context) workspace.Agent { return ctx.Value(agentKey{}).(workspace.Agent) },
	})
	mux := http.NewServeMux()
	mux.Handle(k.s.FileHandler())
	mux.HandleFunc("/api/v1/files/{workspace}/{path...}", k.s.ServeFile)
	mux.HandleFunc("/api/v1/archive/{workspace}/{path...}", k.s.ServeArchive)
	mux.HandleFunc("POST /api/v1/chunks/{workspace}", k.s.ServeChunks)
	agents := k.s.AgentHandler()
	k.server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		org := k.org
		if o := r.Header.Get("X-Org"); o != "" {
			org = o
		}
		if name := r.Header.Get(agentHeader); name != "" {
			agents.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), agentKey{}, workspace.Agent{Organization: org, ID: "agt_" + name, Name: name})))
			return
		}
		p := &posternv1.Principal{Organization: org, TokenId: "tok_1", TokenName: "ana", Role: "analyst"}
		mux.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), callerKey{}, workspace.Caller{Principal: p, Remote: "192.0.2.1"})))
	}))
}

func (k *kit) close() {
	if k.server == nil {
		return
	}
	k.s.Close()
	k.server.Close()
	k.server = nil
	if err := k.blobs.Close(); err != nil {
		k.t.Error(err)
	}
}

// kitStore is the store with other agents.
type kitStore struct {
	*store.Store
	k *kit
}

func (s kitStore) FindAgent(_ context.Context, _, id string) (*posternv1.Agent, error) {
	if name, ok := s.k.agents[id]; ok {
		return &posternv1.Agent{Id: id, Name: name}, nil
	}
	return nil, proto.Errorf(proto.CodeNotFound, "no agent %s", id)
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(string(bytes.TrimSpace(p)))
	return len(p), nil
}

// headers adds headers to requests.
type headers struct {
	http.RoundTripper
	add map[string]string
}

func (h headers) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	for name, value := range h.add {
		r.Header.Set(name, value)
	}
	return h.RoundTripper.RoundTrip(r)
}

func (k *kit) client(add map[string]string) *http.Client {
	return &http.Client{Transport: headers{k.server.Client().Transport, add}}
}

func (k *kit) files() posternv1connect.FileServiceClient {
	return posternv1connect.NewFileServiceClient(k.client(nil), k.server.URL)
}

// host is an agent with a mount.
type host struct {
	*kit
	name string
	posternv1connect.AttachServiceClient
	http  *http.Client
	id    string // workspace
	mount string
	op    uint64
	next  uint64
	opens *posternv1.OpenWorkspaceResponse
}

func (k *kit) host(name, ws string) *host {
	k.t.Helper()
	h := k.agent(name)
	h.mount = "mount-of-" + name
	h.reopen(ws)
	r, err := h.ReserveIDs(ctx, connect.NewRequest(&posternv1.ReserveIDsRequest{WorkspaceId: h.id, MountId: h.mount, Count: 20000}))
	if err != nil {
		k.t.Fatal(err)
	}
	h.next = r.Msg.First
	return h
}

func (k *kit) agent(name string) *host {
	c := k.client(map[string]string{agentHeader: name})
	return &host{kit: k, name: name, http: c, AttachServiceClient: posternv1connect.NewAttachServiceClient(c, k.server.URL)}
}

func (h *host) reopen(ws string) {
	h.t.Helper()
	r, err := h.OpenWorkspace(ctx, connect.NewRequest(&posternv1.OpenWorkspaceRequest{Name: ws, MountId: h.mount}))
	if err != nil {
		h.t.Fatal(err)
	}
	h.id, h.op, h.opens = r.Msg.WorkspaceId, r.Msg.LastOp, r.Msg
}

func (h *host) newID() uint64 { h.next++; return h.next - 1 }

func (h *host) try(ops ...*posternv1.FileOp) (*posternv1.CommitResponse, error) {
	for i, op := range ops {
		op.Number, op.TimeNs = h.op+uint64(i)+1, time.Now().UnixNano()
	}
	r, err := h.Commit(ctx, connect.NewRequest(&posternv1.CommitRequest{WorkspaceId: h.id, MountId: h.mount, Ops: ops}))
	if err != nil {
		return nil, err
	}
	h.op += uint64(len(r.Msg.Results))
	return r.Msg, nil
}

// do commits operations that must all be answered.
func (h *host) do(ops ...*posternv1.FileOp) []*posternv1.FileOpResult {
	h.t.Helper()
	r, err := h.try(ops...)
	if err != nil {
		h.t.Fatal(err)
	}
	if len(r.Results) != len(ops) {
		h.t.Fatalf("%d results for %d operations", len(r.Results), len(ops))
	}
	return r.Results
}

// ok commits operations that must all be applied without a conflict.
func (h *host) ok(ops ...*posternv1.FileOp) []*posternv1.FileOpResult {
	h.t.Helper()
	results := h.do(ops...)
	for i, r := range results {
		if r.RefusedCode != "" || r.Conflict != nil {
			h.t.Fatalf("operation %v: %v", ops[i], r)
		}
	}
	return results
}

func create(id, parent uint64, name string, kind posternv1.NodeType) *posternv1.FileOp {
	return &posternv1.FileOp{Op: &posternv1.FileOp_Create_{Create: &posternv1.FileOp_Create{Parent: parent, Name: []byte(name), Node: &posternv1.Node{Id: id, Type: kind, Mode: 0o644}}}}
}

func write(id, base uint64, text string) *posternv1.FileOp {
	return &posternv1.FileOp{Op: &posternv1.FileOp_SetContent_{SetContent: &posternv1.FileOp_SetContent{Id: id, BaseVersion: base, Size: uint64(len(text)), Inline: []byte(text)}}}
}

func remove(id, parent uint64, name string) *posternv1.FileOp {
	return &posternv1.FileOp{Op: &posternv1.FileOp_Remove_{Remove: &posternv1.FileOp_Remove{Id: id, Parent: parent, Name: []byte(name)}}}
}

func rename(id, parent uint64, name string, newParent uint64, newName string, replaces uint64) *posternv1.FileOp {
	return &posternv1.FileOp{Op: &posternv1.FileOp_Rename_{Rename: &posternv1.FileOp_Rename{Id: id, Parent: parent, Name: []byte(name), NewParent: newParent, NewName: []byte(newName), Replaces: replaces}}}
}

const (
	isFile = posternv1.NodeType_NODE_TYPE_FILE
	isDir  = posternv1.NodeType_NODE_TYPE_DIRECTORY
	isLink = posternv1.NodeType_NODE_TYPE_SYMLINK
)

// put stores content by HTTP.
func (k *kit) put(ws, path, content string, header ...string) *http.Response {
	k.t.Helper()
	req, err := http.NewRequest(http.MethodPut, k.server.URL+"/api/v1/files/"+ws+path, bytes.NewReader([]byte(content)))
	if err != nil {
		k.t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := k.client(nil).Do(req)
	if err != nil {
		k.t.Fatal(err)
	}
	defer resp.Body.Close() //nolint:errcheck // read
	if resp.StatusCode != http.StatusCreated {
		k.t.Fatalf("put %s: %v", path, proto.ReadHTTPError(resp))
	}
	return resp
}

// get reads a file by HTTP.
func (k *kit) get(ws, path string, header ...string) (string, *http.Response) {
	k.t.Helper()
	req, err := http.NewRequest(http.MethodGet, k.server.URL+"/api/v1/files/"+ws+path, nil)
	if err != nil {
		k.t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := k.client(nil).Do(req)
	if err != nil {
		k.t.Fatal(err)
	}
	defer resp.Body.Close() //nolint:errcheck // read
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		k.t.Fatalf("get %s: %v", path, err)
	}
	return string(body), resp
}

// want checks a file's content.
func (k *kit) want(ws, path, content string) {
	k.t.Helper()
	got, resp := k.get(ws, path)
	if resp.StatusCode != http.StatusOK || got != content {
		k.t.Fatalf("%s%s: %s, %d bytes %.60q, want %d bytes %.60q", ws, path, resp.Status, len(got), got, len(content), content)
	}
}

// tree lists a workspace: paths in order, directories with a slash at the end.
func (k *kit) tree(ws string) []string {
	k.t.Helper()
	var all []string
	var token []byte
	for {
		r, err := k.files().ListFiles(ctx, connect.NewRequest(&posternv1.ListFilesRequest{Workspace: ws, Path: []byte("/"), Recursive: true, PageToken: token}))
		if err != nil {
			k.t.Fatal(err)
		}
		for _, f := range r.Msg.Files {
			path := string(f.Path)
			if f.Node.Type == isDir {
				path += "/"
			}
			all = append(all, path)
		}
		if token = r.Msg.NextPageToken; len(token) == 0 {
			return all
		}
	}
}

// send stores chunks as an agent and returns their names.
func (h *host) send(chunks ...[]byte) ([][]byte, error) {
	var body bytes.Buffer
	for _, c := range chunks {
		if err := filechunk.WriteFrame(&body, c); err != nil {
			return nil, err
		}
	}
	resp, err := h.http.Post(h.server.URL+"/postern/v1/attach/"+h.id+"/store", "", &body)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close() //nolint:errcheck // read
	if resp.StatusCode != http.StatusOK {
		return nil, proto.ReadHTTPError(resp)
	}
	encoded, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	var r posternv1.StoreChunksResponse
	err = protobuf.Unmarshal(encoded, &r)
	return r.Hashes, err
}

// fetch gets chunks as an agent.
func (h *host) fetch(names ...[]byte) ([][]byte, error) {
	body, err := protobuf.Marshal(&posternv1.FetchChunksRequest{Hashes: names})
	if err != nil {
		return nil, err
	}
	resp, err := h.http.Post(h.server.URL+"/postern/v1/attach/"+h.id+"/fetch", "application/proto", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close() //nolint:errcheck // read
	if resp.StatusCode != http.StatusOK {
		return nil, proto.ReadHTTPError(resp)
	}
	var all [][]byte
	for range names {
		chunk, err := filechunk.ReadFrame(resp.Body, make([]byte, filechunk.Size))
		if err != nil {
			return nil, fmt.Errorf("frame %d: %w", len(all), err)
		}
		all = append(all, chunk)
	}
	return all, nil
}

func wantCode(t testing.TB, err error, want proto.Code) {
	t.Helper()
	if proto.CodeOf(err) != want {
		t.Fatalf("got error %v (%v), want %v", err, proto.CodeOf(err), want)
	}
}
