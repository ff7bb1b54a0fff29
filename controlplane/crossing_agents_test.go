package main

import (
	"crypto/tls"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
	"github.com/postern-dev/postern/tunnel"
)

// agentServices are what the control plane serves to agents, on their tunnels.
var agentServices = []string{posternv1connect.LinkServiceName, posternv1connect.AttachServiceName}

// agentReferences are fields of agents' requests that name a thing, and what kind it is of.
var agentReferences = map[string]string{
	"/postern.v1.AttachService/OpenWorkspace name": "workspace", "workspace_id": "workspace",
	"mounts.workspace": "workspace", "mounts.agent": "agent", "query_id": "query", "statements.query_id": "query", "statements.kernel_id": "kernel",
	"statements.principal.organization": "organization", "statements.principal.token_id": "token",
}

// fillAgent fills a request of an agent's with what kind of thing each reference names.
func fillAgent(procedure string, md protoreflect.MessageDescriptor, name func(kind string) string) *dynamicpb.Message {
	var fill func(m protoreflect.Message, prefix string)
	fill = func(m protoreflect.Message, prefix string) {
		for i := range m.Descriptor().Fields().Len() {
			f := m.Descriptor().Fields().Get(i)
			path := prefix + string(f.Name())
			kind := agentReferences[path]
			if kind == "" {
				kind = agentReferences[procedure+" "+path]
			}
			switch {
			case kind != "" && f.Kind() == protoreflect.StringKind:
				m.Set(f, protoreflect.ValueOfString(name(kind)))
			case f.IsMap() || f.Kind() == protoreflect.MessageKind && f.Message().FullName().Parent() != "postern.v1":
			case f.Kind() == protoreflect.MessageKind && f.ContainingOneof() == nil && strings.Count(path, ".") < 3:
				if f.IsList() {
					fill(m.Mutable(f).List().AppendMutable().Message(), path+".")
				} else {
					fill(m.Mutable(f).Message(), path+".")
				}
			case path == "through.sequence":
				m.Set(f, protoreflect.ValueOfUint64(1))
			case path == "through.hash":
				m.Set(f, protoreflect.ValueOfBytes(make([]byte, 32)))
			case path == "statements.verdict" || path == "statements.state" || path == "statements.source" || path == "statements.sql":
				m.Set(f, protoreflect.ValueOfString(map[string]string{"verdict": "allowed", "state": "done", "source": "shop", "sql": "select 1"}[string(f.Name())]))
			case f.Name() == "mount_id":
				m.Set(f, protoreflect.ValueOfString("0123456789abcdef0123456789abcdef"))
			case f.Name() == "count" && f.Kind() == protoreflect.Uint32Kind:
				m.Set(f, protoreflect.ValueOfUint32(1))
			}
		}
	}
	m := dynamicpb.NewMessage(md)
	fill(m, "")
	return m
}

// taken are procedures that take what they are told, and of whom.
var taken = map[string]string{
	posternv1connect.AttachServiceReportStatusProcedure: "of the agent's own mounts, by its certificate",
}

// TestHostileAgentAcrossOrganizations is an agent that asks for another organization's things by every request that agents
// have: it gets what it gets for what nobody has, and nothing of the other's changes.
func TestHostileAgentAcrossOrganizations(t *testing.T) {
	s := startServer(t)
	other, mine := furnish(t, s, "alpha"), furnish(t, s, "bravo")
	tn, err := mine.agent.dial(t.Context(), []tls.Certificate{mine.agent.cert})
	if err != nil {
		t.Fatal(err)
	}
	defer tn.Close(nil)
	if _, err := linkClient(tn).Hello(t.Context(), connect.NewRequest(&posternv1.HelloRequest{Version: proto.Version()})); err != nil {
		t.Fatal(err)
	}
	before := s.chainOf(t, other.id)
	client := &http.Client{Transport: tn.Transport(tunnel.Bulk), Timeout: 20 * time.Second}
	found := procedures(func(service string) bool { return slices.Contains(agentServices, service) })
	if len(found) < 15 {
		t.Errorf("%d procedures: some are missing", len(found))
	}
	// Those that name nothing of anybody's, and what they are about.
	alone := map[string]string{
		posternv1connect.LinkServiceRegisterProcedure: "a key's secret", posternv1connect.LinkServiceRejoinProcedure: "the certificate",
		posternv1connect.LinkServiceRenewProcedure: "the certificate", posternv1connect.LinkServiceHelloProcedure: "the certificate",
		posternv1connect.LinkServiceUpdateInventoryProcedure: "the certificate",
	}
	for _, procedure := range slices.Sorted(maps.Keys(found)) {
		method := found[procedure]
		t.Run(strings.TrimPrefix(procedure, "/postern.v1."), func(t *testing.T) {
			var kinds []string
			fillAgent(procedure, method.Input(), func(kind string) string { kinds = append(kinds, kind); return "" })
			if len(kinds) == 0 {
				if alone[procedure] == "" {
					t.Fatalf("%s names nothing: say in this test what it is about", procedure)
				}
				return
			}
			ask := func(pick func(kind string) string) reply {
				var named []string
				m := fillAgent(procedure, method.Input(), func(kind string) string {
					n := pick(kind)
					named = append(named, n)
					return n
				})
				if _, err := protojson.Marshal(m); err != nil {
					t.Fatal(err)
				}
				return callRPC(t, client, "http://controlplane", procedure, method.IsStreamingServer(), m, named)
			}
			for form := range 2 {
				pick := func(kind string) string { return other.things[kind][min(form, len(other.things[kind])-1)] }
				got, want := ask(pick), ask(func(kind string) string { return absent(pick(kind)) })
				if got != want {
					t.Errorf("another's differs from nobody's:\n%+v\n%+v", got, want)
				}
				if _, listed := taken[procedure]; got.code == "" && !listed {
					t.Errorf("it is done: %+v", got)
				}
				for _, names := range other.things {
					for _, name := range names {
						if strings.Contains(strings.ReplaceAll(got.body, "NAMED", ""), name) {
							t.Errorf("the answer tells of %s: %s", name, got.body)
						}
					}
				}
			}
		})
	}
	if after := s.chainOf(t, other.id); !slices.Equal(after, before) {
		t.Errorf("the other organization's audit chain has become longer: %s", after[len(before):])
	}
	s.stillThere(t, other)
	status, err := posternv1connect.NewFileServiceClient(as(other.token), s.url).GetFileStatus(t.Context(), connect.NewRequest(&posternv1.GetFileStatusRequest{}))
	if err != nil || len(status.Msg.Mounts) != 0 {
		t.Errorf("the other organization's mounts: %v, %v", status, err)
	}
}
