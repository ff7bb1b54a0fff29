package token_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/postern-dev/postern/controlplane/ratelimit"
	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/controlplane/token"
	"github.com/postern-dev/postern/e2e/storetest"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

var ctx = context.Background()

func wantCode(t *testing.T, err error, want proto.Code) {
	t.Helper()
	if proto.CodeOf(err) != want {
		t.Fatalf("got error %v (%v), want %v", err, proto.CodeOf(err), want)
	}
}

// clock is a settable clock.
type clock struct {
	mu sync.Mutex
	at time.Time
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = c.at.Add(d)
}

func TestText(t *testing.T) {
	text := token.NewText()
	got, err := token.Parse(text.Encode())
	if err != nil || got != text || got.Hash() != text.Hash() {
		t.Fatalf("got %v, %v", got, err)
	}
	secret := text.Encode()[len("pst1_")+27:]
	encoded, err := json.Marshal(text)
	if err != nil {
		t.Fatal(err)
	}
	for _, shown := range []string{fmt.Sprint(text), fmt.Sprintf("%v %+v %#v %s", text, text, text, text), string(encoded), text.LogValue().String()} {
		if strings.Contains(shown, secret[:8]) || !strings.Contains(shown, "redacted") {
			t.Errorf("shown as %q", shown)
		}
	}
	// No single character may be changed, dropped or doubled.
	whole := text.Encode()
	for i := range whole {
		for _, c := range []string{"", "a", "b", "z", "_", "A", whole[i:i+1] + whole[i:i+1]} {
			changed := whole[:i] + c + whole[i+1:]
			if _, err := token.Parse(changed); changed != whole && err == nil {
				t.Errorf("accepted with character %d as %q", i, c)
			} else if err != nil && strings.Contains(err.Error(), secret[:8]) {
				t.Errorf("the error quotes the secret: %v", err)
			}
		}
	}
	for _, bad := range []string{"", "pst1_", "prk1_abc", " " + whole, whole + "\n", strings.Repeat("a", 300)} {
		_, err := token.Parse(bad)
		wantCode(t, err, proto.CodeUnauthenticated)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(token.NewText().Encode())
	f.Add("pst1_00000000000000000000000000_a")
	f.Fuzz(func(t *testing.T, text string) {
		if got, err := token.Parse(text); err == nil && got.Encode() != text {
			t.Errorf("%q is another token's text", text)
		}
	})
}

func TestRoles(t *testing.T) {
	all := []token.Role{token.Viewer, token.Analyst, token.Operator, token.Admin}
	for i, have := range all {
		for j, need := range all {
			if got := have.Includes(need); got != (i >= j) {
				t.Errorf("%s includes %s: got %v", have, need, got)
			}
		}
		if have.Includes("root") || token.Role("root").Includes(have) || token.Role("").Includes("") {
			t.Error("what is no role includes something")
		}
		if got, err := token.ParseRole(string(have)); got != have || err != nil {
			t.Errorf("got %v, %v", got, err)
		}
	}
	_, err := token.ParseRole("Admin")
	wantCode(t, err, proto.CodeInvalid)
}

func TestAuthenticate(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		c := &clock{at: time.Now()}
		service := token.New(token.Config{Store: s, Now: c.now, Failures: ratelimit.New(1e-6, 12)})
		replica := token.New(token.Config{Store: s, Now: c.now})
		acme, err := s.CreateOrganization(ctx, "acme", c.now())
		if err != nil {
			t.Fatal(err)
		}
		made, text, err := service.Create(ctx, acme.Id, "ci", "analyst", time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		p, err := service.Authenticate(ctx, text, "192.0.2.1:99")
		if err != nil || p.Organization != acme.Id || p.OrganizationName != "acme" || p.TokenId != made.Id || p.TokenName != "ci" || p.Role != "analyst" ||
			!p.Expires.Equal(c.now().Add(time.Hour).UTC().Truncate(time.Millisecond)) || p.Remote != "192.0.2.1:99" {
			t.Fatalf("got %+v, %v", p, err)
		}
		if tokens, err := s.ListTokens(ctx, acme.Id); err != nil || tokens[0].LastUsed == nil {
			t.Errorf("last use not recorded: %v, %v", tokens, err)
		}

		// The same id with another secret, and an unknown id: the same answer.
		parts := strings.SplitN(text, "_", 3)
		for _, bad := range []string{token.NewText().Encode(), "pst1_" + parts[1] + "_" + strings.Repeat("a", 58), "", "x"} {
			_, err := service.Authenticate(ctx, bad, "192.0.2.2:1")
			wantCode(t, err, proto.CodeUnauthenticated)
		}

		_, other, err := service.Create(ctx, acme.Id, "", "viewer", 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := replica.Authenticate(ctx, other, ""); err != nil {
			t.Fatal(err)
		}
		if _, err := service.Revoke(ctx, acme.Id, "ci"); err != nil {
			t.Fatal(err)
		}
		_, err = service.Authenticate(ctx, text, "192.0.2.1:99")
		wantCode(t, err, proto.CodeUnauthenticated)
		if !strings.Contains(err.Error(), "revoked") {
			t.Errorf("got %v", err)
		}
		_, _, err = service.Create(ctx, acme.Id, "x", "root", 0)
		wantCode(t, err, proto.CodeInvalid)
		_, _, err = service.Create(ctx, acme.Id, "x", "viewer", -time.Second)
		wantCode(t, err, proto.CodeInvalid)

		// Another process learns of a disabled organization within five seconds.
		if _, err := s.SetOrganizationDisabled(ctx, acme.Id, true, c.now()); err != nil {
			t.Fatal(err)
		}
		service.Forget()
		_, err = service.Authenticate(ctx, other, "192.0.2.1:99")
		wantCode(t, err, proto.CodeOrganizationDisabled)
		c.advance(4 * time.Second)
		if _, err := replica.Authenticate(ctx, other, ""); err != nil {
			t.Errorf("not cached: %v", err)
		}
		c.advance(time.Second)
		_, err = replica.Authenticate(ctx, other, "")
		wantCode(t, err, proto.CodeOrganizationDisabled)
		if _, err := s.SetOrganizationDisabled(ctx, acme.Id, false, c.now()); err != nil {
			t.Fatal(err)
		}
		c.advance(91 * 24 * time.Hour)
		_, err = service.Authenticate(ctx, other, "192.0.2.1:99")
		wantCode(t, err, proto.CodeUnauthenticated)
		if !strings.Contains(err.Error(), "expired") {
			t.Errorf("got %v", err)
		}
	})
}

func TestRotate(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		c := &clock{at: time.Unix(1_800_000_000, 0)}
		service := token.New(token.Config{Store: s, Now: c.now})
		if _, err := s.EnsureDefaultOrganization(ctx, c.now()); err != nil {
			t.Fatal(err)
		}
		org := store.DefaultOrganizationID
		made, first, err := service.Create(ctx, org, "ci", "analyst", 24*time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		good := func(text string) token.Principal {
			t.Helper()
			p, err := service.Authenticate(ctx, text, "")
			if err != nil || p.TokenId != made.Id || p.Role != "analyst" || p.TokenName != "ci" {
				t.Fatalf("got %+v, %v", p, err)
			}
			return p
		}
		bad := func(text, why string) {
			t.Helper()
			_, err := service.Authenticate(ctx, text, "")
			wantCode(t, err, proto.CodeUnauthenticated)
			if err == nil || !strings.Contains(err.Error(), why) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v, want %s", err, why)
			}
		}
		good(first)
		now, second, until, err := service.Rotate(ctx, org, "ci", time.Hour, 0)
		if err != nil || now.Id != made.Id || now.Role != "analyst" || second == first || !until.Equal(c.now().Add(time.Hour)) ||
			!now.Expires.AsTime().Equal(c.now().Add(90*24*time.Hour)) {
			t.Fatalf("got %v until %v, %v", now, until, err)
		}
		if p := good(first); !p.Expires.Equal(until) {
			t.Errorf("the old secret ends at %v, want %v", p.Expires, until)
		}
		if p := good(second); !p.Expires.Equal(now.Expires.AsTime()) {
			t.Errorf("the new secret ends at %v", p.Expires)
		}
		c.advance(59 * time.Minute)
		good(first)
		c.advance(time.Minute) // and no cache serves it longer
		bad(first, "was rotated")
		good(second)

		// At most two are good; without an overlap one is, at once.
		_, third, _, err := service.Rotate(ctx, org, made.Id, time.Hour, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		bad(first, "does not know")
		_, fourth, _, err := service.Rotate(ctx, org, "ci", 0, 2*time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		bad(second, "does not know")
		bad(third, "was rotated")
		good(fourth)

		// The old secret never outlives what it would have had.
		c.advance(90 * time.Minute)
		_, fifth, until, err := service.Rotate(ctx, org, "ci", 24*time.Hour, 0)
		if err != nil || !until.Equal(c.now().Add(30*time.Minute)) {
			t.Errorf("the old secret ends at %v, %v", until, err)
		}
		c.advance(30 * time.Minute)
		bad(fourth, "was rotated")
		good(fifth)

		// Revoked, both end, and it can't be rotated.
		_, sixth, _, err := service.Rotate(ctx, org, "ci", time.Hour, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := service.Revoke(ctx, org, "ci"); err != nil {
			t.Fatal(err)
		}
		bad(fifth, "revoked")
		bad(sixth, "revoked")
		for _, name := range []string{"ci", made.Id, "nobody"} {
			_, _, _, err = service.Rotate(ctx, org, name, 0, 0)
			wantCode(t, err, proto.CodeNotFound)
		}
		for _, wrong := range [][2]time.Duration{{-1, 0}, {token.MaxOverlap + 1, 0}, {0, -1}, {0, 20 * 365 * 24 * time.Hour}} {
			_, _, _, err = service.Rotate(ctx, org, "ci", wrong[0], wrong[1])
			wantCode(t, err, proto.CodeInvalid)
		}
	})
}

func TestRotateKeepsOneWithoutEnd(t *testing.T) {
	s := storetest.SQLite(t)
	service := token.New(token.Config{Store: s})
	file := filepath.Join(t.TempDir(), "admin.token")
	if _, err := service.Bootstrap(ctx, file); err != nil {
		t.Fatal(err)
	}
	got, text, _, err := service.Rotate(ctx, store.DefaultOrganizationID, "admin", 0, 0)
	if err != nil || got.Expires != nil {
		t.Fatalf("got %v, %v", got, err)
	}
	if p, err := service.Authenticate(ctx, text, ""); err != nil || !p.Expires.IsZero() {
		t.Errorf("got %+v, %v", p, err)
	}
	if got, _, _, err = service.Rotate(ctx, store.DefaultOrganizationID, "admin", 0, time.Hour); err != nil || got.Expires == nil {
		t.Errorf("with an end: got %v, %v", got, err)
	}
}

func TestExpiryEndsTheCache(t *testing.T) {
	s := storetest.SQLite(t)
	c := &clock{at: time.Now().Truncate(time.Millisecond)}
	service := token.New(token.Config{Store: s, Now: c.now})
	org, err := s.EnsureDefaultOrganization(ctx, c.now())
	if err != nil {
		t.Fatal(err)
	}
	_, text, err := service.Create(ctx, org.Id, "", "viewer", 2*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := service.Authenticate(ctx, text, ""); err != nil {
		t.Fatal(err)
	}
	c.advance(2 * time.Second)
	_, err = service.Authenticate(ctx, text, "")
	wantCode(t, err, proto.CodeUnauthenticated)
}

func TestFailuresAreLimited(t *testing.T) {
	s := storetest.SQLite(t)
	service := token.New(token.Config{Store: s, Failures: ratelimit.New(1e-6, 3)})
	if _, err := service.Bootstrap(ctx, filepath.Join(t.TempDir(), "admin.token")); err != nil {
		t.Fatal(err)
	}
	_, good, err := service.Create(ctx, store.DefaultOrganizationID, "", "viewer", 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := service.Authenticate(ctx, good, "[2001:db8::1]:5"); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		_, err := service.Authenticate(ctx, "bad", fmt.Sprintf("[2001:db8::%d]:7", i+2))
		wantCode(t, err, proto.CodeUnauthenticated)
	}
	_, err = service.Authenticate(ctx, "bad", "[2001:db8::9]:1")
	wantCode(t, err, proto.CodeRateLimited)
	if _, err := service.Authenticate(ctx, "bad", "[2001:db8:1::9]:1"); proto.CodeOf(err) != proto.CodeUnauthenticated {
		t.Errorf("another network is limited too: %v", err)
	}
	if _, err := service.Authenticate(ctx, good, "[2001:db8::1]:6"); err != nil {
		t.Errorf("a token that was good a moment ago is refused: %v", err)
	}
}

func TestBootstrap(t *testing.T) {
	dir := t.TempDir()
	db, file := filepath.Join(dir, "postern.db"), filepath.Join(dir, "admin.token")
	s := storetest.Open(t, store.Config{SQLitePath: db})
	c := &clock{at: time.Now()}
	service := token.New(token.Config{Store: s, Now: c.now})
	read := func() string {
		t.Helper()
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSuffix(string(content), "\n")
	}
	if wrote, err := service.Bootstrap(ctx, file); err != nil || !wrote {
		t.Fatalf("got %v, %v", wrote, err)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	first := read()
	p, err := service.Authenticate(ctx, first, "")
	if err != nil || p.Role != "admin" || p.OrganizationName != "default" || !p.Expires.IsZero() {
		t.Fatalf("got %+v, %v", p, err)
	}
	if storetest.Contains(t, db, []byte(first)) || storetest.Contains(t, db, []byte(first[len("pst1_")+27:])) {
		t.Error("the database holds the token's secret")
	}
	// An operator may delete the file; a restart makes no other token.
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if wrote, err := service.Bootstrap(ctx, file); err != nil || wrote {
		t.Fatalf("again: got %v, %v", wrote, err)
	}
	// But it does when no admin is left, even if the name is taken.
	if _, err := service.Revoke(ctx, store.DefaultOrganizationID, "admin"); err != nil {
		t.Fatal(err)
	}
	if _, _, err := service.Create(ctx, store.DefaultOrganizationID, "admin", "viewer", 0); err != nil {
		t.Fatal(err)
	}
	if wrote, err := service.Bootstrap(ctx, file); err != nil || !wrote {
		t.Fatalf("without an admin: got %v, %v", wrote, err)
	}
	if p, err := service.Authenticate(ctx, read(), ""); err != nil || p.Role != "admin" {
		t.Errorf("got %+v, %v", p, err)
	}
	if files, err := os.ReadDir(dir); err != nil || len(files) > 5 {
		t.Errorf("files left: %v, %v", files, err)
	}
}

// TestBootstrapTogether: of several control planes on one store one makes the
// token, and the others leave no file that does not work.
func TestBootstrapTogether(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		service := token.New(token.Config{Store: s})
		var wg sync.WaitGroup
		files := make([]string, 6)
		for i := range files {
			files[i] = filepath.Join(t.TempDir(), "admin.token")
			wg.Go(func() {
				if _, err := service.Bootstrap(ctx, files[i]); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		found := 0
		for _, file := range files {
			content, err := os.ReadFile(file)
			if errors.Is(err, os.ErrNotExist) {
				continue
			}
			found++
			if _, err := service.Authenticate(ctx, strings.TrimSpace(string(content)), ""); err != nil {
				t.Errorf("%s: %v", file, err)
			}
		}
		tokens, err := s.ListTokens(ctx, store.DefaultOrganizationID)
		if err != nil || len(tokens) != 1 || found != 1 {
			t.Errorf("%d tokens, %d files, %v", len(tokens), found, err)
		}
	})
}

// TestRevokedDuringLookUp: an answer that was asked for before a revocation is
// not kept after it.
func TestRevokedDuringLookUp(t *testing.T) {
	s := storetest.SQLite(t)
	slow := &pausing{Store: s, reached: make(chan struct{}), resume: make(chan struct{})}
	service := token.New(token.Config{Store: slow})
	if _, err := s.EnsureDefaultOrganization(ctx, time.Now()); err != nil {
		t.Fatal(err)
	}
	_, text, err := service.Create(ctx, store.DefaultOrganizationID, "x", "viewer", 0)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		_, err := service.Authenticate(ctx, text, "")
		done <- err
	}()
	<-slow.reached
	if _, err := service.Revoke(ctx, store.DefaultOrganizationID, "x"); err != nil {
		t.Fatal(err)
	}
	close(slow.resume)
	if err := <-done; err != nil {
		t.Fatal(err) // it was good when it was looked up
	}
	_, err = service.Authenticate(ctx, text, "")
	wantCode(t, err, proto.CodeUnauthenticated)
}

// pausing answers the first look-up late.
type pausing struct {
	token.Store
	once            sync.Once
	reached, resume chan struct{}
}

func (p *pausing) TokenByID(ctx context.Context, id string) (*posternv1.Organization, *posternv1.Token, [32]byte, error) {
	o, t, hash, err := p.Store.TokenByID(ctx, id)
	p.once.Do(func() { close(p.reached); <-p.resume })
	return o, t, hash, err
}

// TestAuthenticateAs: the right token under a wrong name is as unknown as any.
func TestAuthenticateAs(t *testing.T) {
	s := storetest.SQLite(t)
	service := token.New(token.Config{Store: s, Failures: ratelimit.New(1e-6, 3)})
	org, err := s.EnsureDefaultOrganization(ctx, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	_, text, err := service.Create(ctx, org.Id, "ana", "analyst", 0)
	if err != nil {
		t.Fatal(err)
	}
	if p, err := service.AuthenticateAs(ctx, "ana", text, "192.0.2.1"); err != nil || p.TokenName != "ana" {
		t.Fatalf("got %v, %v", p, err)
	}
	_, unknown := service.AuthenticateAs(ctx, "ana", token.NewText().Encode(), "192.0.2.1")
	_, wrong := service.AuthenticateAs(ctx, "Ana", text, "192.0.2.1")
	wantCode(t, wrong, proto.CodeUnauthenticated)
	if wrong.Error() != unknown.Error() {
		t.Errorf("a wrong name: %v; an unknown token: %v", wrong, unknown)
	}
	_, err = service.AuthenticateAs(ctx, "", text, "192.0.2.1")
	wantCode(t, err, proto.CodeUnauthenticated)
	// Three failures were all that the address had.
	_, err = service.AuthenticateAs(ctx, "bob", text, "192.0.2.1")
	wantCode(t, err, proto.CodeRateLimited)
	if _, err := service.AuthenticateAs(ctx, "ana", text, "192.0.2.1"); err != nil {
		t.Errorf("a token that was good a moment ago: %v", err)
	}
}
