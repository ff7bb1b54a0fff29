package secret

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// plainBox seals by writing what it is about beside the value, so that a test sees both.
type plainBox struct{}

func (plainBox) Seal(plain []byte, about string) ([]byte, error) {
	return append([]byte(about+"\x01"), plain...), nil
}

func (plainBox) Open(sealed []byte, about string) ([]byte, error) {
	value, ok := bytes.CutPrefix(sealed, []byte(about+"\x01"))
	if !ok {
		return nil, errors.New("it is about something else")
	}
	return value, nil
}

// fakeStore holds what one kernel is to have; what it lacks is never called.
type fakeStore struct {
	Store
	rows     []Row
	fromHost []string
}

func (f *fakeStore) SecretsOfKernel(context.Context, string, string, string) ([]Row, []string, error) {
	return f.rows, f.fromHost, nil
}

func sealed(scope, owner, name, value string) Row {
	r := Row{ID: scope + name, Organization: "o", Scope: scope, Owner: owner, Name: name}
	r.Sealed, _ = plainBox{}.Seal([]byte(value), About(r))
	return r
}

func TestState(t *testing.T) {
	k := Kernel{ID: "k", Owner: &posternv1.Principal{TokenId: "t"}}
	f := &fakeStore{fromHost: []string{"A", "H"}}
	s := New(Config{
		Logger: slog.New(slog.DiscardHandler), Store: f,
		Box:      func(string) (Box, error) { return plainBox{}, nil },
		Append:   func(context.Context, auditchain.Entry) error { return nil },
		Operator: func(role string) bool { return role == "operator" },
	})
	defer s.Close()
	f.rows = []Row{sealed(organization, "", "A", "the organization's"), sealed(workspace, "w", "A", "the workspace's"), sealed(own, "t", "B", "one's own"), sealed(workspace, "w", "B", "the workspace's B")}
	got, err := s.state(t.Context(), "o", k)
	if err != nil {
		t.Fatal(err)
	}
	var told []string
	for _, g := range got {
		told = append(told, g.Name+"="+string(g.Value))
	}
	if want := "H= A=the workspace's B=one's own"; strings.Join(told, " ") != want {
		t.Errorf("got %q, want %q", told, want)
	}

	// A row that was moved to another name, owner, scope or organization does not open.
	for what, change := range map[string]func(*Row){
		"name": func(r *Row) { r.Name = "X" }, "owner": func(r *Row) { r.Owner = "u" },
		"scope": func(r *Row) { r.Scope, r.Owner = workspace, "t" }, "organization": func(r *Row) { r.Organization = "p" },
	} {
		moved := sealed(own, "t", "B", "the value")
		change(&moved)
		f.rows = []Row{moved}
		if _, err := s.state(t.Context(), "o", k); proto.CodeOf(err) != proto.CodeInternal || strings.Contains(err.Error(), "the value") {
			t.Errorf("another %s: %v", what, err)
		}
	}
	f.rows, f.fromHost = nil, nil
	for i := range 65 {
		f.rows = append(f.rows, sealed(own, "t", "N"+strings.Repeat("x", i), "value of it"))
	}
	if _, err := s.state(t.Context(), "o", k); proto.CodeOf(err) != proto.CodeOverloaded {
		t.Errorf("65 secrets: %v", err)
	}
}

func TestRef(t *testing.T) {
	s := New(Config{Operator: func(role string) bool { return role == "operator" }})
	defer s.Close()
	for _, test := range []struct {
		role string
		ref  *posternv1.SecretRef
		want proto.Code
	}{
		{"analyst", &posternv1.SecretRef{Name: "A"}, 0},
		{"analyst", &posternv1.SecretRef{Name: "A", Workspace: "w"}, proto.CodeInvalid},
		{"analyst", &posternv1.SecretRef{Name: "A", Scope: posternv1.SecretScope_SECRET_SCOPE_WORKSPACE, Workspace: "w"}, proto.CodeRoleDenied},
		{"operator", &posternv1.SecretRef{Name: "A", Scope: posternv1.SecretScope_SECRET_SCOPE_WORKSPACE, Workspace: "w"}, 0},
		{"operator", &posternv1.SecretRef{Name: "A", Scope: posternv1.SecretScope_SECRET_SCOPE_WORKSPACE}, proto.CodeInvalid},
		{"operator", &posternv1.SecretRef{Name: "A", Scope: posternv1.SecretScope_SECRET_SCOPE_ORGANIZATION, Workspace: "w"}, proto.CodeInvalid},
		{"operator", &posternv1.SecretRef{Name: "A", Scope: posternv1.SecretScope_SECRET_SCOPE_HOST}, proto.CodeInvalid},
		{"operator", &posternv1.SecretRef{Name: "PATH"}, proto.CodeInvalid},
		{"operator", nil, proto.CodeInvalid},
		{"operator", &posternv1.SecretRef{Name: "A", Scope: 99}, proto.CodeInvalid},
	} {
		_, _, _, err := s.ref(Caller{Principal: &posternv1.Principal{TokenId: "t", Role: test.role}}, test.ref, true)
		if proto.CodeOf(err) != test.want && (err != nil || test.want != 0) {
			t.Errorf("%s, %v: %v", test.role, test.ref, err)
		}
	}
}
