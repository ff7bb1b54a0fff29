package stack

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Agent is one agentd, with a state directory and a configuration of its own.
type Agent struct {
	Name    string
	Process *Process
	// Netns, URL, CAFile and Env may be changed before Register and Start. URL
	// and CAFile are written into the configuration.
	Netns, URL, CAFile string
	Env                []string
	// Config is the rest of agentd.yaml: sources and so on.
	Config string

	stack *Stack
	dir   string
}

// NewAgent prepares an agent; Register and Start it.
func (s *Stack) NewAgent(name, config string) (*Agent, error) {
	a := &Agent{Name: name, URL: s.URL, CAFile: s.CAFile, Config: config, stack: s, dir: filepath.Join(s.Dir, "agent-"+name)}
	s.Agents = append(s.Agents, a)
	return a, os.MkdirAll(a.StateDir(), 0o700)
}

// Dir has everything of the agent's.
func (a *Agent) Dir() string { return a.dir }

// StateDir is what --state names.
func (a *Agent) StateDir() string { return filepath.Join(a.dir, "state") }

// ConfigFile is what --config names.
func (a *Agent) ConfigFile() string { return filepath.Join(a.dir, "agentd.yaml") }

// WriteConfig writes the configuration file.
func (a *Agent) WriteConfig() error {
	text := "url: " + a.URL + "\n"
	if a.CAFile != "" {
		text += "ca_file: " + a.CAFile + "\n"
	}
	return os.WriteFile(a.ConfigFile(), []byte(text+a.Config), 0o600)
}

// NewKey makes a registration key.
func (s *Stack) NewKey(ctx context.Context, args ...string) (string, error) {
	key, err := s.Postern(ctx, append([]string{"key", "create"}, args...)...)
	return strings.TrimSpace(key), err
}

// Register joins with a key, given to agentd on its standard input.
func (a *Agent) Register(ctx context.Context, key string) error {
	if err := a.WriteConfig(); err != nil {
		return err
	}
	args := []string{"register", "--url", a.URL, "--key-file", "-", "--name", a.Name, "--state", a.StateDir()}
	if a.CAFile != "" {
		args = append(args, "--ca-file", a.CAFile)
	}
	_, err := a.Run(ctx, key+"\n", args...)
	return err
}

// Run runs another agentd command to its end and returns its standard output.
func (a *Agent) Run(ctx context.Context, stdin string, args ...string) (string, error) {
	cmd := a.Command(ctx, args...)
	cmd.Stdin = strings.NewReader(stdin)
	return output(cmd)
}

// Command is an agentd command; its input and output are the caller's.
func (a *Agent) Command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := a.stack.command(ctx, a.Netns, "agentd", args...)
	cmd.Env = append(cleanEnv(), a.Env...)
	return cmd
}

// RuntimeDir is what --runtime names.
func (a *Agent) RuntimeDir() string { return filepath.Join(a.dir, "run") }

// Start runs agentd. It does not wait for the tunnel: see Online.
func (a *Agent) Start() error {
	if err := a.WriteConfig(); err != nil {
		return err
	}
	cmd := a.Command(context.Background(), "run",
		"--config", a.ConfigFile(), "--state", a.StateDir(), "--runtime", a.RuntimeDir())
	p, err := start("agentd "+a.Name, filepath.Join(a.dir, "agentd.log"), cmd)
	a.Process = p
	return err
}

// Online waits until the control plane says that the agent is online.
func (a *Agent) Online(ctx context.Context) error {
	return a.Process.await(ctx, "the agent to be online", func() error {
		text, err := a.stack.Postern(ctx, "agent", "show", a.Name, "-o", "json")
		if err != nil {
			return err
		}
		var agent struct{ Online bool }
		if err := json.Unmarshal([]byte(text), &agent); err != nil {
			return err
		}
		if !agent.Online {
			return fmt.Errorf("it is offline")
		}
		return nil
	})
}

// Join makes a key, registers, starts and waits: the whole way.
func (s *Stack) Join(ctx context.Context, name, config string) (*Agent, error) {
	a, err := s.NewAgent(name, config)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	key, err := s.NewKey(ctx)
	if err != nil {
		return nil, err
	}
	if err := a.Register(ctx, key); err != nil {
		return nil, err
	}
	if err := a.Start(); err != nil {
		return nil, err
	}
	return a, a.Online(ctx)
}
