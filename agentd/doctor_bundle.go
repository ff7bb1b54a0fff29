package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/audit"
	"github.com/postern-dev/postern/agentd/bundle"
	"github.com/postern-dev/postern/agentd/control"
	"github.com/postern-dev/postern/agentd/doctor"
	"github.com/postern-dev/postern/agentd/secret"
	"github.com/postern-dev/postern/proto"
)

const (
	// journalLines is how much of the journal a bundle has, and journalTime how long it may take.
	journalLines, journalTime = "5000", 30 * time.Second
	// maxSecret bounds a secret's file that is looked for in a bundle, in bytes.
	maxSecret = 64 << 10
)

const bundleReadme = `What agentd doctor --bundle found out about this host.

doctor.json   every check, with what to do about it
status.json   what the running agentd says of itself, if it runs
agentd.yaml   the configuration: its shape, numbers, switches and names. Everything else is "redacted"
host.json     the system, its limits, the space of the state directory
state.json    which files the state directory has, and how large they are; nothing of what is in them
audit.json    whether the audit log's chain is whole, and where it ends; no entries
journal.txt   the end of agentd's journal; what looks like a secret is "redacted"

No statements, rows, files of users, keys or passwords are meant to be in it. It was redacted by a program:
look through it before you give it away.
`

// bundleHost are what a bundle says of the system.
type bundleHost struct {
	Time        time.Time         `json:"time"`
	Version     string            `json:"version"`
	Go          string            `json:"go"`
	OS          string            `json:"os"`
	Kernel      string            `json:"kernel"`
	Arch        string            `json:"arch"`
	CPUs        int               `json:"cpus"`
	Files       map[string]string `json:"files"` // small files of /proc and /sys
	StateBytes  uint64            `json:"state_bytes"`
	StateFree   uint64            `json:"state_free_bytes"`
	StateInodes uint64            `json:"state_free_inodes"`
}

// writeBundle writes what doctor found, and what somebody who helps asks for next.
func writeBundle(ctx context.Context, path string, r *doctor.Report, p *places) (err error) {
	raw, rerr := os.ReadFile(p.config)
	if rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
		return fmt.Errorf("configuration: %w", rerr)
	}
	w, err := bundle.Create(path, bundle.NewRedactor(configuredSecrets(p)...))
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.Abandon())
		}
	}()
	steps := []func() error{
		func() error { return w.Text("README.txt", bundleReadme) },
		func() error { return w.JSON("doctor.json", r.Checks) },
		func() error { return w.JSON("status.json", bundleStatus(ctx, p)) },
		func() error { return w.JSON("host.json", factsOf(p.state)) },
		func() error {
			files, cut := bundle.Listing(p.state)
			return w.JSON("state.json", map[string]any{"files": files, "cut": cut})
		},
		func() error { return w.JSON("audit.json", bundleAudit(p.state)) },
		func() error { return w.Text("journal.txt", journal(ctx)) },
	}
	if rerr == nil {
		steps = append(steps, func() error { return w.Config("agentd.yaml", raw) })
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return fmt.Errorf("bundle: %w", err)
		}
	}
	return w.Commit()
}

// configuredSecrets are the values of the secrets that the configuration names and this command can
// read, to look for them in what goes into a bundle.
func configuredSecrets(p *places) []string {
	c, _, err := p.loadConfig()
	if err != nil || c == nil {
		return nil
	}
	var values []string
	refs := []secret.Ref{c.Vault.Token, c.Vault.SecretID, c.MaskKey}
	for _, s := range c.Sources {
		refs = append(refs, s.Password)
		values = append(values, s.DSN)
		if u, err := url.Parse(s.DSN); err == nil && u.User != nil {
			if password, ok := u.User.Password(); ok {
				values = append(values, password)
			}
		}
	}
	for _, ref := range refs {
		if ref.Env != "" {
			values = append(values, os.Getenv(ref.Env))
		}
		if ref.File == "" {
			continue
		}
		if st, err := os.Stat(ref.File); err != nil || st.Size() > maxSecret {
			continue
		}
		if text, err := os.ReadFile(ref.File); err == nil {
			values = append(values, string(text))
		}
	}
	return values
}

func bundleStatus(ctx context.Context, p *places) any {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	s, err := control.Ask(ctx, p.runtimeDir())
	if err != nil {
		return map[string]string{"error": err.Error()}
	}
	return s
}

func bundleAudit(state string) any {
	found, err := audit.Verify(state)
	out := map[string]any{
		"entries": found.Kept.Entries(), "first": found.Kept.First, "last": found.Head.Sequence,
		"head": fmt.Sprintf("%x", found.Head.Hash), "torn": found.Torn, "whole": err == nil,
	}
	if err != nil {
		out["error"] = err.Error()
	}
	return out
}

func factsOf(state string) bundleHost {
	f := bundleHost{Time: time.Now().UTC(), Version: proto.Software(), Go: runtime.Version(), Arch: runtime.GOARCH, CPUs: runtime.NumCPU(), Files: map[string]string{}}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		f.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	for line := range strings.Lines(smallFile("/etc/os-release")) {
		if name, ok := strings.CutPrefix(line, "PRETTY_NAME="); ok {
			f.OS = strings.Trim(strings.TrimSpace(name), `"`)
		}
	}
	for _, name := range []string{"/proc/uptime", "/proc/loadavg", "/proc/meminfo", "/sys/fs/cgroup/cgroup.controllers", "/proc/sys/kernel/pid_max", "/proc/self/limits"} {
		f.Files[name] = smallFile(name)
	}
	var fs unix.Statfs_t
	if unix.Statfs(state, &fs) == nil {
		f.StateBytes, f.StateFree, f.StateInodes = fs.Blocks*uint64(fs.Bsize), fs.Bavail*uint64(fs.Bsize), fs.Ffree
	}
	return f
}

// smallFile is at most 4 KiB of a file; what can't be read says why.
func smallFile(name string) string {
	raw, err := os.ReadFile(filepath.Clean(name))
	if err != nil {
		return err.Error()
	}
	return string(raw[:min(len(raw), 4096)])
}

// journal is the end of agentd's journal, or why there is none.
func journal(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(ctx, journalTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, "journalctl", "--unit=agentd", "--lines="+journalLines, "--no-pager", "--output=short-iso", "--quiet")
	out, err := cmd.Output()
	if err != nil {
		return "no journal: " + err.Error() + "\n"
	}
	if len(out) == 0 {
		return "no journal: it has nothing of the unit agentd\n"
	}
	return string(out)
}
