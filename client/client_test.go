package client_test

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/client"
	"github.com/postern-dev/postern/client/internal/simulatedcontrolplane"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/rowfmt"
)

func start(t *testing.T) (*simulatedcontrolplane.Server, *client.Client) {
	t.Helper()
	s := simulatedcontrolplane.Start(false)
	t.Cleanup(s.Close)
	return s, connectTo(t, s.URL, simulatedcontrolplane.AdminToken)
}

func connectTo(t *testing.T, url, token string) *client.Client {
	t.Helper()
	c, err := client.New(client.Config{URL: url, Token: client.StaticToken(client.NewSecret(token))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func whoami(c *client.Client) (*posternv1.WhoAmIResponse, error) {
	resp, err := c.Identity.WhoAmI(context.Background(), connect.NewRequest(&posternv1.WhoAmIRequest{}))
	if err != nil {
		return nil, err
	}
	return resp.Msg, nil
}

func TestCallsCarryTheToken(t *testing.T) {
	s, c := start(t)
	me, err := whoami(c)
	if err != nil || me.Role != "admin" {
		t.Fatalf("%v, %v", me, err)
	}
	r := s.Requests()[0]
	if !strings.HasPrefix(r.Header.Get("User-Agent"), "postern-client/") || r.Header.Get("X-Idempotency-Key") != "" {
		t.Errorf("headers: %v", r.Header)
	}
	_, err = whoami(connectTo(t, s.URL, "wrong"))
	if proto.CodeOf(err) != proto.CodeUnauthenticated || proto.ExitCode(err) != proto.ExitDenied {
		t.Errorf("wrong token: %v", err)
	}
}

func TestSQL(t *testing.T) {
	tests := []struct {
		sql     string
		rows    string // the result as csv
		code    proto.Code
		lost    bool
		refused bool
	}{
		{sql: "select 1", rows: "?column?\n1\n"},
		{sql: "echo", rows: "name,value\nday,2026\nnothing,\n"},
		{sql: "bad column foo", code: proto.CodeSQL, refused: true},
		{sql: "refused", code: proto.CodePolicyDenied, refused: true},
		{sql: "too many", rows: "id,name\n1,name 1\n", code: proto.CodeRowLimit},
		{sql: "vanish", rows: "id,name\n1,name 1\n", code: proto.CodeUnavailable, lost: true},
		{sql: "no trailer", rows: "id,name\n1,name 1\n"},
		{sql: "no trail at all", rows: "id,name\n1,name 1\n", code: proto.CodeUnavailable, lost: true},
	}
	_, c := start(t)
	for _, test := range tests {
		t.Run(test.sql, func(t *testing.T) {
			value := "2026"
			rows, err := c.SQL(context.Background(), "edge-1", "warehouse", &posternv1.RunSQLRequest{
				Sql: test.sql, Parameters: []*posternv1.Parameter{{Name: "day", Value: &value}, {Name: "nothing"}},
			})
			if test.refused {
				if proto.CodeOf(err) != test.code {
					t.Fatalf("%v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer rows.Close()
			if rows.QueryID() == "" {
				t.Error("no query id")
			}
			if _, err := rows.Outcome(); err == nil {
				t.Error("an outcome before the end")
			}
			var body bytes.Buffer
			_, readErr := io.Copy(&body, rows)
			var text bytes.Buffer
			if err := rowfmt.Convert(context.Background(), &text, &body, rowfmt.CSV, rowfmt.Options{}); err != nil && !test.lost {
				t.Fatal(err)
			}
			if !strings.HasPrefix(text.String(), test.rows) {
				t.Errorf("rows: %q", text.String())
			}
			outcome, err := rows.Outcome()
			if proto.CodeOf(err) != test.code {
				t.Errorf("outcome: %v, want %v", err, test.code)
			}
			if test.lost != (readErr != nil) || test.lost != (outcome == nil) {
				t.Errorf("lost %v: read %v, outcome %v", test.lost, readErr, outcome)
			}
			if test.lost && !strings.Contains(err.Error(), "the control plane went away while the result was under way") {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestClosingRowsHangsUp(t *testing.T) {
	s, c := start(t)
	rows, err := c.SQL(context.Background(), "edge-1", "warehouse", &posternv1.RunSQLRequest{Sql: "endless"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(rows, make([]byte, 100_000)); err != nil {
		t.Fatal(err)
	}
	rows.Close()
	rows.Close()
	s.Server.Close() // waits for the handler
	if s.Hangups() != 1 {
		t.Errorf("%d statements saw the client hang up, want 1", s.Hangups())
	}
}

func TestCancelledContext(t *testing.T) {
	_, c := start(t)
	ctx, cancel := context.WithCancel(context.Background())
	rows, err := c.SQL(ctx, "edge-1", "warehouse", &posternv1.RunSQLRequest{Sql: "wait"})
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	cancel()
	if _, err := io.Copy(io.Discard, rows); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if _, err := c.SQL(ctx, "edge-1", "warehouse", &posternv1.RunSQLRequest{Sql: "select 1"}); proto.CodeOf(err) != proto.CodeCancelled {
		t.Errorf("%v", err)
	}
}

// TestReadsAreSentAgain: the server closes a kept connection without an answer.
// A call that reads is sent again; one that changes something, and a statement,
// are not.
func TestReadsAreSentAgain(t *testing.T) {
	var calls atomic.Int64
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		if calls.Add(1)%2 == 0 {
			conn, _, err := http.NewResponseController(w).Hijack()
			if err == nil {
				conn.(*net.TCPConn).Close()
			}
			return
		}
		w.Header().Set("Content-Type", "application/proto")
	}))
	defer s.Close()
	ctx := context.Background()
	list := func(c *client.Client) error {
		_, err := c.Agents.ListAgents(ctx, connect.NewRequest(&posternv1.ListAgentsRequest{}))
		return err
	}
	tests := []struct {
		name  string
		call  func(*client.Client) error
		again bool
	}{
		{"list", list, true},
		{"revoke", func(c *client.Client) error {
			_, err := c.Agents.RevokeAgent(ctx, connect.NewRequest(&posternv1.RevokeAgentRequest{}))
			return err
		}, false},
		{"sql", func(c *client.Client) error {
			rows, err := c.SQL(ctx, "a", "s", &posternv1.RunSQLRequest{Sql: "insert"})
			if err == nil {
				rows.Close()
			}
			return err
		}, false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			calls.Store(0)
			c := connectTo(t, s.URL, "x")
			if err := list(c); err != nil {
				t.Fatal(err)
			}
			err := test.call(c)
			switch {
			case test.again && (err != nil || calls.Load() != 3):
				t.Errorf("%d calls, %v; want it sent again", calls.Load(), err)
			case !test.again && (proto.CodeOf(err) != proto.CodeUnavailable || calls.Load() != 2):
				t.Errorf("%d calls, %v; want it sent once", calls.Load(), err)
			}
		})
	}
}

func TestUnreachable(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	secure := simulatedcontrolplane.Start(true)
	t.Cleanup(secure.Close)
	plain := simulatedcontrolplane.Start(false)
	t.Cleanup(plain.Close)
	tests := []struct{ name, url, want string }{
		{"refused", "http://" + address, "connection refused: check the URL, and that the control plane runs"},
		{"unknown CA", secure.URL, "name its CA's certificate with --ca-file"},
		{"no TLS there", strings.Replace(plain.URL, "http:", "https:", 1), "does not speak TLS"},
		{"redirect", plain.URL + "/elsewhere", "sends us to http://other.example.com: use that URL"},
		{"a web server", plain.URL + "/webserver", "not as a Postern server does: check the URL"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			_, err := whoami(connectTo(t, test.url, "x"))
			if err == nil || !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v, want %q", err, test.want)
			}
			if proto.ExitCode(err) != proto.ExitFailed {
				t.Errorf("exit code %d", proto.ExitCode(err))
			}
		})
	}
}

func TestCAFile(t *testing.T) {
	s := simulatedcontrolplane.Start(true)
	t.Cleanup(s.Close)
	name := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(name, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := client.New(client.Config{URL: s.URL, CAFile: name, Token: client.StaticToken(client.NewSecret(simulatedcontrolplane.AdminToken))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	if _, err := whoami(c); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(name, []byte("nothing"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := client.New(client.Config{URL: s.URL, CAFile: name}); err == nil || !strings.Contains(err.Error(), "holds no certificate") {
		t.Errorf("%v", err)
	}
}

func TestParseURL(t *testing.T) {
	tests := []struct{ in, want string }{
		{"https://CP.example.com/", "https://cp.example.com"},
		{"http://127.0.0.1:8080", "http://127.0.0.1:8080"},
		{"https://cp.example.com/postern/", "https://cp.example.com/postern"},
		{"cp.example.com", ""},
		{"ftp://cp.example.com", ""},
		{"https://", ""},
		{"https://user:secret@cp.example.com", ""},
		{"https://cp.example.com/?token=secret", ""},
		{"", ""},
	}
	for _, test := range tests {
		u, err := client.ParseURL(test.in)
		switch {
		case test.want == "" && err == nil:
			t.Errorf("%q is accepted", test.in)
		case test.want != "" && (err != nil || u.String() != test.want):
			t.Errorf("%q: got %v, %v, want %q", test.in, u, err, test.want)
		case err != nil && strings.Contains(test.in, "user") && strings.Contains(err.Error(), "secret"):
			t.Errorf("the password is in the error: %v", err)
		}
	}
}

func TestSecretNeverPrints(t *testing.T) {
	s := client.NewSecret("hunter2")
	credentials := client.Credentials{URL: "https://x", Token: s}
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "token", s, "all", credentials)
	raw, err := json.Marshal(credentials)
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{fmt.Sprint(s), fmt.Sprintf("%v %+v %#v %s %q", s, credentials, credentials, s, s), log.String(), string(raw)} {
		if strings.Contains(text, "hunter2") {
			t.Errorf("the secret is in %q", text)
		}
	}
	if s.Reveal() != "hunter2" {
		t.Error("the secret is lost")
	}
}

func TestCredentials(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0)) // the worst one
	path := filepath.Join(t.TempDir(), "a", "postern", "credentials.json")
	if _, err := client.LoadCredentials(path); !errors.Is(err, client.ErrNoLogin) {
		t.Errorf("no file: %v", err)
	}
	want := client.Credentials{URL: "https://cp.example.com", Token: client.NewSecret("t"), CAFile: "/ca.pem"}
	for range 2 { // the second replaces the first
		if err := client.SaveCredentials(path, want); err != nil {
			t.Fatal(err)
		}
	}
	for name, mode := range map[string]os.FileMode{path: 0o600, filepath.Dir(path): 0o700 | os.ModeDir} {
		info, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode() != mode {
			t.Errorf("%s has mode %v, want %v", name, info.Mode(), mode)
		}
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
	got, err := client.LoadCredentials(path)
	if err != nil || got != want {
		t.Errorf("got %v, %v", got, err)
	}
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := client.LoadCredentials(path); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("readable by others: %v", err)
	}
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := client.LoadCredentials(path); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("damaged: %v", err)
	}
}
