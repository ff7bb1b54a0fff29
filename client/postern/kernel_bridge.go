package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/postern-dev/postern/client"
	"github.com/postern-dev/postern/client/internal/zmtp"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/jupyter"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// maxConnectionFile bounds a connection file, in bytes.
	maxConnectionFile = 64 << 10
	// maxAsked bounds the requests of which is known who sent them.
	maxAsked = 4096
	// stopTime bounds the stop of the kernel when the bridge ends.
	stopTime = 10 * time.Second
)

func (a *app) kernelBridgeCommand() *cobra.Command {
	var file, agent, spec, install, display string
	cmd := &cobra.Command{
		Use: "bridge --agent AGENT (-f FILE | --install NAME)", Short: "Be a local Jupyter kernel that runs on an agent",
		Long: "With --install, writes a kernelspec into your Jupyter directory: jupyter console --kernel NAME, JupyterLab and\n" +
			"everything else that starts kernels locally then runs them on the agent, without settings of their own.\n" +
			"With -f, is such a kernel: Jupyter calls it so. The kernel on the agent ends with the bridge.",
		Example: "  postern kernel bridge --install edge --agent edge-1\n  jupyter console --kernel edge",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if agent == "" || (file == "") == (install == "") {
				return usagef("postern kernel bridge needs --agent, and either --install NAME or -f FILE")
			}
			return a.with(func(c *client.Client) error {
				if install != "" {
					return a.installBridge(cmd.Context(), c, install, display, agent, spec)
				}
				return a.bridge(cmd.Context(), c, file, agent, spec)
			})
		},
	}
	cmd.Flags().StringVarP(&file, "connection-file", "f", "", "Jupyter's connection file")
	cmd.Flags().StringVar(&agent, "agent", "", "the agent")
	cmd.Flags().StringVar(&spec, "spec", "", "kernelspec on the agent (default: the agent's own)")
	cmd.Flags().StringVar(&install, "install", "", "write a kernelspec with this name")
	cmd.Flags().StringVar(&display, "display-name", "", "what the kernelspec is called in menus")
	cmd.RegisterFlagCompletionFunc("agent", a.completeAgents)                                       //nolint:errcheck // fails on unknown flags alone
	cmd.RegisterFlagCompletionFunc("spec", a.completeSpecs(func([]string) string { return agent })) //nolint:errcheck // likewise
	return cmd
}

// jupyterDir is the user's Jupyter directory; see jupyter_core's paths.
func (a *app) jupyterDir() (string, error) {
	if dir := a.getenv("JUPYTER_DATA_DIR"); dir != "" {
		return dir, nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", fmt.Errorf("find the Jupyter directory: %w", err)
	}
	switch runtime.GOOS {
	case "darwin":
		return filepath.Join(home, "Library", "Jupyter"), nil
	case "windows":
		return filepath.Join(firstOf(a.getenv("APPDATA"), filepath.Join(home, "AppData", "Roaming")), "jupyter"), nil
	}
	return filepath.Join(firstOf(a.getenv("XDG_DATA_HOME"), filepath.Join(home, ".local", "share")), "jupyter"), nil
}

var kernelName = regexp.MustCompile(`^[A-Za-z0-9._-]{1,100}$`)

// installBridge writes a kernelspec. It holds no token: the bridge reads that where
// the other commands do.
func (a *app) installBridge(ctx context.Context, c *client.Client, name, display, agent, spec string) error {
	if !kernelName.MatchString(name) {
		return usagef("--install is %q: a kernelspec's name has letters, digits, dots, dashes and underscores", name)
	}
	resp, err := c.Kernels.ListKernelSpecs(ctx, connect.NewRequest(&posternv1.ListAgentKernelSpecsRequest{Agent: agent}))
	if err != nil {
		return err
	}
	var there *posternv1.KernelSpec
	for _, s := range resp.Msg.Specs {
		if s.Name == firstOf(spec, resp.Msg.Default) {
			there = s
		}
	}
	if there == nil {
		return proto.Errorf(proto.CodeNotFound, "agent %s offers no kernelspec %q: see `postern kernel specs %s`", agent, firstOf(spec, resp.Msg.Default), agent)
	}
	binary, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	argv := []string{binary, "kernel", "bridge", "-f", "{connection_file}", "--agent", agent, "--spec", there.Name}
	for _, flag := range []struct{ name, value string }{{"--token-file", a.tokenFile}, {"--ca-file", a.caFile}} {
		if flag.value == "" || flag.value == "-" {
			continue
		}
		path, err := absolute(flag.value)
		if err != nil {
			return err
		}
		argv = append(argv, flag.name, path)
	}
	if a.urlFlag != "" {
		argv = append(argv, "--url", c.URL())
	}
	text, err := json.MarshalIndent(map[string]any{
		"argv": argv, "display_name": firstOf(display, there.DisplayName+" on "+agent), "language": there.Language,
		"interrupt_mode": "message", "metadata": map[string]any{"postern": map[string]string{"agent": agent, "spec": there.Name}},
	}, "", "  ")
	if err != nil {
		return err
	}
	dir, err := a.jupyterDir()
	if err != nil {
		return err
	}
	dir = filepath.Join(dir, "kernels", strings.ToLower(name)) // names are the same in any case
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("write the kernelspec: %w", err)
	}
	path := filepath.Join(dir, "kernel.json")
	if err := os.WriteFile(path, append(text, '\n'), 0o644); err != nil {
		return fmt.Errorf("write the kernelspec: %w", err)
	}
	a.info("kernelspec %s written: try jupyter console --kernel %s", path, strings.ToLower(name))
	return nil
}

// bridge is a kernel's end of a Jupyter connection whose kernel is on an agent.
type bridge struct {
	app      *app
	client   *client.Client
	signer   *jupyter.Signer
	kernel   string
	agent    string
	channels *client.KernelChannels
	routers  map[string]*zmtp.Router // shell, stdin, control
	iopub    *zmtp.Pub
	ready    chan struct{} // closed when the above are there
	end      chan error    // holds the first reason to end

	mu    sync.Mutex
	asked map[string]string // the sender's identity by a request's msg_id
	order []string
}

func (a *app) bridge(parent context.Context, c *client.Client, file, agent, spec string) error {
	text, err := readSmall(file, maxConnectionFile)
	if err != nil {
		return fmt.Errorf("read the connection file: %w", err)
	}
	connection, err := jupyter.ParseConnection(text)
	if err != nil {
		return err
	}
	b := &bridge{app: a, client: c, agent: agent, routers: map[string]*zmtp.Router{}, ready: make(chan struct{}), end: make(chan error, 1), asked: map[string]string{}}
	if b.signer, err = jupyter.NewSigner(connection.SignatureScheme, connection.Key); err != nil {
		return err
	}
	// SIGINT is for the cell, not for us; the others end us in order.
	ctx, cancel := context.WithCancel(context.WithoutCancel(parent))
	defer cancel()
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer signal.Stop(signals)

	closeSockets, err := b.listen(ctx, connection)
	if err != nil {
		return err
	}
	defer func() {
		cancel() // who waits to pass a message on gives up
		closeSockets()
	}()
	started, err := c.Kernels.StartKernel(ctx, connect.NewRequest(&posternv1.StartAgentKernelRequest{Agent: agent, Spec: spec}))
	if err != nil {
		return err
	}
	b.kernel = started.Msg.Kernel.GetId()
	defer b.stop()
	if b.channels, err = c.KernelChannels(ctx, started.Msg.Agent, b.kernel, jupyter.NewID()); err != nil {
		return err
	}
	defer b.channels.Close()
	close(b.ready)
	var work sync.WaitGroup
	defer work.Wait()
	defer cancel()
	work.Go(func() { b.finish(b.receive(ctx)) })
	orphaned := time.NewTicker(time.Second)
	defer orphaned.Stop()
	for {
		select {
		case err := <-b.end:
			return err
		case s := <-signals:
			if s != os.Interrupt {
				return nil
			}
			work.Go(func() { b.interrupt(ctx) })
		case <-orphaned.C:
			if a.getenv("JPY_PARENT_PID") != "" && os.Getppid() == 1 {
				return nil // Jupyter has died
			}
		}
	}
}

func readSmall(name string, most int64) ([]byte, error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if info.Size() > most {
		return nil, fmt.Errorf("%s has more than %d bytes", name, most)
	}
	return os.ReadFile(name)
}

// listen makes the five sockets.
func (b *bridge) listen(ctx context.Context, c jupyter.Connection) (closeAll func(), err error) {
	var closers []func()
	closeAll = func() {
		for _, f := range closers {
			f()
		}
	}
	for channel, port := range map[string]int{jupyter.Shell: c.ShellPort, jupyter.Stdin: c.StdinPort, jupyter.Control: c.ControlPort} {
		router, err := zmtp.NewRouter(c.Endpoint(port), func(identity string, frames [][]byte) { b.take(ctx, channel, identity, frames) })
		if err != nil {
			closeAll()
			return nil, fmt.Errorf("listen for %s: %w", channel, err)
		}
		b.routers[channel] = router
		closers = append(closers, router.Close)
	}
	if b.iopub, err = zmtp.NewPub(c.Endpoint(c.IOPubPort)); err != nil {
		closeAll()
		return nil, fmt.Errorf("listen for iopub: %w", err)
	}
	closers = append(closers, b.iopub.Close)
	echo, err := zmtp.NewEcho(c.Endpoint(c.HeartbeatPort))
	if err != nil {
		closeAll()
		return nil, fmt.Errorf("listen for the heartbeat: %w", err)
	}
	closers = append(closers, echo.Close)
	return closeAll, nil
}

// finish ends the bridge.
func (b *bridge) finish(err error) {
	select {
	case b.end <- err:
	default:
	}
}

// take passes a client's message on.
func (b *bridge) take(ctx context.Context, channel, identity string, frames [][]byte) {
	_, m, err := b.signer.Message(frames)
	if err != nil {
		b.app.info("a message on %s is not passed on: %v", channel, err)
		return
	}
	m.Channel = channel
	h, err := jupyter.Check(m)
	if err != nil {
		b.app.info("a message on %s is not passed on: %v", channel, err)
		return
	}
	b.mu.Lock()
	b.asked[h.ID] = identity
	b.order = append(b.order, h.ID)
	if len(b.order) > maxAsked {
		delete(b.asked, b.order[0])
		b.order = b.order[1:]
	}
	b.mu.Unlock()
	select {
	case <-b.ready:
	case <-ctx.Done():
		return
	}
	switch h.Type {
	case "shutdown_request":
		// A restart is a new bridge, and a new kernel.
		var asked struct {
			Restart bool `json:"restart"`
		}
		json.Unmarshal(m.Content, &asked) //nolint:errcheck // then it is no restart
		b.answer(channel, m, "shutdown_reply", map[string]any{"status": "ok", "restart": asked.Restart})
		b.finish(nil)
	case "interrupt_request":
		reply := map[string]any{"status": "ok"}
		if err := b.interrupt(ctx); err != nil {
			reply = map[string]any{"status": "error", "ename": "InterruptError", "evalue": message(err), "traceback": []string{}}
		}
		b.answer(channel, m, "interrupt_reply", reply)
	default:
		if err := b.channels.Send(ctx, m); err != nil {
			b.finish(err)
		}
	}
}

// answer replies to a client in the kernel's place.
func (b *bridge) answer(channel string, request *posternv1.KernelMessage, kind string, content any) {
	m, err := jupyter.New(channel, kind, b.channels.Session(), content)
	if err != nil {
		return // our contents encode
	}
	m.ParentHeader = request.Header
	b.give(m)
}

// interrupt interrupts the kernel.
func (b *bridge) interrupt(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, interruptTime)
	defer cancel()
	_, err := b.client.Kernels.InterruptKernel(ctx, connect.NewRequest(&posternv1.AgentKernelRequest{KernelId: b.kernel}))
	if err != nil && ctx.Err() == nil {
		b.app.info("not interrupted: %s", message(err))
	}
	return err
}

// stop stops the kernel, which ends with the bridge.
func (b *bridge) stop() {
	ctx, cancel := context.WithTimeout(context.Background(), stopTime)
	defer cancel()
	_, err := b.client.Kernels.StopKernel(ctx, connect.NewRequest(&posternv1.AgentKernelRequest{KernelId: b.kernel}))
	if err != nil && proto.CodeOf(err) != proto.CodeNotFound {
		b.app.info("kernel %s is not stopped: %s", b.kernel, message(err))
	}
}

// receive gives the kernel's messages to whom they are for.
func (b *bridge) receive(ctx context.Context) error {
	for {
		m, err := b.channels.Receive(ctx)
		if errors.Is(err, context.Canceled) {
			return nil
		}
		if err != nil {
			return err
		}
		b.give(m)
		if h, err := jupyter.ParseHeader(m.Header); err == nil && h.Type == "status" && m.Channel == jupyter.IOPub {
			var content struct {
				State string `json:"execution_state"`
			}
			if json.Unmarshal(m.Content, &content) == nil && content.State == "dead" {
				return errors.New("the kernel has ended: see `postern kernel list`")
			}
		}
	}
}

func (b *bridge) give(m *posternv1.KernelMessage) {
	if m.Channel == jupyter.IOPub {
		h, _ := jupyter.ParseHeader(m.Header)
		b.iopub.Send(b.signer.Frames([][]byte{[]byte("kernel." + b.kernel + "." + h.Type)}, m))
		return
	}
	router := b.routers[m.Channel]
	parent, err := jupyter.ParseHeader(m.ParentHeader)
	if router == nil || err != nil {
		return
	}
	b.mu.Lock()
	identity, known := b.asked[parent.ID]
	b.mu.Unlock()
	if known { // a question goes to the stdin socket of who asked on shell: the identities are the same
		router.Send(identity, b.signer.Frames(nil, m))
	}
}
