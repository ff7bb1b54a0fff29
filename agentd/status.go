package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/postern-dev/postern/agentd/control"
	"github.com/postern-dev/postern/agentd/identity"
)

// askTimeout bounds a question to the running agentd.
const askTimeout = 10 * time.Second

func newStatus() *cobra.Command {
	var p places
	var output string
	cmd := &cobra.Command{
		Use:     "status",
		Short:   "show link, identity, data sources, queries and audit log of the running agentd",
		Example: "  agentd status -o json",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(context.Background(), askTimeout)
			defer cancel()
			s, err := control.Ask(ctx, p.runtimeDir())
			if errors.Is(err, control.ErrNotRunning) {
				return notRunning(cmd.OutOrStdout(), p, output)
			} else if err != nil {
				return err
			}
			if output == "json" {
				return printJSON(cmd.OutOrStdout(), s)
			}
			return printStatus(cmd.OutOrStdout(), s)
		},
	}
	p.flags(cmd, "state", "runtime")
	outputFlag(cmd, &output)
	return cmd
}

func outputFlag(cmd *cobra.Command, output *string) {
	cmd.Flags().StringVarP(output, "output", "o", "text", "`FORMAT`: text or json")
}

func checkOutput(output string) error {
	if output != "text" && output != "json" {
		return usagef("-o: %q is none of text, json", output)
	}
	return nil
}

func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// notRunning says what the state directory knows.
func notRunning(w io.Writer, p places, output string) error {
	var s control.Status
	s.State = "not running"
	i, err := identity.Open(p.state)
	if err == nil {
		a := i.Agent()
		_, expires := i.Validity()
		s.Agent = control.Agent{
			ID: a.AgentID, Name: a.Name, Organization: a.Organization, URL: a.URL,
			CertificateSerial: i.Serial(), CertificateExpires: expires.UTC(),
		}
	}
	if output == "json" {
		if perr := printJSON(w, s); perr != nil {
			return perr
		}
	}
	switch {
	case errors.Is(err, identity.ErrNotRegistered):
		return fmt.Errorf("agentd is not running and this host is not registered (no identity in %s): run agentd register", p.state)
	case err != nil:
		return fmt.Errorf("agentd is not running: %w", err)
	}
	return fmt.Errorf("agentd is not running (agent %s of %s, certificate until %s): run systemctl start agentd, or see journalctl -u agentd",
		s.Agent.Name, s.Agent.URL, s.Agent.CertificateExpires.Format(time.RFC3339))
}

func printStatus(w io.Writer, s control.Status) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := func(key, format string, args ...any) {
		fmt.Fprintf(t, key+"\t"+format+"\n", args...) //nolint:errcheck // Flush says it
	}
	row("agent", "%s (%s), organization %s", s.Agent.Name, s.Agent.ID, s.Agent.Organization)
	row("agentd", "%s, %s since %s, pid %d", s.Software, s.State, s.Started.Format(time.RFC3339), s.PID)
	if s.Link.Up {
		row("link", "up since %s to %s", s.Link.Since.Format(time.RFC3339), s.Link.URL)
		row("", "round trip %s, %d streams, peer %s (%s)", seconds(s.Link.RoundTripSeconds), s.Link.Streams, s.Link.PeerSoftware, s.Link.Remote)
		if skew := s.Link.ClockSkewSeconds; skew > 30 || skew < -30 {
			row("", "clock is off by %s: mend it (is NTP running?)", seconds(skew))
		}
	} else {
		row("link", "DOWN since %s, %d tries, to %s", s.Link.Since.Format(time.RFC3339), s.Link.Attempts, s.Link.URL)
		row("", "%s", s.Link.Cause)
	}
	row("identity", "certificate %s until %s", s.Agent.CertificateSerial, s.Agent.CertificateExpires.Format(time.RFC3339))
	row("config", "%s, read %s", orNone(s.Config.Path), s.Config.Loaded.Format(time.RFC3339))
	if s.Config.Error != "" {
		row("", "NOT RELOADED: %s", s.Config.Error)
	}
	if s.Audit.First > 1 {
		row("audit", "entries %d to %d, %d bytes; older ones were retired", s.Audit.First, s.Audit.Sequence, s.Audit.Bytes)
	} else {
		row("audit", "%d entries, %d bytes", s.Audit.Sequence, s.Audit.Bytes)
	}
	if f := s.Audit.Syslog; f != nil {
		row("", "forwarded to %s up to entry %d", f.To, f.Through)
		if f.Error != "" {
			row("", "WARNING: not forwarded now: %s", f.Error)
		}
	}
	if s.Audit.Warning != "" {
		row("", "WARNING: %s", s.Audit.Warning)
	}
	if len(s.Sources) == 0 {
		row("sources", "none")
	}
	for i, src := range s.Sources {
		key := ""
		if i == 0 {
			key = "sources"
		}
		row(key, "%s: %s, %s, %d of %d running", src.Name, src.Engine, src.Mode, src.Running, src.Concurrency)
	}
	for i, q := range s.Queries {
		key := ""
		if i == 0 {
			key = "queries"
		}
		row(key, "%s on %s since %s, %d rows", q.ID, q.Source, q.Started.Format(time.RFC3339), q.Rows)
	}
	for i, o := range s.Sessions {
		key := ""
		if i == 0 {
			key = "sessions"
		}
		if o.Protocol != "" {
			row(key, "%s on %s of token %s since %s, PostgreSQL's protocol, %d statements", o.ID, o.Source, o.Token, o.Opened.Format(time.RFC3339), o.Statements)
			continue
		}
		row(key, "%s on %s of token %s since %s, transaction %s, %d statements", o.ID, o.Source, o.Token, o.Opened.Format(time.RFC3339), o.Transaction, o.Statements)
	}
	for i, k := range s.Kernels {
		key := ""
		if i == 0 {
			key = "kernels"
		}
		state := k.State
		if k.Reason != "" {
			state += " (" + k.Reason + ")"
		}
		row(key, "%s of %s for token %s since %s, %s, %d clients", k.ID, k.Spec, k.Token, k.Started.Format(time.RFC3339), state, k.Connections)
	}
	printAttachments(row, s.Attachments)
	return t.Flush()
}

// printAttachments tells of mounts, and of what is not uploaded yet.
func printAttachments(row func(key, format string, args ...any), a control.Attachments) {
	if a.Enabled && a.Error != "" {
		row("mounts", "NOT SERVED: %s", a.Error)
	}
	for i, w := range a.Workspaces {
		key := ""
		if i == 0 {
			key = "mounts"
		}
		mode, where := "", "not mounted any more"
		if w.Bucket {
			mode = " (bucket)"
		}
		if w.ReadOnly {
			mode += ", read-only"
		}
		if len(w.Mounts) > 0 {
			where = "on " + strings.Join(w.Mounts, ", ")
		}
		state := "all sent"
		if w.UnsentChanges > 0 {
			state = fmt.Sprintf("UNSENT: %d changes, %d bytes, since %s", w.UnsentChanges, w.UnsentBytes, w.OldestUnsent.Format(time.RFC3339))
		}
		row(key, "%s %s%s, %s, %d bytes cached", w.Workspace, where, mode, state, w.CacheBytes)
		if w.Hidden > 0 {
			row("", "%s: %d keys met that cannot be files: not shown", w.Workspace, w.Hidden)
		}
		if w.LastError != "" {
			row("", "%s: %s", w.Workspace, w.LastError)
		}
		for i, path := range w.UnsentPaths {
			if i == shownPaths {
				row("", "and more: %d with -o json, %d changes in all", len(w.UnsentPaths), w.UnsentChanges)
				break
			}
			row("", "not yet sent: %s", printable(path))
		}
		for _, c := range w.ConflictCopies[max(0, len(w.ConflictCopies)-shownPaths):] {
			row("", "conflict: %s is kept as %s", printable(c.Path), printable(c.KeptAs))
		}
	}
}

// shownPaths is how many paths of each kind are printed; JSON has more.
const shownPaths = 10

// printable is a path that cannot play with a terminal.
func printable(path string) string {
	if strconv.Quote(path) == `"`+path+`"` {
		return path
	}
	return strconv.Quote(path)
}

func seconds(s float64) string {
	return time.Duration(s * float64(time.Second)).Round(10 * time.Microsecond).String()
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}
