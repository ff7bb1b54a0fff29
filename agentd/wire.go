package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/agentd/config"
	"github.com/postern-dev/postern/agentd/control"
	"github.com/postern-dev/postern/agentd/egress"
	"github.com/postern-dev/postern/agentd/host"
	"github.com/postern-dev/postern/agentd/link"
	"github.com/postern-dev/postern/agentd/policy"
	"github.com/postern-dev/postern/agentd/secret"
	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/agentd/vault"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// sqlRunner makes the SQL sessions what the host asks for.
type sqlRunner struct {
	*sqlsession.Manager
	// hide is what the policy of a source hides now.
	hide func(source string) (policy.Hide, bool)
}

var (
	_ host.SQL        = sqlRunner{}
	_ host.WireOpener = sqlRunner{}
)

// OpenWire implements host.WireOpener.
func (r sqlRunner) OpenWire(ctx context.Context, o host.WireOpen) (host.WireSession, error) {
	w, err := r.Manager.OpenWire(ctx, sqlsession.WireRequest{SessionID: o.SessionID, Source: o.Source, Principal: o.Principal, Settings: o.Settings})
	if err != nil {
		return nil, err
	}
	return wireSession{w}, nil
}

// wireSession makes a session what the host asks for.
type wireSession struct{ *sqlsession.Wire }

// Serve implements host.WireSession.
func (s wireSession) Serve(stream io.ReadWriter, log host.WireLog, hangup func()) error {
	return s.Wire.Serve(stream, log, hangup)
}

// Run implements host.SQL.
func (r sqlRunner) Run(ctx context.Context, s host.Statement, w io.Writer) (*posternv1.QueryOutcome, error) {
	return r.Manager.Run(ctx, sqlsession.Request{
		QueryID: s.QueryID, Source: s.Source, Owner: s.Owner, Session: s.Session, SQL: s.SQL, Parameters: s.Parameters,
		MaxRows: s.MaxRows, MaxBytes: s.MaxBytes, Timeout: s.Timeout, ReadWrite: s.ReadWrite,
		Explain: s.Explain, HypotheticalIndexes: s.HypotheticalIndexes,
		KeepFirst: s.KeepFirst, KeepLast: s.KeepLast, Kept: s.Kept,
	}, w)
}

// OpenSession implements host.SQL.
func (r sqlRunner) OpenSession(ctx context.Context, o host.OpenSession) (*posternv1.SQLSession, error) {
	return r.Manager.OpenSession(ctx, sqlsession.Open(o))
}

// Introspect implements host.SQL. The session leaves out what is hidden; here, on
// the other side of its sandbox, every page is held against the policy again,
// which may have changed meanwhile.
func (r sqlRunner) Introspect(ctx context.Context, i host.Introspection, take func(*posternv1.CatalogPage) error) error {
	hide, _ := r.hide(i.Source)
	return r.Manager.Introspect(ctx, sqlsession.Introspection{Source: i.Source, Hide: hide, Timeout: i.Timeout, Known: i.Known},
		func(page *posternv1.CatalogPage) error {
			now, there := r.hide(i.Source)
			if !there || tellsHidden(page, now) {
				return proto.Errorf(proto.CodeUnavailable, "data source %q: the host's policy changed while the catalog was read: try again", i.Source)
			}
			return take(page)
		})
}

// tellsHidden reports whether a page names what is hidden.
func tellsHidden(page *posternv1.CatalogPage, hide policy.Hide) bool {
	for _, t := range page.Tables {
		if hide.Object(t.Schema, t.Name) || t.PartitionOf != nil && hide.Object(t.PartitionOf.Schema, t.PartitionOf.Name) {
			return true
		}
		for _, k := range t.Keys {
			if k.References != nil && hide.Object(k.References.Schema, k.References.Name) {
				return true
			}
		}
	}
	for _, f := range page.Functions {
		if hide.Object(f.Schema, f.Name) {
			return true
		}
	}
	for _, x := range page.Types {
		if hide.Object(x.Schema, x.Name) {
			return true
		}
	}
	for _, q := range page.Sequences {
		if hide.Object(q.Schema, q.Name) || q.Owner != nil && hide.Object(q.Owner.Schema, q.Owner.Name) {
			return true
		}
	}
	for _, s := range page.Schemas {
		if hide.Schema(s.Name) {
			return true
		}
	}
	return false
}

// hidden is what the policy of a source hides now.
func (d *Daemon) hidden(source string) (policy.Hide, bool) {
	for _, s := range d.config.Load().Sources {
		if s.Name == source {
			return s.Policy.Hide, true
		}
	}
	return nil, false
}

// decideIntrospection holds a wish for a catalog against the policy of its source.
func (d *Daemon) decideIntrospection(source string) host.Verdict {
	for _, s := range d.config.Load().Sources {
		if s.Name == source {
			v := policy.DecideIntrospection(s.Policy)
			return host.Verdict{Known: true, Allowed: v.Allowed, Reason: v.Reason, Timeout: v.Timeout}
		}
	}
	return host.Verdict{}
}

// newVault is the client of the configuration's Vault; nil if it has none. executable is for tests; "" means this program.
func newVault(executable string, c *config.Config, env *secret.Environment, logger *slog.Logger) *vault.Client {
	v := c.Vault
	if v.Address == "" {
		return nil
	}
	reader := func(ref secret.Ref) vault.Reader {
		return func(ctx context.Context) (secret.Secret, error) { return ref.Load(ctx, env) }
	}
	through := newEgress(executable, c, egress.Config{Name: "vault", CAs: v.CAs, Logger: logger})
	cfg := vault.Config{
		Address: v.Address, Namespace: v.Namespace, Transport: through, Closed: through.Close, Mount: v.Mount, RoleID: v.RoleID, Logger: logger,
	}
	if v.RoleID != "" {
		cfg.SecretID = reader(v.SecretID)
	} else {
		cfg.Token = reader(v.Token)
	}
	return vault.New(cfg)
}

// fromVault makes a source log in by what Vault says.
func fromVault(source *sqlsession.Source, ref secret.VaultRef, client *vault.Client) {
	if client == nil { // refused by the configuration, unless it was added since the start
		source.Password = func(context.Context) (string, error) {
			return "", errors.New("agentd started without vault in its configuration: restart it")
		}
		return
	}
	if ref.Role != "" {
		source.Login = func(ctx context.Context) (sqlsession.Login, error) {
			c, err := client.Dynamic(ctx, ref.Role)
			return sqlsession.Login{User: c.User, Password: c.Password.Reveal(), Expiring: c.Expiring, Release: c.Release}, err
		}
		return
	}
	mount, path := ref.Split()
	field := ref.Field
	if field == "" {
		field = "password"
	}
	source.Password = func(ctx context.Context) (string, error) {
		value, err := client.KV(ctx, mount, path, field)
		return value.Reveal(), err
	}
}

// mapSources maps the configuration to what the SQL sessions need. key is that of
// masks; nil where no statement will run.
func mapSources(c *config.Config, env *secret.Environment, client *vault.Client, key []byte) []sqlsession.Source {
	var out []sqlsession.Source
	for _, s := range c.Sources {
		source := sqlsession.Source{
			Name: s.Name, Engine: s.Engine, DSN: s.DSN,
			MaxRows: s.Policy.MaxRows, MaxBytes: s.Policy.MaxBytes, StatementTimeout: s.Policy.StatementTimeout,
			Concurrency: s.Policy.Concurrency, ReadWrite: s.Policy.Mode == policy.ModeReadWrite,
			Guard:    guard(s.Policy, key),
			WireIdle: s.Policy.ClientIdle, WireIdleInTransaction: s.Policy.ClientIdleInTransaction,
		}
		if s.Engine == "mysql" {
			source.Guard.Hide = s.Policy.Hide
		}
		if ref := s.Password; ref.Vault != nil {
			fromVault(&source, *ref.Vault, client)
		} else if !ref.IsZero() {
			source.Password = func(ctx context.Context) (string, error) {
				value, err := ref.Load(ctx, env)
				return value.Reveal(), err
			}
		}
		out = append(out, source)
	}
	return out
}

// guard is what the processes enforce of a policy.
func guard(p policy.Source, key []byte) sqlsession.Guard {
	g := sqlsession.Guard{
		Mode: string(p.Mode), Plans: string(p.Plans), Functions: p.Functions,
		WriteSchemas: p.Write.Schemas, WriteStatements: p.Write.Statements,
		MaskFilters: string(p.MaskFilters), SafeFunctions: p.SafeFunctions,
	}
	if len(p.Masks) > 0 {
		g.MaskKey = key
	}
	for _, m := range p.Masks {
		g.Masks = append(g.Masks, sqlsession.Mask{Columns: m.Columns, Pattern: m.Pattern, With: string(m.With), Keep: m.Keep, Noise: m.Noise})
	}
	return g
}

func (d *Daemon) newHost() *host.Host {
	return host.New(host.Config{
		Logger: d.logger, Metrics: host.NewMetrics(d.registry), SQL: sqlRunner{d.sessions, d.hidden}, Wire: sqlRunner{d.sessions, d.hidden}, Audit: d.log,
		Kernels: kernelRunner{d.kernels, &d.checkpoints, d}, DecideKernel: d.decideKernel, Attachments: attachedHost{d}, Checkpoints: checkpoints{&d.checkpoints}, Moves: moves{d}, Secrets: kernelSecrets{d},
		Decide: d.decide, DecideIntrospection: d.decideIntrospection, CheckOffered: d.checkOffered, Sources: d.inventory, Status: d.hostStatus, Report: link.ReportRows, Local: d.reports, MaskText: d.maskText,
		Exposition: promhttp.HandlerFor(d.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 10 * time.Second}),
		Agent: func() (string, string) {
			a := d.identity.Agent()
			return a.Name, a.Organization
		},
	})
}

// decide holds a request against the policy of its source.
func (d *Daemon) decide(r *posternv1.SQLRequest) host.Verdict {
	for _, s := range d.config.Load().Sources {
		if s.Name != r.Source {
			continue
		}
		v := policy.Decide(s.Policy, policy.Request{
			MaxRows: r.MaxRows, MaxBytes: r.MaxBytes, Timeout: r.Timeout.AsDuration(),
			Plan: r.Explain != posternv1.Explain_EXPLAIN_UNSPECIFIED, Analyze: r.Explain == posternv1.Explain_EXPLAIN_ANALYZE,
		})
		return host.Verdict{
			Known: true, Allowed: v.Allowed, Reason: v.Reason,
			MaxRows: v.MaxRows, MaxBytes: v.MaxBytes, Timeout: v.Timeout, ReadWrite: v.ReadWrite,
			KeepFirst: v.KeepFirst, KeepLast: v.KeepLast,
		}
	}
	return host.Verdict{}
}

// inventory is what the control plane is told of the data sources: no DSN, no
// host, no user.
func (d *Daemon) inventory() []*posternv1.SourceInfo {
	var out []*posternv1.SourceInfo
	for _, s := range d.config.Load().Sources {
		out = append(out, &posternv1.SourceInfo{
			Name: s.Name, Engine: s.Engine, Mode: string(s.Policy.Mode), Plans: string(s.Policy.Plans), MaxRows: s.Policy.MaxRows, MaxBytes: s.Policy.MaxBytes,
			StatementTimeout: durationpb.New(s.Policy.StatementTimeout), Concurrency: uint32(s.Policy.Concurrency),
			Masked: len(s.Policy.Masks) > 0, TextPatterns: textPatterns(s.Policy),
		})
	}
	return out
}

// textPatterns are what the control plane must not store either.
func textPatterns(p policy.Source) []string {
	var patterns []string
	for _, m := range p.Masks {
		if m.Pattern != "" {
			patterns = append(patterns, m.Pattern)
		}
	}
	return patterns
}

func (d *Daemon) hostStatus() *posternv1.HostStatusResponse {
	_, expires := d.identity.Validity()
	return &posternv1.HostStatusResponse{
		Started: timestamppb.New(d.started), Software: proto.Software(), Sources: d.inventory(), Queries: d.sessions.Running(),
		CertificateExpires: timestamppb.New(expires),
	}
}

func (d *Daemon) hello() *posternv1.HelloRequest {
	return &posternv1.HelloRequest{Host: hostFacts(), Sources: d.inventory(), AuditHead: d.log.Head().Proto(), FirstSinceStart: !d.welcomed.Load(), OpenSessions: uint32(len(d.sessions.Sessions())), Kernels: uint32(len(d.kernels.List()))}
}

// welcome takes the control plane's answer: the agent's name may have changed,
// and its memory of our audit log must fit the log.
func (d *Daemon) welcome(r *posternv1.HelloResponse) {
	d.welcomed.Store(true)
	d.restoreStanding()
	if r.Name != "" && r.Organization != "" {
		if err := d.identity.SetAgent(r.Name, r.Organization); err != nil {
			d.logger.Error("agent's name not kept", "err", err)
		}
	}
	warning := d.compareHeads(r.KnownAuditHead)
	d.agree(r.KnownAuditHead, warning)
	if lost := d.notePeer(r.OrganizationAuditHead); warning == "" {
		warning = lost
	}
	d.mu.Lock()
	said := d.auditWarning
	d.auditWarning = warning
	d.mu.Unlock()
	if warning != "" && warning != said {
		d.logger.Error("audit log differs from what the control plane knows", "err", warning)
	}
}

// compareHeads says what is wrong with our log in the eyes of the control plane;
// "" if nothing.
func (d *Daemon) compareHeads(known *posternv1.AuditHead) string {
	theirs, err := auditchain.HeadFromProto(known)
	if err != nil || theirs.Sequence == 0 {
		return ""
	}
	ours := d.log.Head()
	if theirs.Sequence > ours.Sequence {
		return fmt.Sprintf("the control plane knows entry %d of this host's audit log, which ends at %d: entries were removed from its end", theirs.Sequence, ours.Sequence)
	}
	page, err := d.log.Read(theirs.Sequence, 1)
	if err != nil || len(page) != 1 {
		return fmt.Sprintf("entry %d of this host's audit log cannot be read: run agentd audit verify", theirs.Sequence)
	}
	e, err := auditchain.Decode(page[0])
	if _, first := d.log.Retired(); err == nil && e.Sequence == first && first > theirs.Sequence {
		return "" // it was retired; what is kept is verified by itself
	}
	if err != nil || e.Hash != hex.EncodeToString(theirs.Hash[:]) {
		return fmt.Sprintf("entry %d of this host's audit log is not the one that the control plane knows: the log was rewritten", theirs.Sequence)
	}
	return ""
}

func (d *Daemon) renewed() {
	if err := d.record("agent.renew"); err != nil {
		d.logger.Error("renewal not recorded", "err", err)
	}
}

func (d *Daemon) linkChanged(s link.State) {
	d.countTransition(s.Up)
	d.noteStanding(s)
	if d.stopping.Load() {
		return
	}
	if s.Up {
		d.reports.Wake()
		d.Notify("STATUS=link up to " + s.URL)
	} else {
		d.Notify("STATUS=link down: " + oneLine(s.Cause))
	}
}

// updateInventory tells the control plane of new sources; the next hello does,
// if the link is down.
func (d *Daemon) updateInventory() {
	client, err := d.link.Client()
	if err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if _, err := client.UpdateInventory(ctx, connect.NewRequest(&posternv1.UpdateInventoryRequest{Sources: d.inventory()})); err != nil {
		d.logger.Warn("control plane not told of the new sources", "err", proto.FromConnect(err))
	}
}

// checkSource is for commands on this host.
func (d *Daemon) checkSource(ctx context.Context, name string) []control.Check {
	return plainChecks(d.sessions.Check(ctx, name))
}

func plainChecks(in []*posternv1.Check) []control.Check {
	var out []control.Check
	for _, c := range in {
		out = append(out, control.Check{Name: c.Name, Result: c.Result, Message: c.Message, Remedy: c.Remedy})
	}
	return out
}

// status is for commands on this host.
func (d *Daemon) status() control.Status {
	a := d.identity.Agent()
	_, expires := d.identity.Validity()
	c := d.config.Load()
	s := control.Status{
		Software: proto.Software(), PID: os.Getpid(), Started: d.started.UTC(), State: "running",
		Agent: control.Agent{
			ID: a.AgentID, Name: a.Name, Organization: a.Organization, URL: c.URL,
			CertificateSerial: d.identity.Serial(), CertificateExpires: expires.UTC(),
		},
		Kernels: d.kernelStatus(), Attachments: d.attachmentStatus(),
		Sources: []control.Source{}, Queries: []control.Query{}, Sessions: []control.Session{},
	}
	if d.stopping.Load() {
		s.State = "stopping"
	}
	running := map[string]int{}
	for _, q := range d.sessions.Running() {
		running[q.Source]++
		s.Queries = append(s.Queries, control.Query{ID: q.QueryId, Source: q.Source, Started: q.Started.AsTime(), Rows: q.Rows})
	}
	for _, o := range d.sessions.Sessions() {
		s.Sessions = append(s.Sessions, control.Session{
			ID: o.Id, Source: o.Source, Token: o.Principal.GetTokenName(), Opened: o.Opened.AsTime(), LastUsed: o.LastUsed.AsTime(),
			Transaction: o.Transaction, Statements: o.Statements,
		})
	}
	for _, o := range d.sessions.WireSessions() {
		s.Sessions = append(s.Sessions, control.Session{
			ID: o.SessionId, Source: o.Source, Token: o.Principal.GetTokenName(), Opened: o.Opened.AsTime(), Statements: o.Statements, Protocol: "postgresql",
		})
	}
	for _, src := range c.Sources {
		s.Sources = append(s.Sources, control.Source{
			Name: src.Name, Engine: src.Engine, Mode: string(src.Policy.Mode), MaxRows: src.Policy.MaxRows, MaxBytes: src.Policy.MaxBytes,
			StatementTimeoutSeconds: src.Policy.StatementTimeout.Seconds(), Concurrency: src.Policy.Concurrency, Running: running[src.Name],
		})
	}
	head := d.log.Head()
	s.Audit.Sequence = head.Sequence
	_, s.Audit.First = d.log.Retired()
	if f := d.forward; f != nil {
		s.Audit.Syslog = &control.Syslog{To: f.chain.to, Through: f.through.Load(), Error: f.Stats().Err}
	}
	_, s.Audit.Bytes = d.log.Stats()
	if head.Sequence > 0 {
		s.Audit.Hash = hex.EncodeToString(head.Hash[:])
	}
	d.mu.Lock()
	s.Config = control.File{Path: c.File, Loaded: d.loaded.UTC(), Error: d.reloadError}
	s.Audit.Warning = d.auditWarning
	d.mu.Unlock()
	s.Link = d.linkStatus()
	return s
}

func (d *Daemon) linkStatus() control.Link {
	l := d.link.State()
	out := control.Link{
		Up: l.Up, Since: l.Since.UTC(), URL: l.URL, Cause: l.Cause, Attempts: l.Attempts, Tunnel: l.TunnelID, Remote: l.Remote,
		RoundTripSeconds: l.RoundTrip.Seconds(), Streams: l.Streams, PeerSoftware: l.PeerSoftware, ClockSkewSeconds: l.Skew.Seconds(),
	}
	if !l.Up && l.Code != 0 {
		out.Code = l.Code.String()[len("ERROR_CODE_"):]
	}
	return out
}
