package budget_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/controlplane/budget"
)

// serve guards a handler that reads its body whole and then waits.
func serve(t *testing.T, cfg budget.Config, hold <-chan struct{}) (*budget.Budget, string) {
	t.Helper()
	b := budget.New(cfg)
	s := httptest.NewServer(b.Guard(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		text, err := io.ReadAll(r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		if r.Header.Get("Hold") != "" {
			<-hold
		}
		fmt.Fprint(w, len(text))
	}), func(r *http.Request) string { return r.Header.Get("Peer") }))
	t.Cleanup(s.Close)
	return b, s.URL
}

// post sends so many bytes, of known length or not.
func post(t *testing.T, url, peer string, n int, known, hold bool) string {
	var body io.Reader = bytes.NewReader(make([]byte, n))
	if !known {
		body = io.MultiReader(body)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, body)
	if err != nil {
		t.Error(err)
		return ""
	}
	req.Header.Set("Peer", peer)
	if hold {
		req.Header.Set("Hold", "yes")
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err.Error()
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(text))
}

func TestBudget(t *testing.T) {
	hold := make(chan struct{})
	const large = 1 << 20
	b, url := serve(t, budget.Config{Total: 3 * large, Each: 2 * large, Largest: large, Wait: 50 * time.Millisecond, Read: time.Minute}, hold)
	defer http.DefaultClient.CloseIdleConnections()
	for _, test := range []struct {
		n     int
		known bool
		want  string
	}{
		{0, true, "0"},
		{100, true, "100"},
		{100, false, "100"},
		{budget.Free, false, "32768"},
		{large, true, "1048576"},
		{large, false, "1048576"},
		{large + 1, false, "the request has more bytes than any may have"},
		{2 * large, true, "the request has more bytes than any may have"},
	} {
		if got := post(t, url, "a", test.n, test.known, false); got != test.want {
			t.Errorf("%d bytes, known %v: got %q, want %q", test.n, test.known, got, test.want)
		}
	}
	if used := b.Used(); used != 0 {
		t.Fatalf("%d bytes are not given back", used)
	}
	answers := make(chan string, 3)
	begin := func(peer string) {
		before := b.Used()
		go func() { answers <- post(t, url, peer, large, true, true) }()
		deadline := time.Now().Add(30 * time.Second)
		for b.Used() == before && time.Now().Before(deadline) {
			time.Sleep(time.Millisecond)
		}
	}
	begin("a")
	begin("a")
	if got := post(t, url, "a", large, false, false); got != budget.ErrFull.Error() {
		t.Errorf("a third of one peer: %q", got)
	}
	if got := post(t, url, "a", 100, false, false); got != "100" {
		t.Errorf("a small one: %q", got)
	}
	begin("b")
	if got := post(t, url, "c", large, true, false); got != budget.ErrFull.Error() {
		t.Errorf("a fourth of all: %q", got)
	}
	close(hold)
	for range 3 {
		if got := <-answers; got != "1048576" {
			t.Error(errors.New(got))
		}
	}
	if got := post(t, url, "c", large, true, false); got != "1048576" {
		t.Errorf("afterwards: %q", got)
	}
	if used := b.Used(); used != 0 {
		t.Errorf("%d bytes are not given back", used)
	}
}
