package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/e2e/simulatedkernels"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

// away cuts the agent's tunnel and waits until everybody knows.
func (l *lab) away(t *testing.T) {
	t.Helper()
	l.tunnel.Close(nil)
	eventually(t, "the agent to be away", func() error {
		if _, err := l.hub.Agent(l.agent.id); err == nil {
			return errors.New("it is there")
		}
		return nil
	})
}

// given waits until a kernel's secret has a value.
func (l *lab) given(t *testing.T, name, want string) {
	t.Helper()
	eventually(t, "the kernel's secret", func() error {
		if got := l.host.Secrets(l.kernel)[name]; got != want {
			return fmt.Errorf("it has %q, want %q", got, want)
		}
		return nil
	})
}

// startKernel starts a kernel as a token and returns it.
func (l *lab) startKernel(t *testing.T, token string, secrets ...string) (*posternv1.AgentKernel, error) {
	t.Helper()
	resp, err := posternv1connect.NewKernelServiceClient(as(token), l.url).StartKernel(t.Context(), connect.NewRequest(&posternv1.StartAgentKernelRequest{Agent: "edge", Secrets: secrets}))
	if err != nil {
		return nil, proto.FromConnect(err)
	}
	return resp.Msg, nil
}

func TestSecretCommand(t *testing.T) {
	l := newLab(t)
	run := postern(t, l)
	value := "canary-of-the-command"
	file := filepath.Join(t.TempDir(), "value")
	if err := os.WriteFile(file, []byte(value+"-2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name           string
		args           []string
		stdin          string
		stdout, stderr string
		code           int
	}{
		{"none", []string{"list"}, "", "NAME  SCOPE  OWNER  CHANGED  BY  GRANTED TO\n", "", 0},
		{"set", []string{"set", "API_TOKEN"}, value + "\n", "secret API_TOKEN (own) is set\n", "", 0},
		{"short", []string{"set", "PIN"}, "1234567", "", "postern: secret PIN has less than 8 bytes: so short a value can't be kept out of kernels' outputs\n", 1},
		{"bad name", []string{"set", "LD_PRELOAD"}, value, "", "postern: LD_PRELOAD is no name for a secret: programs take it as a setting: see", 2},
		{"in argv", []string{"set", "X", value}, "", "", "postern: accepts 1 arg(s), received 2: see", 2},
		{"grant", []string{"grant", "API_TOKEN", l.kernel}, "", "secret API_TOKEN (own) is granted\n", "kernel " + l.kernel + " on edge has it\n", 0},
		{"rotate", []string{"set", "API_TOKEN", "--file", file}, "", "secret API_TOKEN (own) is set\n", "kernel " + l.kernel + " on edge has the new value\n", 0},
		{"of nobody", []string{"grant", "OTHER", l.kernel}, "", "", "postern: secret OTHER is none of yours here, and the host says: this host has no secret of that name\n", 3},
		{"the host's", []string{"grant", simulatedkernels.HostSecret, l.kernel}, "", "secret FROM_VAULT (host) is granted\n", "kernel " + l.kernel + " on edge has it\n", 0},
		{"no target", []string{"grant", "API_TOKEN"}, "", "", "postern: name one: a kernel, --all or --token TOKEN: see", 2},
		{"not an operator", []string{"set", "SHARED", "--organization"}, value, "", "postern: token ana has the role analyst: secrets of workspaces and of the organization are operators' to set, remove and grant\n", 3},
		{"no such kernel", []string{"grant", "API_TOKEN", "nope"}, "", "", "postern: kernel \"nope\" not found\n", 4},
	} {
		t.Run(test.name, func(t *testing.T) {
			cmd := run(append([]string{"secret"}, test.args...)...)
			cmd.Stdin = strings.NewReader(test.stdin)
			stdout, stderr, code := outcome(t, cmd)
			if stdout != test.stdout || !strings.HasPrefix(stderr, test.stderr) || code != test.code {
				t.Errorf("got %q, %q, %d\nwant %q, %q, %d", stdout, stderr, code, test.stdout, test.stderr, test.code)
			}
		})
	}
	if got := l.host.Secrets(l.kernel); got["API_TOKEN"] != value+"-2" || len(got) != 2 {
		t.Errorf("the kernel was given %v", got)
	}
	if stdout, _, _ := outcome(t, run("secret", "list")); !strings.Contains(stdout, "API_TOKEN") || !strings.Contains(stdout, "kernel "+l.kernel) || strings.Contains(stdout, value) {
		t.Errorf("list: %s", stdout)
	}
	if stdout, stderr, code := outcome(t, run("secret", "grant", "API_TOKEN", l.kernel, "--remove")); code != 0 || len(l.host.Secrets(l.kernel)) != 1 {
		t.Errorf("taken back: %q, %q, %d: %v", stdout, stderr, code, l.host.SecretNames(l.kernel))
	}
	id, stderr, code := outcome(t, run("kernel", "start", "edge", "--secret", "API_TOKEN"))
	if id = strings.TrimSpace(id); code != 0 || l.host.Secrets(id)["API_TOKEN"] != value+"-2" {
		t.Errorf("start: %q, %q, %d", id, stderr, code)
	}
	before := len(l.host.Kernels())
	if _, stderr, code := outcome(t, run("kernel", "start", "edge", "--secret", "NOPE")); code != 3 || !strings.Contains(stderr, "secret NOPE: this host has no secret of that name") || len(l.host.Kernels()) != before {
		t.Errorf("start with what is not there: %q, %d; %d kernels", stderr, code, len(l.host.Kernels()))
	}
	if _, stderr, code := outcome(t, run("secret", "rm", "API_TOKEN")); code != 0 || len(l.host.Secrets(id)) != 0 {
		t.Errorf("removed: %q, %d: %v", stderr, code, l.host.SecretNames(id))
	}
}

func TestSecretsByRole(t *testing.T) {
	l := newLab(t)
	secrets := func(token string) posternv1connect.SecretServiceClient {
		return posternv1connect.NewSecretServiceClient(as(token), l.url)
	}
	operator, viewer := l.newToken(t, l.token0(), "op", "operator"), l.newToken(t, l.token0(), "vera", "viewer")
	set := func(token, value string, ref *posternv1.SecretRef) error {
		_, err := secrets(token).SetSecret(t.Context(), connect.NewRequest(&posternv1.SetSecretRequest{Ref: ref, Value: []byte(value)}))
		return proto.FromConnect(err)
	}
	grant := func(token string, r *posternv1.GrantSecretRequest) error {
		_, err := secrets(token).GrantSecret(t.Context(), connect.NewRequest(r))
		return proto.FromConnect(err)
	}
	code := func(what string, err error, want proto.Code) {
		t.Helper()
		if (err != nil || want != 0) && proto.CodeOf(err) != want {
			t.Errorf("%s: got %v, want %v", what, err, want)
		}
	}
	organization := &posternv1.SecretRef{Name: "KEY", Scope: posternv1.SecretScope_SECRET_SCOPE_ORGANIZATION}
	mine := &posternv1.SecretRef{Name: "KEY"}
	code("a viewer", set(viewer, "of the viewer", mine), proto.CodeRoleDenied)
	code("an operator", set(operator, "of the organization", organization), 0)
	code("bob", set(l.token2, "of bob's own", mine), 0)
	code("ana grants the organization's", grant(l.token, &posternv1.GrantSecretRequest{Ref: organization, KernelId: l.kernel}), proto.CodeRoleDenied)
	code("bob grants to ana's kernel", grant(l.token2, &posternv1.GrantSecretRequest{Ref: mine, KernelId: l.kernel}), proto.CodeNotFound)
	code("bob grants to ana", grant(l.token2, &posternv1.GrantSecretRequest{Ref: mine, Token: "ana"}), proto.CodeRoleDenied)
	code("the operator's own to ana", set(operator, "the operator's own", &posternv1.SecretRef{Name: "OWN"}), 0)
	code("the operator's own to ana", grant(operator, &posternv1.GrantSecretRequest{Ref: &posternv1.SecretRef{Name: "OWN"}, Token: "ana"}), proto.CodeRoleDenied)
	if got := l.host.Secrets(l.kernel); len(got) != 0 {
		t.Errorf("ana's kernel was given %v", got)
	}
	code("the operator to ana", grant(operator, &posternv1.GrantSecretRequest{Ref: organization, Token: "ana"}), 0)
	if got := l.host.Secrets(l.kernel); got["KEY"] != "of the organization" {
		t.Errorf("ana's kernel was given %v", got)
	}
	// The nearest wins.
	code("ana", set(l.token, "of ana's own", mine), 0)
	code("ana to her own", grant(l.token, &posternv1.GrantSecretRequest{Ref: mine, All: true}), 0)
	if got := l.host.Secrets(l.kernel); got["KEY"] != "of ana's own" {
		t.Errorf("ana's kernel was given %v", got)
	}
	k, err := l.startKernel(t, l.token)
	if err != nil || l.host.Secrets(k.Kernel.Id)["KEY"] != "of ana's own" {
		t.Errorf("a new kernel: %v, %v", l.host.SecretNames(k.GetKernel().GetId()), err)
	}
	// A host that takes none does not keep ana from working, but from what she asks for.
	l.host.RefuseSecrets(proto.Errorf(proto.CodePolicyDenied, "not here"))
	if k, err := l.startKernel(t, l.token); err != nil || !slices.Equal(k.Warnings, []string{"the kernel does not have the secrets granted to it: not here"}) {
		t.Errorf("warnings %v, %v", k.GetWarnings(), err)
	}
	_, err = l.startKernel(t, l.token, "KEY")
	code("asked for", err, proto.CodePolicyDenied)
	l.host.RefuseSecrets(nil)
	lists := func(token string) (names []string) {
		resp, err := secrets(token).ListSecrets(t.Context(), connect.NewRequest(&posternv1.ListSecretsRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range resp.Msg.Secrets {
			names = append(names, strings.TrimPrefix(s.Ref.Scope.String(), "SECRET_SCOPE_")+" "+s.OwnerName)
		}
		return names
	}
	if got := lists(l.token2); !slices.Equal(got, []string{"ORGANIZATION ", "OWN bob"}) && !slices.Equal(got, []string{"OWN bob", "ORGANIZATION "}) {
		t.Errorf("bob sees %v", got)
	}
	if got := lists(operator); len(got) != 4 {
		t.Errorf("the operator sees %v", got)
	}
	// What a token gave ends with it.
	if _, err := posternv1connect.NewTokenServiceClient(as(l.token0()), l.url).RevokeToken(t.Context(), connect.NewRequest(&posternv1.RevokeTokenRequest{Token: "ana"})); err != nil {
		t.Fatal(err)
	}
	l.given(t, "KEY", "")
}

// token0 is the admin's.
func (l *lab) token0() string { return l.testServer.token }

// TestSecretsReachAnAgentThatWasAway shows that what is set, or taken, while an agent is
// away is so at its kernels when it is back; and that values are nowhere in DATA.
func TestSecretsReachAnAgentThatWasAway(t *testing.T) {
	l := newLab(t)
	client := posternv1connect.NewSecretServiceClient(as(l.token), l.url)
	const first, second = "canary-one-of-the-control-plane", "canary-two-of-the-control-plane"
	set := func(value string) *posternv1.SetSecretResponse {
		resp, err := client.SetSecret(t.Context(), connect.NewRequest(&posternv1.SetSecretRequest{Ref: &posternv1.SecretRef{Name: "KEY"}, Value: []byte(value)}))
		if err != nil {
			t.Fatal(err)
		}
		return resp.Msg
	}
	set(first)
	if _, err := client.GrantSecret(t.Context(), connect.NewRequest(&posternv1.GrantSecretRequest{Ref: &posternv1.SecretRef{Name: "KEY"}, All: true})); err != nil {
		t.Fatal(err)
	}
	if got := l.host.Secrets(l.kernel)["KEY"]; got != first {
		t.Fatalf("given %q", got)
	}
	l.away(t)
	if got := set(second).Kernels; len(got) != 1 || got[0].Problem != "its agent is offline: it gets it when the agent is back" {
		t.Errorf("got %v", got)
	}
	l.tunnel = l.agent.attach(t)
	l.given(t, "KEY", second)
	l.away(t)
	if _, err := client.RemoveSecret(t.Context(), connect.NewRequest(&posternv1.RemoveSecretRequest{Ref: &posternv1.SecretRef{Name: "KEY"}})); err != nil {
		t.Fatal(err)
	}
	l.tunnel = l.agent.attach(t)
	l.given(t, "KEY", "")
	err := filepath.WalkDir(l.options.Data, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		text, err := os.ReadFile(path)
		if bytes.Contains(text, []byte("canary-")) {
			t.Errorf("a value is in %s", path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	audit, err := posternv1connect.NewAuditServiceClient(as(l.token0()), l.url).ListAudit(t.Context(), connect.NewRequest(&posternv1.ListAuditRequest{Limit: 100}))
	if err != nil {
		t.Fatal(err)
	}
	text := audit.Msg.String()
	for _, want := range []string{"secret.set", "secret.grant", "secret.push", "secret.rm", "KEY"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %s in the audit log", want)
		}
	}
	if strings.Contains(text, "canary") {
		t.Error("the audit log has a value")
	}
}
