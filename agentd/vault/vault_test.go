package vault

import (
	"context"
	"crypto/x509"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/secret"
	"github.com/postern-dev/postern/e2e/simulatedvault"
)

// users is a database that has nothing but users.
type users struct {
	mu   sync.Mutex
	have map[string]bool
}

func (u *users) set(user string, there bool) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.have == nil {
		u.have = map[string]bool{}
	}
	if there {
		u.have[user] = true
	} else {
		delete(u.have, user)
	}
	return nil
}

func (u *users) count() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return len(u.have)
}

func start(t *testing.T, lease, longest, token time.Duration) (*simulatedvault.Server, *users) {
	t.Helper()
	u := &users{}
	s := simulatedvault.Start(simulatedvault.Config{
		MakeUser:  func(_ context.Context, user, _ string) error { return u.set(user, true) },
		DropUser:  func(_ context.Context, user string) error { return u.set(user, false) },
		LeaseLife: lease, LongestLease: longest, TokenLife: token,
	})
	t.Cleanup(s.Close)
	return s, u
}

func client(t *testing.T, s *simulatedvault.Server, change func(*Config)) *Client {
	t.Helper()
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(s.CA()) {
		t.Fatal("no certificate")
	}
	cfg := Config{Address: s.URL(), RootCAs: pool, Token: give(simulatedvault.RootToken)}
	if change != nil {
		change(&cfg)
	}
	c := New(cfg)
	t.Cleanup(func() { c.Close() }) //nolint:errcheck // some tests take the server away
	return c
}

func give(value string) Reader {
	return func(context.Context) (secret.Secret, error) { return secret.New(value), nil }
}

func byAppRole(s *simulatedvault.Server) func(*Config) {
	return func(c *Config) {
		id, secretID := s.AppRole()
		c.Token, c.RoleID, c.SecretID = nil, id, give(secretID)
	}
}

// eventually waits for something that happens on its own.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s did not happen", what)
		}
	}
}

func TestKV(t *testing.T) {
	s, _ := start(t, time.Hour, time.Hour, time.Hour)
	t.Setenv("VAULT_TOKEN", "from-the-environment")
	t.Setenv("VAULT_ADDR", "http://127.0.0.1:1")
	t.Setenv("HTTPS_PROXY", "http://127.0.0.1:1")
	for name, change := range map[string]func(*Config){"token": nil, "approle": byAppRole(s)} {
		t.Run(name, func(t *testing.T) {
			c := client(t, s, change)
			s.Put("team/warehouse", map[string]any{"password": "marked-one", "n": 5, "empty": ""})
			for _, want := range []string{"marked-one", "marked-two"} {
				s.Put("team/warehouse", map[string]any{"password": want, "n": 5, "empty": "", "list": []int{1}})
				got, err := c.KV(t.Context(), "secret", "team/warehouse", "password")
				if err != nil || got.Reveal() != want {
					t.Fatalf("got %q, %v", got.Reveal(), err)
				}
			}
			if got, err := c.KV(t.Context(), "secret", "team/warehouse", "n"); err != nil || got.Reveal() != "5" {
				t.Errorf("a number: %q, %v", got.Reveal(), err)
			}
			for _, tt := range []struct{ path, field, want string }{
				{"nothing/here", "password", "has no secret/data/nothing/here: check the path"},
				{"team/warehouse", "pasword", `has no field "pasword"`},
				{"team/warehouse", "empty", "is empty"},
				{"team/warehouse", "list", "is no text"},
			} {
				_, err := c.KV(t.Context(), "secret", tt.path, tt.field)
				if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "marked") {
					t.Errorf("%s %s: got %v, want %q", tt.path, tt.field, err, tt.want)
				}
			}
		})
	}
}

func TestTroubleIsExplained(t *testing.T) {
	s, _ := start(t, time.Hour, time.Hour, time.Hour)
	s.Put("w", map[string]any{"password": "x"})
	ask := func(c *Client) error {
		_, err := c.KV(t.Context(), "secret", "w", "password")
		return err
	}
	wants := func(name, want string, err error) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: got %v, want %q on one line", name, err, want)
		}
	}
	wants("a bad token", "permission denied", ask(client(t, s, func(c *Config) { c.Token = give("marked-bad") })))
	wants("a bad secret_id", "invalid role or secret ID", ask(client(t, s, func(c *Config) {
		byAppRole(s)(c)
		c.SecretID = give("marked-bad")
	})))
	wants("no secret_id", "vault's AppRole secret_id: secret file /x is empty", ask(client(t, s, func(c *Config) {
		byAppRole(s)(c)
		c.SecretID = func(context.Context) (secret.Secret, error) {
			return secret.Secret{}, fmt.Errorf("secret file /x is empty")
		}
	})))
	wants("not trusted", "certificate", ask(client(t, s, func(c *Config) { c.RootCAs = x509.NewCertPool() })))
	wants("nobody there", "cannot reach vault at https://127.0.0.1:1", ask(client(t, s, func(c *Config) { c.Address = "https://127.0.0.1:1" })))
	s.Seal(true)
	wants("sealed", "is sealed or not ready", ask(client(t, s, nil)))
	s.Seal(false)
	_, err := client(t, s, nil).Dynamic(t.Context(), "database/creds/nobody")
	wants("unknown role", "unknown role: nobody", err)
	_, err = client(t, s, nil).Dynamic(t.Context(), "secret/data/w")
	wants("no role at all", "no username and password", err)
}

func TestTokenThatWasDroppedIsReplaced(t *testing.T) {
	s, _ := start(t, time.Hour, time.Hour, time.Hour)
	s.Put("w", map[string]any{"password": "x"})
	c := client(t, s, byAppRole(s))
	for range 3 {
		if _, err := c.KV(t.Context(), "secret", "w", "password"); err != nil {
			t.Fatal(err)
		}
		s.DropTokens()
	}
}

func TestLeaseIsShared(t *testing.T) {
	s, u := start(t, time.Hour, time.Hour, time.Hour)
	c := client(t, s, func(c *Config) { c.Grace = 100 * time.Millisecond })
	one, err := c.Dynamic(t.Context(), "database/creds/reader")
	if err != nil {
		t.Fatal(err)
	}
	two, err := c.Dynamic(t.Context(), "database/creds/reader")
	if err != nil || two.User != one.User || u.count() != 1 {
		t.Fatalf("got %s and %s, %v", one.User, two.User, err)
	}
	one.Release()
	time.Sleep(300 * time.Millisecond)
	if u.count() != 1 {
		t.Fatal("it was revoked while one used it")
	}
	two.Release()
	eventually(t, "the revocation", func() bool { return u.count() == 0 })
	three, err := c.Dynamic(t.Context(), "database/creds/reader")
	if err != nil || three.User == one.User {
		t.Fatalf("got %s again, %v", three.User, err)
	}
	if err := c.Close(); err != nil || u.count() != 0 {
		t.Fatalf("%d users are left at the end, %v", u.count(), err)
	}
	if _, err := c.Dynamic(t.Context(), "database/creds/reader"); err == nil {
		t.Fatal("a lease after the end")
	}
}

func TestLeaseIsRenewedThenReplaced(t *testing.T) {
	s, u := start(t, 3*time.Second, 5*time.Second, time.Hour)
	c := client(t, s, byAppRole(s))
	one, err := c.Dynamic(t.Context(), "database/creds/reader")
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "a renewal", func() bool { return s.Renewed() > 0 })
	select {
	case <-one.Expiring:
	case <-time.After(time.Minute):
		t.Fatal("it never expires")
	}
	two, err := c.Dynamic(t.Context(), "database/creds/reader")
	if err != nil || two.User == one.User {
		t.Fatalf("got the old one, %v", err)
	}
	one.Release()
	eventually(t, "the end of the old one", func() bool { return u.count() == 1 })
	two.Release()
}

func TestLeaseEndsWithItsToken(t *testing.T) {
	s, _ := start(t, time.Hour, time.Hour, 3*time.Second)
	c := client(t, s, byAppRole(s))
	one, err := c.Dynamic(t.Context(), "database/creds/reader")
	if err != nil {
		t.Fatal(err)
	}
	defer one.Release()
	s.DropTokens() // it can't be renewed any more
	select {
	case <-one.Expiring:
	case <-time.After(time.Minute):
		t.Fatal("nobody was told")
	}
	two, err := c.Dynamic(t.Context(), "database/creds/reader")
	if err != nil || two.User == one.User {
		t.Fatalf("got the old one, %v", err)
	}
	two.Release()
}
