package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"io"
	"net/http"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/tunnel"
)

// endless is a JSON string that goes on for so many bytes; it costs no memory.
type endless struct{ left int64 }

func (e *endless) Read(p []byte) (int, error) {
	if e.left <= 0 {
		return 0, io.EOF
	}
	n := int(min(e.left, int64(len(p))))
	for i := range n {
		p[i] = 'a'
	}
	e.left -= int64(n)
	return n, nil
}

// floodBytes is how much each request of the flood says, and floodMemory how much the heap may grow by in all: the
// control plane's and, since they are one process here, the agent's end of the tunnel.
const (
	floodBytes  = 48 << 20
	floodMemory = 640 << 20
)

// TestHostileAgentFloods is an agent that says far too much, by every request that agents have and many at once: each is
// refused, and the control plane's memory stays within bounds, as does its service to others.
func TestHostileAgentFloods(t *testing.T) {
	s := startServer(t)
	a := joined(t, s, s.token, "flood")
	good := joined(t, s, s.token, "good")
	good.answer(func(context.Context, *posternv1.SQLRequest, io.Writer) *posternv1.QueryOutcome {
		return &posternv1.QueryOutcome{Rows: 1}
	})
	tn, err := a.dial(t.Context(), []tls.Certificate{a.cert})
	if err != nil {
		t.Fatal(err)
	}
	defer tn.Close(nil)
	if _, err := linkClient(tn).Hello(t.Context(), connect.NewRequest(&posternv1.HelloRequest{Version: proto.Version()})); err != nil {
		t.Fatal(err)
	}
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	runtime.GC()
	before := heap()
	var most atomic.Uint64
	watched, stop := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(watched)
		for {
			select {
			case <-stop:
				return
			case <-time.After(5 * time.Millisecond):
			}
			if now := heap(); now > most.Load() {
				most.Store(now)
			}
		}
	}()
	client := &http.Client{Transport: tn.Transport(tunnel.Bulk)}
	var work sync.WaitGroup
	var answered atomic.Int64
	for procedure, method := range procedures(func(service string) bool { return slices.Contains(agentServices, service) }) {
		contentType := "application/json"
		if method.IsStreamingServer() {
			contentType = "application/connect+json"
		}
		for range 3 {
			work.Go(func() {
				begin := []byte("{\"name\":\"")
				if method.IsStreamingServer() {
					begin = append(binary.BigEndian.AppendUint32([]byte{0}, floodBytes), begin...)
				}
				req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://controlplane"+procedure, io.MultiReader(bytes.NewReader(begin), &endless{floodBytes}))
				if err != nil {
					t.Error(err)
					return
				}
				req.Header.Set("Content-Type", contentType)
				resp, err := client.Do(req)
				if err != nil {
					return // it hung up on us
				}
				defer resp.Body.Close()
				answer, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<20)) //nolint:errcheck // as far as it goes
				if resp.StatusCode == http.StatusOK && !bytes.Contains(answer, []byte("\"error\"")) {
					t.Errorf("%s: it was taken: %.200s", procedure, answer)
				}
				answered.Add(1)
			})
		}
	}
	// Meanwhile others are served.
	for range 5 {
		if _, outcome, err := s.run(t.Context(), s.token, "good/shop", `{"sql":"x"}`); err != nil || outcome.Error != nil {
			t.Errorf("another agent's statement: %v, %v", outcome, err)
		}
	}
	work.Wait()
	close(stop)
	<-watched
	if grown := int64(most.Load()) - int64(before); grown > floodMemory {
		t.Errorf("the heap grew by %d MiB, more than %d", grown>>20, floodMemory>>20)
	} else {
		t.Logf("the heap grew by %d MiB at most; %d requests were answered", grown>>20, answered.Load())
	}
	if _, outcome, err := s.run(t.Context(), s.token, "good/shop", `{"sql":"x"}`); err != nil || outcome.Error != nil {
		t.Errorf("afterwards: %v, %v", outcome, err)
	}
}
