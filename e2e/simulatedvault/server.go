package simulatedvault

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"time"

	"github.com/postern-dev/postern/proto"
)

// RootToken may do everything and does not end.
const RootToken = "simulated-root-token"

// Config is how the server behaves.
type Config struct {
	// MakeUser and DropUser make and drop the users of roles.
	MakeUser func(ctx context.Context, user, password string) error
	DropUser func(ctx context.Context, user string) error
	// LeaseLife and LongestLease bound users, TokenLife tokens of AppRole.
	LeaseLife, LongestLease, TokenLife time.Duration
}

// Server is a simulated Vault. Make one with Start; Close ends it.
type Server struct {
	cfg  Config
	http *httptest.Server

	mu      sync.Mutex
	kv      map[string]map[string]any // by mount/path
	tokens  map[string]time.Time      // and when they end; zero: never
	secret  string                    // AppRole's secret_id
	leases  map[string]*lease
	sealed  bool
	renewed int
}

type lease struct {
	user, token   string
	made, expires time.Time
}

// Start starts a server on a loopback port, with TLS.
func Start(cfg Config) *Server {
	s := &Server{cfg: cfg, kv: map[string]map[string]any{}, tokens: map[string]time.Time{RootToken: {}}, secret: "simulated-secret-id", leases: map[string]*lease{}}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/auth/approle/login", s.login)
	mux.HandleFunc("PUT /v1/auth/approle/login", s.login)
	mux.HandleFunc("PUT /v1/auth/token/renew-self", s.renewToken)
	mux.HandleFunc("POST /v1/auth/token/renew-self", s.renewToken)
	mux.HandleFunc("GET /v1/secret/data/{path...}", s.read)
	mux.HandleFunc("GET /v1/database/creds/{role}", s.creds)
	mux.HandleFunc("PUT /v1/sys/leases/renew", s.renew)
	mux.HandleFunc("PUT /v1/sys/leases/revoke", s.revoke)
	s.http = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.expire(r.Context())
		sealed := s.sealed
		ends, known := s.tokens[r.Header.Get("X-Vault-Token")]
		s.mu.Unlock()
		switch {
		case sealed:
			fail(w, http.StatusServiceUnavailable, "Vault is sealed")
		case !strings.HasSuffix(r.URL.Path, "/login") && (!known || !ends.IsZero() && time.Now().After(ends)):
			fail(w, http.StatusForbidden, "permission denied")
		default:
			mux.ServeHTTP(w, r)
		}
	}))
	return s
}

// Close ends it. Leases are left as they are.
func (s *Server) Close() { s.http.Close() }

// URL is its address.
func (s *Server) URL() string { return s.http.URL }

// CA is its certificate, in PEM.
func (s *Server) CA() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.http.Certificate().Raw})
}

// Put sets a secret at a path of the engine at "secret".
func (s *Server) Put(path string, data map[string]any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kv[path] = data
}

// Seal seals or unseals.
func (s *Server) Seal(sealed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sealed = sealed
}

// AppRole is the role's id and its secret.
func (s *Server) AppRole() (roleID, secretID string) { return "simulated-role-id", s.secret }

// DropTokens ends every token but the root's.
func (s *Server) DropTokens() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tokens = map[string]time.Time{RootToken: {}}
}

// Users are those that leases keep.
func (s *Server) Users() (users []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.leases {
		users = append(users, l.user)
	}
	return users
}

// Renewed is how often a lease was renewed.
func (s *Server) Renewed() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.renewed
}

func fail(w http.ResponseWriter, status int, message string) {
	answer(w, status, map[string]any{"errors": []string{message}})
}

func answer(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(v) //nolint:errcheck // the client has gone
}

// expire drops leases whose time, or whose token's, is over. mu is held.
func (s *Server) expire(ctx context.Context) {
	now := time.Now()
	for id, l := range s.leases {
		ends, known := s.tokens[l.token]
		if now.After(l.expires) || !known || !ends.IsZero() && now.After(ends) {
			delete(s.leases, id)
			s.cfg.DropUser(ctx, l.user) //nolint:errcheck // as Vault: tried again by an operator
		}
	}
}

func seconds(d time.Duration) int { return int((d + 500*time.Millisecond) / time.Second) }

func (s *Server) login(w http.ResponseWriter, r *http.Request) {
	var body struct {
		RoleID   string `json:"role_id"`
		SecretID string `json:"secret_id"`
	}
	role, secret := s.AppRole()
	if json.NewDecoder(r.Body).Decode(&body) != nil || body.RoleID != role || body.SecretID != secret {
		fail(w, http.StatusBadRequest, "invalid role or secret ID")
		return
	}
	token := proto.NewID("hvs_")
	s.mu.Lock()
	s.tokens[token] = time.Now().Add(s.cfg.TokenLife)
	s.mu.Unlock()
	answer(w, http.StatusOK, map[string]any{"auth": map[string]any{"client_token": token, "lease_duration": seconds(s.cfg.TokenLife), "renewable": true}})
}

func (s *Server) renewToken(w http.ResponseWriter, r *http.Request) {
	token := r.Header.Get("X-Vault-Token")
	s.mu.Lock()
	s.tokens[token] = time.Now().Add(s.cfg.TokenLife)
	s.mu.Unlock()
	answer(w, http.StatusOK, map[string]any{"auth": map[string]any{"client_token": token, "lease_duration": seconds(s.cfg.TokenLife), "renewable": true}})
}

func (s *Server) read(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	data := s.kv[r.PathValue("path")]
	s.mu.Unlock()
	if data == nil {
		answer(w, http.StatusNotFound, map[string]any{"errors": []string{}})
		return
	}
	answer(w, http.StatusOK, map[string]any{"data": map[string]any{"data": data, "metadata": map[string]any{"version": 1}}})
}

func (s *Server) creds(w http.ResponseWriter, r *http.Request) {
	if r.PathValue("role") != "reader" {
		fail(w, http.StatusBadRequest, "unknown role: "+r.PathValue("role"))
		return
	}
	user, password := "v_"+strings.ToLower(proto.NewID("u")), proto.NewID("pw-")
	if err := s.cfg.MakeUser(r.Context(), user, password); err != nil {
		fail(w, http.StatusInternalServerError, err.Error())
		return
	}
	id := "database/creds/reader/" + proto.NewID("")
	now := time.Now()
	s.mu.Lock()
	s.leases[id] = &lease{user: user, token: r.Header.Get("X-Vault-Token"), made: now, expires: now.Add(s.cfg.LeaseLife)}
	s.mu.Unlock()
	answer(w, http.StatusOK, map[string]any{
		"lease_id": id, "lease_duration": seconds(s.cfg.LeaseLife), "renewable": true,
		"data": map[string]any{"username": user, "password": password},
	})
}

func leaseID(r *http.Request) string {
	var body struct {
		LeaseID string `json:"lease_id"`
	}
	json.NewDecoder(r.Body).Decode(&body) //nolint:errcheck // "" is none
	return body.LeaseID
}

func (s *Server) renew(w http.ResponseWriter, r *http.Request) {
	id := leaseID(r)
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.leases[id]
	if l == nil {
		fail(w, http.StatusBadRequest, "lease not found")
		return
	}
	now := time.Now()
	l.expires = now.Add(s.cfg.LeaseLife)
	if last := l.made.Add(s.cfg.LongestLease); l.expires.After(last) {
		l.expires = last
	}
	s.renewed++
	answer(w, http.StatusOK, map[string]any{"lease_id": id, "lease_duration": seconds(l.expires.Sub(now)), "renewable": true})
}

func (s *Server) revoke(w http.ResponseWriter, r *http.Request) {
	id := leaseID(r)
	s.mu.Lock()
	l := s.leases[id]
	delete(s.leases, id)
	s.mu.Unlock()
	if l != nil {
		if err := s.cfg.DropUser(r.Context(), l.user); err != nil {
			fail(w, http.StatusInternalServerError, fmt.Sprint(err))
			return
		}
	}
	w.WriteHeader(http.StatusNoContent)
}
