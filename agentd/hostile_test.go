package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/dynamicpb"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/kernelstream"
	"github.com/postern-dev/postern/tunnel"
)

// hostProcedures are all that a control plane can ask of a host, from the descriptors, so that none is forgotten: the
// services whose names end in HostService.
func hostProcedures() map[string]protoreflect.MethodDescriptor {
	all := map[string]protoreflect.MethodDescriptor{}
	protoregistry.GlobalFiles.RangeFiles(func(fd protoreflect.FileDescriptor) bool {
		for i := range fd.Services().Len() {
			s := fd.Services().Get(i)
			if fd.Package() != "postern.v1" || !strings.HasSuffix(string(s.Name()), "HostService") {
				continue
			}
			for j := range s.Methods().Len() {
				all["/"+string(s.FullName())+"/"+string(s.Methods().Get(j).Name())] = s.Methods().Get(j)
			}
		}
		return true
	})
	return all
}

// hostileRequest fills every field of a request: texts and bytes with a value, but for the fields in keep.
func hostileRequest(md protoreflect.MessageDescriptor, value string, keep map[string]string) *dynamicpb.Message {
	var fill func(m protoreflect.Message, depth int)
	scalar := func(f protoreflect.FieldDescriptor) protoreflect.Value {
		text := value
		if kept, ok := keep[string(f.Name())]; ok {
			text = kept
		}
		switch f.Kind() {
		case protoreflect.StringKind:
			return protoreflect.ValueOfString(text)
		case protoreflect.BytesKind:
			return protoreflect.ValueOfBytes([]byte(text))
		case protoreflect.BoolKind:
			return protoreflect.ValueOfBool(true)
		case protoreflect.EnumKind:
			return protoreflect.ValueOfEnum(1)
		case protoreflect.Int32Kind, protoreflect.Sint32Kind, protoreflect.Sfixed32Kind:
			return protoreflect.ValueOfInt32(1)
		case protoreflect.Int64Kind, protoreflect.Sint64Kind, protoreflect.Sfixed64Kind:
			return protoreflect.ValueOfInt64(1)
		case protoreflect.Uint32Kind, protoreflect.Fixed32Kind:
			return protoreflect.ValueOfUint32(1)
		case protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
			return protoreflect.ValueOfUint64(1)
		}
		return protoreflect.ValueOfFloat64(1)
	}
	fill = func(m protoreflect.Message, depth int) {
		for i := range m.Descriptor().Fields().Len() {
			f := m.Descriptor().Fields().Get(i)
			switch {
			case f.IsMap():
				if f.MapKey().Kind() == protoreflect.StringKind && f.MapValue().Kind() == protoreflect.StringKind {
					m.Mutable(f).Map().Set(protoreflect.ValueOfString("KERNEL_X").MapKey(), protoreflect.ValueOfString(value))
				}
			case f.Kind() == protoreflect.MessageKind && (f.Message().FullName().Parent() != "postern.v1" || depth > 4):
			case f.Kind() == protoreflect.MessageKind && f.IsList():
				fill(m.Mutable(f).List().AppendMutable().Message(), depth+1)
			case f.Kind() == protoreflect.MessageKind:
				fill(m.Mutable(f).Message(), depth+1)
			case f.IsList():
				m.Mutable(f).List().Append(scalar(f))
			default:
				m.Set(f, scalar(f))
			}
		}
	}
	m := dynamicpb.NewMessage(md)
	fill(m, 0)
	return m
}

// mayAnswer are procedures that a host answers, and what with: never with more than its configuration lets everybody
// know who is behind the tunnel.
var mayAnswer = map[string]string{
	"/postern.v1.HostService/ListSources":           "names, limits and modes of the declared sources",
	"/postern.v1.HostService/CheckSource":           "whether a declared source works",
	"/postern.v1.HostService/Introspect":            "the catalog of a declared source, less what its policy hides",
	"/postern.v1.HostService/OpenSession":           "a session on a declared source, under its policy",
	"/postern.v1.HostService/CloseSession":          "an end of what was opened through the tunnel",
	"/postern.v1.HostService/ListSessions":          "sessions that were opened through the tunnel",
	"/postern.v1.HostService/CancelQuery":           "an end of what was asked for through the tunnel",
	"/postern.v1.HostService/HostStatus":            "load, sources, statements under way",
	"/postern.v1.HostService/ReadAudit":             "the host's log of what the control plane asked for",
	"/postern.v1.AttachHostService/GetAttachStatus": "which workspaces are mounted",
	"/postern.v1.KernelHostService/ListKernelSpecs": "the kernelspecs that the host allows: none",
	"/postern.v1.KernelHostService/ListKernels":     "the kernels that were started through the tunnel: none",
}

// TestHostileControlPlane is a control plane that has been taken over: it speaks the protocol well, and asks a host that
// allows reading one database, with limits, for everything else, with every kind of request that there is.
func TestHostileControlPlane(t *testing.T) {
	_, source := database(t, "    policy: {mode: read-only, max_rows: 5, statement_timeout: 20s}\n")
	c := newTestControl(t)
	l := newLab(t, c, source)
	canary := "canary-" + proto.NewID("")
	outside, touched := l.path("outside.txt"), l.path("touched")
	if err := os.WriteFile(outside, []byte(canary+"\n"), 0o644); err != nil { //nolint:gosec // readable by everybody: the host's policy is what keeps it
		t.Fatal(err)
	}
	l.start()
	up := c.awaitHello(1)
	poll(t, "the link", func() bool { return l.d.link.State().Up })
	key, err := os.ReadFile(l.path("state/identity/key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	clean := func(what string, answer []byte) {
		t.Helper()
		for _, secret := range []string{canary, marked, string(bytes.TrimSpace(key)), "PRIVATE KEY"} {
			if bytes.Contains(answer, []byte(secret)) {
				t.Errorf("%s: the answer has a secret: %.300s", what, answer)
			}
		}
		if _, err := os.Lstat(touched); err == nil {
			t.Fatalf("%s: a command was run", what)
		}
	}
	client := &http.Client{Transport: up.Transport(tunnel.Bulk), Timeout: time.Minute}
	post := func(path, contentType string, body []byte) (int, []byte) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://agent"+path, bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", contentType)
		resp, err := client.Do(req)
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		defer resp.Body.Close()
		answer, err := io.ReadAll(io.LimitReader(resp.Body, 32<<20))
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		return resp.StatusCode, answer
	}

	values := []string{
		outside, "../../../../../../../.." + outside, "file://" + outside, l.path("state/identity/key.pem"),
		"$(touch " + touched + ")", "'; touch " + touched + " #", "host=127.0.0.1 port=1 user=root", "shop", "00000000-0000-7000-8000-000000000000", "",
	}
	kept := []map[string]string{nil, {"source": "shop"}, {"kernel_id": "00000000-0000-7000-8000-000000000000", "id": "00000000-0000-7000-8000-000000000001", "spec": "python3", "role": "admin"}}
	procedures := hostProcedures()
	if len(procedures) < 30 {
		t.Errorf("%d procedures: some are missing", len(procedures))
	}
	code := regexp.MustCompile(`"code": ?"([a-z_]+)"`)
	for _, procedure := range slices.Sorted(maps.Keys(procedures)) {
		method := procedures[procedure]
		for _, value := range values {
			for _, keep := range kept {
				m := hostileRequest(method.Input(), value, keep)
				body, err := protojson.Marshal(m)
				if err != nil {
					t.Fatal(err)
				}
				contentType := "application/json"
				if method.IsStreamingServer() {
					contentType = "application/connect+json"
					body = append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(body))), body...)
				}
				status, answer := post(procedure, contentType, body)
				clean(procedure, answer)
				refused := status != http.StatusOK || code.Match(answer)
				if _, ok := mayAnswer[procedure]; !ok && !refused {
					t.Errorf("%s with %q: it is done: %d %.300s", procedure, value, status, answer)
				}
			}
		}
	}
	for procedure := range mayAnswer {
		if procedures[procedure] == nil {
			t.Errorf("%s is listed and not there", procedure)
		}
	}

	// What is no procedure, or is none of a host's.
	for _, path := range []string{
		"/", "/etc/passwd", "/../../../../" + outside, "/debug/pprof/", "/status", "/candidate", "/mount", "/key", "/log-level", "/postern.v1.LinkService/Hello",
		"/postern.v1.AttachService/OpenWorkspace", "/postern.v1.TokenService/ListTokens", kernelstream.Path, proto.SQLPath + "/../../metrics",
	} {
		status, answer := post(path, "application/json", []byte("{}"))
		clean(path, answer)
		if status < 400 {
			t.Errorf("POST %s: %d %.200s", path, status, answer)
		}
	}

	// Statements: what reads files, runs programs, writes, reaches elsewhere, or takes more than the policy gives.
	for i, sql := range []string{
		"copy (select 1) to program 'touch " + touched + "'", "copy (select 1) to '" + touched + "'", "create temp table t (l text); copy t from '" + outside + "'; select * from t",
		"select pg_read_file('" + outside + "')", "select pg_read_binary_file('" + outside + "')", "select lo_import('" + outside + "')", "select pg_ls_dir('/')",
		"set role postgres", "set session authorization postgres", "reset role; create table x ()", "insert into t values (1)", "begin read write; create table x ()",
		"select set_config('transaction_read_only', 'off', false); create table x ()", "do $$begin execute 'create table x ()'; end$$",
		"create extension dblink", "select dblink_connect('host=127.0.0.1')", "alter system set archive_command = 'touch " + touched + "'", "load '" + outside + "'",
		"select generate_series(1, 1000)",
	} {
		r := c.ask(t.Context(), up, fmt.Sprintf("hostile%d", i), "shop", sql)
		clean(sql, r.rows)
		if r.err == nil {
			t.Errorf("%s: it is done: %v", sql, r.outcome)
		} else {
			clean(sql, []byte(r.err.Error()))
		}
	}
	for _, name := range []string{"postgres", "host=127.0.0.1", outside, "shop/../shop", ""} {
		if r := c.ask(t.Context(), up, "hostile-"+proto.NewID(""), name, "select 1"); r.err == nil {
			t.Errorf("source %q: it is done", name)
		}
	}

	// The host goes on, its policy is what it was, and its log says what was tried.
	if r := c.ask(t.Context(), up, "afterwards", "shop", "select 1"); r.err != nil || r.outcome.Rows != 1 {
		t.Errorf("afterwards: %v, %v", r.outcome, r.err)
	}
	denied := 0
	for _, e := range l.entries() {
		if e.Verdict == "denied" || e.Outcome == "denied" || e.Outcome == "failed" {
			denied++
		}
	}
	if denied < 10 {
		t.Errorf("the host's log has %d refusals", denied)
	}
}
