package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/dynamicpb"

	"github.com/postern-dev/postern/e2e/simulatedkernels"
	"github.com/postern-dev/postern/e2e/storetest"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

// furnished is an organization that has one of everything.
type furnished struct {
	id, name, token string
	agent           *simulatedAgent
	principal       *posternv1.Principal
	// things are what requests can refer to, by kind, each in every form that it can be named.
	things map[string][]string
}

// furnish makes an organization with an agent, a kernel and so on.
func furnish(t *testing.T, s *testServer, name string) *furnished {
	t.Helper()
	ctx := t.Context()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	org, err := posternv1connect.NewOrganizationServiceClient(as(s.token), s.url).CreateOrganization(ctx, connect.NewRequest(&posternv1.CreateOrganizationRequest{Name: name}))
	must(err)
	f := &furnished{id: org.Msg.Organization.Id, name: name, token: org.Msg.AdminToken}
	client := as(f.token)
	who, err := posternv1connect.NewIdentityServiceClient(client, s.url).WhoAmI(ctx, connect.NewRequest(&posternv1.WhoAmIRequest{}))
	must(err)
	f.principal = &posternv1.Principal{Organization: f.id, TokenId: who.Msg.TokenId, TokenName: who.Msg.TokenName, Role: "admin"}

	host := simulatedkernels.New()
	t.Cleanup(host.Close)
	f.agent = newSimulatedAgent(s)
	f.agent.kernels = hostWithoutCheckpoints{host}
	must(f.agent.register(ctx, s.newKey(t, f.token, 1), "host-"+name))
	f.agent.answer(func(context.Context, *posternv1.SQLRequest, io.Writer) *posternv1.QueryOutcome {
		return &posternv1.QueryOutcome{Rows: 1}
	})
	f.agent.attach(t)

	kernel, err := posternv1connect.NewKernelServiceClient(client, s.url).StartKernel(ctx, connect.NewRequest(&posternv1.StartAgentKernelRequest{Agent: f.agent.name}))
	must(err)
	_, outcome, err := s.run(ctx, f.token, f.agent.name+"/shop", `{"sql":"select '`+name+`-canary'"}`)
	must(err)
	token := s.newToken(t, f.token, "token-"+name, "analyst")
	key := s.newKey(t, f.token, 1)
	_, err = posternv1connect.NewSecretServiceClient(client, s.url).SetSecret(ctx, connect.NewRequest(&posternv1.SetSecretRequest{
		Ref:   &posternv1.SecretRef{Name: strings.ToUpper(name) + "_SECRET", Scope: posternv1.SecretScope_SECRET_SCOPE_ORGANIZATION},
		Value: []byte(name + "-canary-secret"),
	}))
	must(err)
	files := posternv1connect.NewFileServiceClient(client, s.url)
	ws, err := files.CreateWorkspace(ctx, connect.NewRequest(&posternv1.CreateWorkspaceRequest{Name: "space-" + name}))
	must(err)
	_, err = files.CommitFile(ctx, connect.NewRequest(&posternv1.CommitFileRequest{Workspace: ws.Msg.Name, Path: []byte("/file"), Size: uint64(len(name + "-canary-file")), Inline: []byte(name + "-canary-file")}))
	must(err)
	snapshot, err := files.CreateSnapshot(ctx, connect.NewRequest(&posternv1.CreateSnapshotRequest{Workspace: ws.Msg.Name, Name: "snap-" + name}))
	must(err)
	f.things = map[string][]string{
		"agent":        {f.agent.name, f.agent.id},
		"kernel":       {kernel.Msg.Kernel.Id},
		"query":        {outcome.QueryId},
		"token":        {"token-" + name, strings.Split(token, "_")[1]},
		"key":          {key.ID},
		"organization": {f.id, name},
		"workspace":    {ws.Msg.Name, ws.Msg.Id},
		"snapshot":     {snapshot.Msg.Name, snapshot.Msg.Id},
		"secret":       {strings.ToUpper(name) + "_SECRET"},
		// What only hosts know: they are told whose request it is, and of a kernel's owner.
		"session":    {proto.NewID("ses")},
		"checkpoint": {proto.NewID("ckp")},
	}
	return f
}

// hostWithoutCheckpoints has kernels, and none of the checkpoints that it is asked for.
type hostWithoutCheckpoints struct{ *simulatedkernels.Host }

// Handle implements what simulatedAgent wants of kernels.
func (h hostWithoutCheckpoints) Handle(mux *http.ServeMux) {
	h.Host.Handle(mux)
	mux.HandleFunc("/postern.v1.CheckpointHostService/", func(w http.ResponseWriter, r *http.Request) {
		connect.NewErrorWriter().Write(w, r, proto.ConnectError(proto.Errorf(proto.CodeNotFound, "this checkpoint is not there")))
	})
}

// absent is a name of the same form that nothing has.
func absent(name string) string {
	b := []byte(name)
	swap := map[byte]byte{'0': '1', 'a': 'b', 'A': 'B', '-': '-', '_': '_'}
	last := len(b) - 1
	if to, ok := swap[b[last]]; ok {
		b[last] = to
		return string(b)
	}
	switch c := b[last]; {
	case c >= '1' && c <= '9':
		b[last] = '0'
	case c >= 'a' && c <= 'z':
		b[last] = 'a'
	default:
		b[last] = 'A'
	}
	return string(b)
}

// references are fields of requests that name a thing, by their path, and what kind it is of.
var references = map[string]string{
	"agent": "agent", "agents": "agent", "kernel_id": "kernel", "checkpoint_id": "checkpoint",
	"query_id": "query", "key_id": "key", "token": "token", "organization": "organization", "session_id": "session",
	"workspace": "workspace", "files.workspace": "workspace", "mounts.workspace": "workspace", "ref.workspace": "workspace",
	"snapshot": "snapshot", "ref.name": "secret", "secrets": "secret",
}

// contents are fields of requests that name nothing that somebody could own, and what they hold
// here.
var contents = map[string]any{
	"source": "shop", "role": "viewer", "name": "made-here", "spec": "", "label": "label", "cell": "cell", "force": true, "on": true, "set_agents": true,
	"schema": "", "table": "", "page_token": "", "one_time_token": "", "cells.id": "one", "cells.source": "1", "value": []byte("long-enough-value"),
	"path": []byte("/file"), "from": []byte("/file"), "to": []byte("/moved"), "files.path": []byte("/other"),
	"files.inline": []byte("x"), "inline": []byte("x"), "size": uint64(1), "files.size": uint64(1),
	"hashes": nil, "chunks": nil, "files.chunks": nil, "symlink": nil, "files.symlink": nil, "base_version": nil, "files.base_version": nil,
}

// instead are fields of which a request may have one: by procedure and field, those that must not be
// there with it.
var instead = map[string]map[string][]string{
	posternv1connect.SecretServiceGrantSecretProcedure:    {"kernel_id": {"token"}},
	posternv1connect.NotebookServiceSyncNotebookProcedure: {"kernel_id": {"agent", "mounts.workspace"}},
}

// filledIn are fields that the control plane fills in: a request that has one is refused.
var filledIn = map[string]bool{"principal": true, "new_kernel_id": true}

// request fills a request: refs are what its references name, by path; only those in it are set. The
// field that usurp names is what the control plane fills in.
func request(t *testing.T, procedure string, md protoreflect.MessageDescriptor, refs map[string]string, usurp string, as *furnished) *dynamicpb.Message {
	t.Helper()
	var fill func(m protoreflect.Message, prefix string)
	fill = func(m protoreflect.Message, prefix string) {
		fields := m.Descriptor().Fields()
		for i := range fields.Len() {
			f := fields.Get(i)
			path := prefix + string(f.Name())
			if f.IsMap() || filledIn[path] && path != usurp {
				continue
			}
			if path == "new_kernel_id" {
				m.Set(f, protoreflect.ValueOf(as.things["kernel"][0]))
				continue
			}
			if f.Kind() == protoreflect.MessageKind {
				switch name := f.Message().FullName(); {
				case name == principalName:
					p := as.principal.ProtoReflect()
					sub := m.Mutable(f).Message()
					p.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
						sub.Set(sub.Descriptor().Fields().ByName(fd.Name()), v)
						return true
					})
				case name.Parent() != "postern.v1":
				case f.IsList():
					if anySet(refs, path+".") || !anyReference(f.Message(), path+".") {
						fill(m.Mutable(f).List().AppendMutable().Message(), path+".")
					}
				default:
					fill(m.Mutable(f).Message(), path+".")
				}
				continue
			}
			var value protoreflect.Value
			if _, ok := references[path]; ok {
				v, set := refs[path]
				if !set {
					continue
				}
				value = protoreflect.ValueOf(v)
			} else {
				content, known := contents[path]
				if !known {
					if f.Kind() == protoreflect.StringKind || f.Kind() == protoreflect.BytesKind {
						t.Fatalf("%s: say in this test whether the field %s of %s names a thing that somebody owns", procedure, path, md.Name())
					}
					if path == "ref.scope" && refs["ref.workspace"] != "" {
						value = protoreflect.ValueOfEnum(posternv1.SecretScope_SECRET_SCOPE_WORKSPACE.Number())
						m.Set(f, value)
					}
					continue
				}
				if s, isString := content.(string); isString && f.Kind() == protoreflect.BytesKind {
					content = []byte(s)
				}
				_, isBytes := content.([]byte)
				if content == nil || isBytes && f.Kind() != protoreflect.BytesKind {
					continue // the sequence number that a list begins from, say
				}
				value = protoreflect.ValueOf(content)
			}
			if f.IsList() {
				m.Mutable(f).List().Append(value)
			} else {
				m.Set(f, value)
			}
		}
	}
	m := dynamicpb.NewMessage(md)
	fill(m, "")
	return m
}

const principalName = "postern.v1.Principal"

func anySet(refs map[string]string, prefix string) bool {
	for path := range refs {
		if strings.HasPrefix(path, prefix) {
			return true
		}
	}
	return false
}

func anyReference(md protoreflect.MessageDescriptor, prefix string) bool {
	return len(referencesOf(md, prefix)) > 0
}

// referencesOf are the paths of a message's references.
func referencesOf(md protoreflect.MessageDescriptor, prefix string) []string {
	var all []string
	for i := range md.Fields().Len() {
		f := md.Fields().Get(i)
		path := prefix + string(f.Name())
		if f.Kind() == protoreflect.MessageKind && !f.IsMap() {
			if f.Message().FullName().Parent() == "postern.v1" && f.Message().FullName() != principalName {
				all = append(all, referencesOf(f.Message(), path+".")...)
			}
		} else if references[path] != "" {
			all = append(all, path)
		}
	}
	return all
}

// reply is an answer of which nothing depends on what was named.
type reply struct {
	status int
	code   string
	header string
	body   string
}

var detailValue = regexp.MustCompile(`"value":"([A-Za-z0-9+/=_-]*)"`)

// neutral is an answer without the name that the request had, and without the time.
func neutral(resp *http.Response, body []byte, named []string) reply {
	body = detailValue.ReplaceAllFunc(body, func(m []byte) []byte {
		raw, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(string(detailValue.FindSubmatch(m)[1]), "="))
		if err != nil {
			return m
		}
		return fmt.Appendf(nil, `"value":%q`, raw)
	})
	text := string(body)
	header := resp.Header.Clone()
	header.Del("Date")
	var b bytes.Buffer
	header.Write(&b) //nolint:errcheck // a buffer
	h := b.String()
	for _, name := range named {
		text, h = strings.ReplaceAll(text, name, "NAMED"), strings.ReplaceAll(h, name, "NAMED")
	}
	r := reply{status: resp.StatusCode, header: h, body: text}
	if m := regexp.MustCompile(`"code": ?"([a-z_]+)"`).FindStringSubmatch(text); m != nil {
		r.code = m[1]
	}
	return r
}

// callRPC calls a procedure with JSON.
func callRPC(t *testing.T, client *http.Client, url, procedure string, streams bool, m *dynamicpb.Message, named []string) reply {
	t.Helper()
	body, err := protojson.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	contentType := "application/json"
	if streams {
		contentType = "application/connect+json"
		body = append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(body))), body...)
	}
	return send(t, client, http.MethodPost, url+procedure, http.Header{"Content-Type": {contentType}}, body, named)
}

// send sends a request until it is not one too many in a second.
func send(t *testing.T, client *http.Client, method, url string, header http.Header, body []byte, named []string) reply {
	t.Helper()
	for {
		req, err := http.NewRequestWithContext(t.Context(), method, url, bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header = header.Clone()
		resp, err := client.Do(req)
		if err != nil {
			t.Fatalf("%s %s: %v", method, url, err)
		}
		answer, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			t.Fatalf("%s %s: %v", method, url, err)
		}
		if resp.StatusCode != http.StatusTooManyRequests && !bytes.Contains(answer, []byte("resource_exhausted")) {
			return neutral(resp, answer, named)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// procedures are those of services, by their full names.
func procedures(services func(name string) bool) map[string]protoreflect.MethodDescriptor {
	all := map[string]protoreflect.MethodDescriptor{}
	protoregistry.GlobalFiles.RangeFiles(func(fd protoreflect.FileDescriptor) bool {
		for i := range fd.Services().Len() {
			service := fd.Services().Get(i)
			if fd.Package() != "postern.v1" || !services(string(service.FullName())) {
				continue
			}
			for j := range service.Methods().Len() {
				m := service.Methods().Get(j)
				all["/"+string(service.FullName())+"/"+string(m.Name())] = m
			}
		}
		return true
	})
	return all
}

// attempt is what one request may name: at path, this.
type attempt struct {
	what    string
	refs    map[string]string
	foreign []string // what of it is another's, to be exchanged for what nobody has
}

// attempts are a request with each of its references another's, and then all.
func attempts(procedure string, md protoreflect.MessageDescriptor, mine, other *furnished) []attempt {
	paths := referencesOf(md, "")
	excludes := func(a, b string) bool {
		return slices.Contains(instead[procedure][a], b) || slices.Contains(instead[procedure][b], a)
	}
	// with are the references of a request that has one for sure, as many as may be.
	with := func(chosen string) []string {
		set := []string{chosen}
		for _, p := range paths {
			if p != chosen && !slices.ContainsFunc(set, func(q string) bool { return excludes(p, q) }) {
				set = append(set, p)
			}
		}
		return set
	}
	var all []attempt
	for _, path := range paths {
		set := with(path)
		for _, name := range other.things[references[path]] {
			a := attempt{what: path + "=" + name, refs: map[string]string{path: name}, foreign: []string{path}}
			for _, p := range set[1:] {
				a.refs[p] = mine.things[references[p]][0]
			}
			all = append(all, a)
		}
		if len(set) > 1 {
			a := attempt{what: "all, by " + path, refs: map[string]string{}, foreign: set}
			for _, p := range set {
				a.refs[p] = other.things[references[p]][0]
			}
			all = append(all, a)
		}
	}
	return all
}

// TestEveryCallAcrossOrganizations tries every procedure and every route of the API with the token of another
// organization's admin. What is another's must look as what nobody has, to the byte and in every header, and
// nothing of it may change.
func TestEveryCallAcrossOrganizations(t *testing.T) {
	for name, change := range map[string]func(*testing.T) func(*Options){
		"sqlite": func(*testing.T) func(*Options) { return func(*Options) {} },
		"postgres": func(t *testing.T) func(*Options) {
			cfg, _ := storetest.PostgresConfig(t)
			return func(o *Options) { o.Database, o.DatabasePasswordFile = cfg.PostgresDSN, cfg.PasswordFile }
		},
	} {
		t.Run(name, func(t *testing.T) { everyCall(t, startServer(t, change(t), withPG)) })
	}
}

func everyCall(t *testing.T, s *testServer) {
	other, mine := furnish(t, s, "alpha"), furnish(t, s, "bravo")
	before := s.chainOf(t, other.id)
	routes := s.api.Routes()
	client := as(mine.token)
	canaries := []string{other.id, "alpha"}
	for _, names := range other.things {
		canaries = append(canaries, names...)
	}

	found := procedures(func(service string) bool { return slices.Contains(routes, "/"+service+"/") })
	for _, route := range routes {
		service := strings.Trim(route, "/")
		if strings.HasPrefix(service, "postern.v1.") && !slices.ContainsFunc(slices.Collect(maps.Keys(found)), func(p string) bool { return strings.HasPrefix(p, route) }) {
			t.Errorf("no procedures of %s are known", service)
		}
	}
	used := map[string]bool{}
	for _, procedure := range slices.Sorted(maps.Keys(found)) { // SetSecret after RemoveSecret
		method := found[procedure]
		t.Run(strings.TrimPrefix(procedure, "/postern.v1."), func(t *testing.T) {
			tries := attempts(procedure, method.Input(), mine, other)
			if len(tries) == 0 {
				why, listed := nothingNamed[procedure]
				used[procedure] = true
				if !listed {
					t.Fatalf("%s names nothing: say in this test why it is safe", procedure)
				}
				r := callRPC(t, client, s.url, procedure, method.IsStreamingServer(), request(t, procedure, method.Input(), nil, "", nil), nil)
				for _, canary := range canaries {
					if strings.Contains(r.body, canary) {
						t.Errorf("%s (%s): the answer tells of %s: %s", procedure, why, canary, r.body)
					}
				}
				return
			}
			for _, try := range tries {
				nobodys := map[string]string{}
				for path, name := range try.refs {
					nobodys[path] = name
				}
				var named, absents []string
				for _, path := range try.foreign {
					nobodys[path] = absent(try.refs[path])
					named, absents = append(named, try.refs[path]), append(absents, nobodys[path])
				}
				ask := func(refs map[string]string, named []string) reply {
					return callRPC(t, client, s.url, procedure, method.IsStreamingServer(), request(t, procedure, method.Input(), refs, "", nil), named)
				}
				got, want := ask(try.refs, named), ask(nobodys, absents)
				for _, canary := range canaries {
					if strings.Contains(strings.ReplaceAll(got.body, "NAMED", ""), canary) {
						t.Errorf("%s: the answer tells of %s: %s", try.what, canary, got.body)
					}
				}
				others := 0
				for _, path := range try.foreign {
					if _, ok := elsewhere[procedure+" "+path]; ok {
						used[procedure+" "+path] = true
						others++
					}
				}
				if others == len(try.foreign) {
					if got.status != want.status || got.code != want.code {
						t.Errorf("%s: another's differs from nobody's:\n%+v\n%+v", try.what, got, want)
					}
					continue
				}
				if got != want {
					t.Errorf("%s: another's differs from nobody's:\n%+v\n%+v", try.what, got, want)
				}
				if notFound := got.code == "not_found" && (got.status == http.StatusNotFound || method.IsStreamingServer()); !notFound {
					t.Errorf("%s: got %+v, want 404", try.what, got)
				}
			}
			for field := range filledIn {
				if method.Input().Fields().ByName(protoreflect.Name(field)) == nil {
					continue
				}
				r := callRPC(t, client, s.url, procedure, method.IsStreamingServer(), request(t, procedure, method.Input(), tries[0].refs, field, other), nil)
				if r.status != http.StatusBadRequest || r.code != "invalid_argument" {
					t.Errorf("with a %s: got %+v, want it refused", field, r)
				}
			}
		})
	}
	for listed := range nothingNamed {
		if !used[listed] {
			t.Errorf("%s is listed, but names something or is not there", listed)
		}
	}
	for listed := range elsewhere {
		if !used[listed] {
			t.Errorf("%s is listed, but there is no such attempt", listed)
		}
	}
	t.Run("routes", func(t *testing.T) { everyRoute(t, s, routes, other, mine) })

	t.Run("postgresql", func(t *testing.T) { pgAcross(t, s, other, mine) })

	if after := s.chainOf(t, other.id); !slices.Equal(after, before) {
		t.Errorf("the other organization's audit chain has become longer: %s", after[len(before):])
	}
	s.stillThere(t, other)
}

// chainOf is an organization's audit chain.
func (s *testServer) chainOf(t *testing.T, organization string) []string {
	t.Helper()
	lines, err := s.audit.List(t.Context(), organization, 1, 1000)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, l := range lines {
		all = append(all, string(l))
	}
	return all
}

// stillThere wants all that an organization was furnished with.
func (s *testServer) stillThere(t *testing.T, f *furnished) {
	t.Helper()
	ctx, client := t.Context(), as(f.token)
	var problems []error
	add := func(err error) { problems = append(problems, err) }
	agent, err := posternv1connect.NewAgentServiceClient(client, s.url).GetAgent(ctx, connect.NewRequest(&posternv1.GetAgentRequest{Agent: f.agent.name}))
	if add(err); err == nil && (!agent.Msg.Agent.Online || agent.Msg.Agent.Revoked != nil) {
		add(fmt.Errorf("agent: %v", agent.Msg.Agent))
	}
	kernel, err := posternv1connect.NewKernelServiceClient(client, s.url).GetKernel(ctx, connect.NewRequest(&posternv1.AgentKernelRequest{KernelId: f.things["kernel"][0]}))
	if add(err); err == nil && kernel.Msg.Agent != f.agent.name {
		add(fmt.Errorf("kernel: %v", kernel.Msg))
	}
	files := posternv1connect.NewFileServiceClient(client, s.url)
	list, err := files.ListFiles(ctx, connect.NewRequest(&posternv1.ListFilesRequest{Workspace: f.things["workspace"][0], Path: []byte("/")}))
	if add(err); err == nil && len(list.Msg.Files) != 1 {
		add(fmt.Errorf("files: %v", list.Msg.Files))
	}
	snapshots, err := files.ListSnapshots(ctx, connect.NewRequest(&posternv1.WorkspaceRequest{Workspace: f.things["workspace"][0]}))
	if add(err); err == nil && len(snapshots.Msg.Snapshots) != 1 {
		add(fmt.Errorf("snapshots: %v", snapshots.Msg))
	}
	secrets, err := posternv1connect.NewSecretServiceClient(client, s.url).ListSecrets(ctx, connect.NewRequest(&posternv1.ListSecretsRequest{}))
	if add(err); err == nil && len(secrets.Msg.Secrets) != 1 {
		add(fmt.Errorf("secrets: %v", secrets.Msg))
	}
	tokens, err := posternv1connect.NewTokenServiceClient(client, s.url).ListTokens(ctx, connect.NewRequest(&posternv1.ListTokensRequest{}))
	if add(err); err == nil {
		for _, token := range tokens.Msg.Tokens {
			if token.Revoked != nil {
				add(fmt.Errorf("token: %v", token))
			}
		}
	}
	keys, err := posternv1connect.NewKeyServiceClient(client, s.url).ListKeys(ctx, connect.NewRequest(&posternv1.ListKeysRequest{}))
	if add(err); err == nil {
		for _, key := range keys.Msg.Keys {
			if key.Revoked != nil {
				add(fmt.Errorf("key: %v", key))
			}
		}
	}
	if err := errors.Join(problems...); err != nil {
		t.Error(err)
	}
}
