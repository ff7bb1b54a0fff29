package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/url"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/net/http/httpproxy"

	"github.com/postern-dev/postern/agentd/audit"
	"github.com/postern-dev/postern/agentd/checkpoint"
	"github.com/postern-dev/postern/agentd/config"
	"github.com/postern-dev/postern/agentd/control"
	"github.com/postern-dev/postern/agentd/doctor"
	"github.com/postern-dev/postern/agentd/egress"
	"github.com/postern-dev/postern/agentd/identity"
	"github.com/postern-dev/postern/agentd/kernel"
	"github.com/postern-dev/postern/agentd/secret"
	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/kernelsecret"
	"github.com/postern-dev/postern/tunnel"
)

const (
	doctorTimeout = 2 * time.Minute
	// doctorUIDs is where doctor's own SQL sessions have their user ids: behind
	// those of the running agentd.
	doctorUIDs = 65_536
	uidCount   = egress.UIDs + 1 // the last four are the parser's, the uplink's and the egress processes'
	// auditWarning is when the audit log is worth a thought, in bytes.
	auditWarning = 4 << 30
)

func newDoctor() *cobra.Command {
	var p places
	var output, bundleFile string
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "check everything that agentd needs on this host, and say how to mend what fails",
		Long: `Check configuration, identity, state directory, clock, the way to the control plane, the
audit log, the sandbox and each data source. It changes nothing and leaves a tunnel that is
up alone. Exit code 1 if a check failed.

With --bundle it also writes an archive for those who help: the checks, the status, the end
of the journal, facts of the system and the shape of the configuration, with secrets taken out. Look
through it before you give it away.`,
		Example: "  sudo agentd doctor\n  sudo agentd doctor -o json\n  sudo agentd doctor --bundle support.tar.gz",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(context.Background(), doctorTimeout)
			defer cancel()
			r := &doctor.Report{}
			examine(ctx, r, &p)
			if err := printReport(cmd.OutOrStdout(), r, output); err != nil {
				return err
			}
			if bundleFile != "" {
				if err := writeBundle(ctx, bundleFile, r, &p); err != nil {
					return err
				}
				fmt.Fprintln(cmd.ErrOrStderr(), "written to "+bundleFile+": look through it before you give it away")
			}
			if r.Failed() {
				return exitCode(proto.ExitFailed)
			}
			return nil
		},
	}
	p.flags(cmd, "config", "state", "runtime")
	outputFlag(cmd, &output)
	cmd.Flags().StringVar(&bundleFile, "bundle", "", "write an archive for those who help to `FILE`, a .tar.gz that is not there yet")
	return cmd
}

func printReport(w io.Writer, r *doctor.Report, output string) error {
	if output == "json" {
		return printJSON(w, r.Checks)
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, c := range r.Checks {
		fmt.Fprintf(t, "%s\t%s\t%s\n", c.Result, c.Name, c.Message) //nolint:errcheck // Flush says it
		if c.Remedy != "" {
			fmt.Fprintf(t, "\t\t-> %s\n", c.Remedy) //nolint:errcheck // Flush says it
		}
	}
	return t.Flush()
}

func examine(ctx context.Context, r *doctor.Report, p *places) {
	c, found, err := p.loadConfig()
	var problems *config.Error
	switch {
	case errors.As(err, &problems):
		for _, line := range problems.Lines() {
			r.Add("configuration", doctor.Failed, line, "mend the line; docs/agentd.md lists every key")
		}
	case err != nil:
		r.Add("configuration", doctor.Failed, err.Error(), "")
	case !found:
		r.Add("configuration", doctor.Warning, "there is no "+p.config+": no data sources", "write it; docs/agentd.md lists every key")
	default:
		r.Add("configuration", doctor.OK, fmt.Sprintf("%s, %d data sources", c.File, len(c.Sources)), "")
	}
	if c == nil {
		c = config.Default()
	}
	r.State(p.state)

	status, err := control.Ask(ctx, p.runtimeDir())
	running := err == nil
	switch {
	case running:
		r.Add("agentd", doctor.OK, fmt.Sprintf("running, pid %d, %s", status.PID, status.Software), "")
		if status.Config.Error != "" {
			r.Add("agentd", doctor.Warning, "the configuration in force is an older one: "+status.Config.Error, "mend it and run systemctl reload agentd")
		}
	case errors.Is(err, control.ErrNotRunning):
		r.Add("agentd", doctor.Warning, "not running", "run systemctl start agentd")
	default:
		r.Add("agentd", doctor.Warning, err.Error(), "")
	}
	examineLink(ctx, r, p, c, status, running)
	examineAudit(r, p, status, running)
	r.Sandbox(c.SQL.UIDBase, uidCount)
	examineSQLLimits(r)
	examineKernels(ctx, r, c.Kernels)
	examineCheckpoints(ctx, r, c.Kernels.Checkpoints.CRIU)
	examineAttachments(r, c, status, running)
	examineBuckets(ctx, r, c)
	examineSources(ctx, r, p, c, running)
	examineSecrets(ctx, r, c)
}

// examineSQLLimits says whether this host holds SQL sessions to their limits.
func examineSQLLimits(r *doctor.Report) {
	if os.Geteuid() != 0 {
		return // said by Sandbox
	}
	const name = "sql: limits"
	where, lacks, err := sqlsession.Limits()
	switch {
	case err != nil:
		r.Add(name, doctor.Warning, err.Error(), "mount /proc and /sys/fs/cgroup for agentd")
	case len(lacks) > 0:
		r.Add(name, doctor.Warning, strings.Join(lacks, "; "), "turn the controller on (a systemd host with cgroup version 2 has it), or bound agentd.service with MemoryMax=")
	default:
		r.Add(name, doctor.OK, "limited: "+strings.Join(where, ", "), "")
	}
}

// examineKernels says whether kernels can run here. A host for SQL alone needs none
// of it, so only where the configuration asks for kernels a fault fails the whole.
func examineKernels(ctx context.Context, r *doctor.Report, k config.Kernels) {
	for _, f := range kernel.Examine(ctx, kernel.Needs{UIDBase: k.UIDBase, UIDs: config.KernelUIDs, SpecDirs: k.SpecDirs, Visible: k.Visible}) {
		result := doctor.Warning
		switch {
		case f.OK:
			result = doctor.OK
		case k.Enabled && !f.Lesser:
			result = doctor.Failed
		}
		r.Add(f.Name, result, f.Message, f.Remedy)
	}
}

// examineCheckpoints says what of checkpoints works here. Kernels run without them, so
// nothing of it fails the whole. criu is CRIU's path by the configuration, or empty.
func examineCheckpoints(ctx context.Context, r *doctor.Report, criu string) {
	for _, f := range checkpoint.Examine(ctx, criu) {
		result := doctor.Warning
		if f.OK {
			result = doctor.OK
		}
		r.Add(f.Name, result, f.Message, f.Remedy)
	}
}

func examineLink(ctx context.Context, r *doctor.Report, p *places, c *config.Config, status control.Status, running bool) {
	i, err := identity.Open(p.state)
	if err != nil {
		remedy := ""
		if errors.Is(err, identity.ErrNotRegistered) {
			remedy = "run agentd register --url URL with a key from postern key create"
		}
		r.Add("identity", doctor.Failed, err.Error(), remedy)
		return
	}
	a := i.Agent()
	r.Add("identity", doctor.OK, fmt.Sprintf("agent %s (%s) of %s", a.Name, a.AgentID, a.URL), "")
	from, to := i.Validity()
	r.Certificate(from, to, time.Now())
	if running && status.Link.Up {
		l := status.Link
		r.Add("link", doctor.OK, fmt.Sprintf("up since %s, round trip %s", l.Since.Format(time.RFC3339), seconds(l.RoundTripSeconds)), "")
		r.Skew(time.Duration(l.ClockSkewSeconds * float64(time.Second)))
		return
	}
	if running {
		r.Add("link", doctor.Failed, "down since "+status.Link.Since.Format(time.RFC3339)+": "+status.Link.Cause, "see the steps below; agentd retries by itself")
	}
	base := c.URL
	if base == "" {
		base = a.URL
	}
	target, err := config.TunnelURL(base)
	if err != nil {
		r.Add("url", doctor.Failed, err.Error(), "set url in "+p.config)
		return
	}
	proxy := proxyOf(c, target)
	if proxy != "" {
		r.Add("proxy", doctor.OK, "the way leads through "+proxy, "")
	}
	inner, _, _ := i.Credential()
	uplinks := newUplinks("", c, slog.New(slog.DiscardHandler))
	defer uplinks.Close()
	r.Dial(ctx, tunnel.DialConfig{URL: target, TLS: inner, Carrier: uplinks.Carrier, Proxy: c.Proxy}, proxy != "")
}

// proxyOf is the proxy for the control plane, without its credentials.
func proxyOf(c *config.Config, target string) string {
	u, err := url.Parse(target)
	if err != nil {
		return ""
	}
	u.Scheme = map[string]string{"ws": "http", "wss": "https"}[u.Scheme]
	choose := c.Proxy
	if choose == nil {
		choose = httpproxy.FromEnvironment().ProxyFunc()
	}
	proxy, err := choose(u)
	if err != nil || proxy == nil {
		return ""
	}
	return proxy.Host
}

func examineAudit(r *doctor.Report, p *places, status control.Status, running bool) {
	found, err := audit.Verify(p.state)
	if err != nil {
		r.Add("audit log", doctor.Failed, err.Error(), "keep the directory as evidence and find out who could write to it")
		return
	}
	if running && status.Audit.Warning != "" {
		r.Add("audit log", doctor.Failed, status.Audit.Warning, "compare with postern audit list on the control plane")
		return
	}
	if running && status.Audit.Bytes > auditWarning {
		r.Add("audit log", doctor.Warning, fmt.Sprintf("%s take %d MiB", found, status.Audit.Bytes>>20), "set audit.retention or audit.max_size, or give the state directory room")
		return
	}
	r.Add("audit log", doctor.OK, found.String()+", the chain is whole", "")
}

// examineSecrets reads what kernels may have of Vault, each once, and tells nothing of it.
func examineSecrets(ctx context.Context, r *doctor.Report, c *config.Config) {
	names := slices.Sorted(maps.Keys(c.Kernels.Secrets.Vault))
	if len(names) == 0 {
		return
	}
	if c.Vault.Token.Env+c.Vault.SecretID.Env != "" {
		r.Add("kernels' secrets", doctor.Warning, "what opens Vault is in agentd's environment, which this command does not have", "they are looked at when a kernel asks for them")
		return
	}
	client := newVault("", c, nil, slog.New(slog.DiscardHandler))
	if client == nil {
		return // refused by the configuration
	}
	defer client.Close() //nolint:errcheck // what is left of it ends by itself
	for _, name := range names {
		v := c.Kernels.Secrets.Vault[name]
		mount, path := secret.VaultRef{KV: v.Path}.Split()
		value, err := client.KV(ctx, mount, path, v.Key)
		if err == nil {
			err = kernelsecret.CheckValue(name, []byte(value.Reveal()))
		}
		if err != nil {
			r.Add("kernels' secret "+name, doctor.Failed, err.Error(), "kernels are refused this secret until then")
			continue
		}
		r.Add("kernels' secret "+name, doctor.OK, "Vault has it", "")
	}
}

func examineSources(ctx context.Context, r *doctor.Report, p *places, c *config.Config, running bool) {
	if len(c.Sources) == 0 {
		return
	}
	check := func(name string) ([]control.Check, error) { return control.AskCheck(ctx, p.runtimeDir(), name) }
	if !running {
		client := newVault("", c, nil, slog.New(slog.DiscardHandler))
		if client != nil {
			defer client.Close() //nolint:errcheck // what is left of it ends by itself
		}
		m := sqlsession.New(sqlsession.Config{UIDBase: int(c.SQL.UIDBase) + doctorUIDs, UIDCount: 256, Warm: -1, NoParser: true, Logger: slog.New(slog.DiscardHandler)})
		defer m.Close(ctx) //nolint:errcheck // nothing of it is left either way
		m.SetSources(mapSources(c, nil, client, nil))
		check = func(name string) ([]control.Check, error) { return plainChecks(m.Check(ctx, name)), nil }
	}
	for _, s := range c.Sources {
		if !running && (s.Password.Env != "" || s.Password.Vault != nil && c.Vault.Token.Env+c.Vault.SecretID.Env != "") {
			r.Add("source "+s.Name, doctor.Warning, "its password, or what opens Vault, is in agentd's environment, which this command does not have", "start agentd, then run doctor again")
			continue
		}
		checks, err := check(s.Name)
		if err != nil {
			r.Add("source "+s.Name, doctor.Failed, err.Error(), "")
		}
		for _, k := range checks {
			r.Add("source "+s.Name+": "+k.Name, doctor.Result(k.Result), k.Message, k.Remedy)
		}
	}
}
