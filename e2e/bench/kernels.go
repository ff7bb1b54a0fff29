package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/client"
	"github.com/postern-dev/postern/e2e/stack"
	"github.com/postern-dev/postern/proto/jupyter"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// kernelConfig is the agent's configuration for measuring kernels: one waits.
const kernelConfig = "kernels:\n  specs: [python3]\n  warm: 1\n"

// measureKernels measures kernels from a client through control plane, tunnel and
// shim: the round trip of a cell, the start from the warm pool to the first result,
// and much output.
func measureKernels(ctx context.Context, o Options, r *Report) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("kernels need root")
	}
	s, err := stack.New(stack.Options{Bin: o.Bin})
	if err != nil {
		return err
	}
	defer s.Close() //nolint:errcheck // a throwaway
	if err := s.StartControlPlane(ctx); err != nil {
		return err
	}
	if _, err := s.Join(ctx, "bench", kernelConfig); err != nil {
		return err
	}
	token, err := os.ReadFile(s.TokenFile)
	if err != nil {
		return err
	}
	c, err := client.New(client.Config{URL: s.URL, Token: client.StaticToken(client.NewSecret(strings.TrimSpace(string(token)))), CAFile: s.CAFile})
	if err != nil {
		return err
	}
	defer c.Close()

	trips, starts, lines := 300, 5, 1_000_000
	if o.Short {
		trips, starts, lines = 30, 2, 50_000
	}
	var firsts []float64
	for range starts {
		time.Sleep(4 * time.Second) // the pool fills up
		k, first, err := startKernel(ctx, c)
		if err != nil {
			return err
		}
		firsts = append(firsts, first)
		if err := k.stop(ctx); err != nil {
			return err
		}
	}
	slices.Sort(firsts)
	r.Printf("start to first result: %.0f ms median, %.0f ms at best", firsts[len(firsts)/2], firsts[0])
	r.AtMost("kernel_warm_start", firsts[len(firsts)/2], 300, "ms")

	k, _, err := startKernel(ctx, c)
	if err != nil {
		return err
	}
	defer k.stop(ctx) //nolint:errcheck // a throwaway
	var took []float64
	for range trips {
		began := time.Now()
		if _, err := k.run(ctx, "1"); err != nil {
			return err
		}
		took = append(took, float64(time.Since(began).Microseconds())/1000)
	}
	slices.Sort(took)
	r.Printf("execute round trip: %.1f ms median, %.1f ms at the 99th percentile", took[len(took)/2], took[len(took)*99/100])
	r.AtMost("execute-roundtrip", took[len(took)/2], 10, "ms")

	began := time.Now()
	bytes, err := k.run(ctx, fmt.Sprintf("for i in range(%d): print('%%0100d' %% i)", lines))
	if err != nil {
		return err
	}
	seconds := time.Since(began).Seconds()
	r.Printf("%d lines, %.0f MB of output: %.1f s, %.1f MB/s", lines, float64(bytes)/1e6, seconds, float64(bytes)/1e6/seconds)
	if want := lines * 101; bytes != want {
		return fmt.Errorf("%d bytes of output arrived, not %d", bytes, want)
	}
	return nil
}

// benchKernel is a kernel and a client of it.
type benchKernel struct {
	client   *client.Client
	agent    string
	id       string
	channels *client.KernelChannels
}

// startKernel starts a kernel and runs a first cell; first is what both took, in
// milliseconds.
func startKernel(ctx context.Context, c *client.Client) (k *benchKernel, first float64, err error) {
	return startKernelOn(ctx, c, "bench")
}

func startKernelOn(ctx context.Context, c *client.Client, agent string) (k *benchKernel, first float64, err error) {
	began := time.Now()
	started, err := c.Kernels.StartKernel(ctx, connect.NewRequest(&posternv1.StartAgentKernelRequest{Agent: agent, Spec: "python3"}))
	if err != nil {
		return nil, 0, err
	}
	k = &benchKernel{client: c, agent: agent, id: started.Msg.Kernel.Id}
	if err := k.attach(ctx); err != nil {
		return nil, 0, err
	}
	_, err = k.run(ctx, "6*7")
	return k, float64(time.Since(began).Microseconds()) / 1000, err
}

// attach makes a client of it.
func (k *benchKernel) attach(ctx context.Context) (err error) {
	k.channels, err = k.client.KernelChannels(ctx, k.agent, k.id, jupyter.NewID())
	return err
}

// run runs a cell and returns how many bytes it printed.
func (k *benchKernel) run(ctx context.Context, code string) (bytes int, err error) {
	m, err := jupyter.New(jupyter.Shell, "execute_request", k.channels.Session(), map[string]any{"code": code, "silent": false, "store_history": true, "allow_stdin": false})
	if err != nil {
		return 0, err
	}
	asked, err := jupyter.ParseHeader(m.Header)
	if err != nil {
		return 0, err
	}
	if err := k.channels.Send(ctx, m); err != nil {
		return 0, err
	}
	for idle, replied := false, false; !idle || !replied; {
		m, err := k.channels.Receive(ctx)
		if err != nil {
			return bytes, err
		}
		h, err := jupyter.ParseHeader(m.Header)
		if err != nil {
			return bytes, err
		}
		parent, err := jupyter.ParseHeader(m.ParentHeader)
		if err != nil || parent.ID != asked.ID {
			continue
		}
		switch {
		case h.Type == "stream":
			var content struct{ Text string }
			if err := json.Unmarshal(m.Content, &content); err != nil {
				return bytes, err
			}
			bytes += len(content.Text)
		case h.Type == "status":
			idle = idle || strings.Contains(string(m.Content), `"idle"`)
		case h.Type == "error":
			return bytes, fmt.Errorf("the cell failed: %s", m.Content)
		case m.Channel == jupyter.Shell:
			replied = true
		}
	}
	return bytes, nil
}

func (k *benchKernel) stop(ctx context.Context) error {
	k.channels.Close()
	_, err := k.client.Kernels.StopKernel(ctx, connect.NewRequest(&posternv1.AgentKernelRequest{KernelId: k.id}))
	return err
}
