package e2e

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/postern-dev/postern/e2e/nginxtest"
)

// TestRollingRestart restarts two replicas in turns, behind the nginx of docs/nginx.md,
// under 50 statements a second: none fails.
func TestRollingRestart(t *testing.T) {
	t.Parallel()
	set := newReplicas(t, 2)
	one, two := set.all[0], set.all[1]
	front := nginxtest.Start(t, nginxtest.Options{Upstreams: []string{one.Listen, two.Listen}})
	one.CAFile = front.CAFile
	for i := range 3 {
		set.join(t, one, fmt.Sprintf("host%d", i), front.URL)
	}
	one.CAFile = ""
	token, err := os.ReadFile(one.TokenFile)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{TLSClientConfig: front.TLS(), MaxIdleConnsPerHost: 64}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, Timeout: 2 * time.Minute}

	// ask runs one statement to its end.
	ask := func(n int) error {
		body := fmt.Sprintf(`{"sql":"select %d as n, pg_sleep(0.05)"}`, n)
		req, err := http.NewRequestWithContext(context.Background(), http.MethodPost, fmt.Sprintf("%s/api/v1/sql/host%d/db?format=csv", front.URL, n%3), strings.NewReader(body))
		if err != nil {
			return err
		}
		req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		got, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != http.StatusOK || !strings.Contains(string(got), fmt.Sprint(n)) {
			return fmt.Errorf("status %d, %w, %q", resp.StatusCode, err, got)
		}
		return nil
	}
	if err := ask(0); err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	var mu sync.Mutex
	asked, failed := 0, []string{}
	stop := make(chan struct{})
	work.Go(func() {
		ticker := time.NewTicker(20 * time.Millisecond)
		defer ticker.Stop()
		// A machine that is too slow for the rate must not pile up what nobody answers.
		places := make(chan struct{}, 40)
		for n := 1; ; n++ {
			select {
			case <-stop:
				return
			case <-ticker.C:
			}
			select {
			case <-stop:
				return
			case places <- struct{}{}:
			}
			work.Go(func() {
				defer func() { <-places }()
				err := ask(n)
				mu.Lock()
				defer mu.Unlock()
				asked++
				if err != nil {
					failed = append(failed, fmt.Sprintf("%s: %d: %v", time.Now().Format(time.StampMilli), n, err))
				}
			})
		}
	})
	for range 2 {
		for i, s := range set.all {
			began := time.Now()
			s.ControlPlane.Signal(syscall.SIGTERM)
			select {
			case <-s.ControlPlane.Done():
			case <-time.After(2 * time.Minute):
				t.Fatalf("replica %d does not stop", i)
			}
			t.Logf("%s: replica %d stopped in %v", time.Now().Format(time.StampMilli), i, time.Since(began))
			startControlPlane(t, s)
			t.Logf("%s: replica %d serves", time.Now().Format(time.StampMilli), i)
		}
	}
	close(stop)
	work.Wait()
	t.Logf("%d statements, %d failed", asked, len(failed))
	for i, f := range failed {
		if i == 5 {
			break
		}
		t.Errorf("failed: %s", f)
	}
	auditVerifies(t, one)
}
