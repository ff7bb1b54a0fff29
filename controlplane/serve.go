package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/postern-dev/postern/controlplane/audit"
	"github.com/postern-dev/postern/controlplane/blob"
	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/proto/syslog"
)

// Options are the flags of `controlplane serve`.
type Options struct {
	// Data is the directory of the CA's master key, the SQLite database and the
	// first admin token.
	Data string
	// Listen is the address of API and tunnel endpoint.
	Listen string
	// PGListen is the address for clients of PostgreSQL; empty means none.
	PGListen string
	// TLSCert and TLSKey are PEM files; both or none.
	TLSCert, TLSKey string
	// Database is a PostgreSQL URL without a password; empty means SQLite.
	Database string
	// CASettle is how long a new certificate authority is announced before it issues; 0 means 10 s.
	// There is no flag for it.
	CASettle time.Duration
	// DatabasePasswordFile is read afresh whenever PostgreSQL refuses the
	// password that was read last.
	DatabasePasswordFile string
	// Blob is where the contents of files are: a directory, or s3://BUCKET?...; empty means
	// the directory blob in Data.
	Blob string
	// OrganizationFiles bounds the files, directories and links of an organization's
	// workspaces; 0: no limit.
	OrganizationFiles uint64
	// PeerListen is the address for other control planes on the same database; empty means
	// that there are none. PeerAdvertise is the https URL under which they reach it.
	PeerListen, PeerAdvertise string
	// DrainDelay is how long everything is still served at a stop, while /readyz
	// already fails.
	DrainDelay time.Duration
	// AuditRetention is how long audit entries are kept; 0 means for ever.
	AuditRetention time.Duration
	// HistoryAge is how long queries and their rows are kept.
	HistoryAge time.Duration
	// DrainTimeout bounds how long requests under way may take to end at a stop.
	DrainTimeout time.Duration
	// AuditSyslog is where audit entries are forwarded to.
	AuditSyslog SyslogOptions
	// LogLevel is debug, info, warn or error; LogFormat is text or json.
	LogLevel, LogFormat string
}

// Validate reports the first mistake.
func (o Options) Validate() error {
	switch {
	case o.Data == "":
		return errors.New("--data is missing: name the directory to keep state in")
	case (o.TLSCert == "") != (o.TLSKey == ""):
		return errors.New("--tls-cert and --tls-key belong together")
	case o.DatabasePasswordFile != "" && o.Database == "":
		return errors.New("--database-password-file needs --database")
	case o.AuditRetention != 0 && o.AuditRetention < audit.LeastRetention:
		return fmt.Errorf("--audit-retention %s is less than %s", o.AuditRetention, audit.LeastRetention)
	case o.HistoryAge != 0 && o.HistoryAge < time.Minute:
		return errors.New("--history-age must be at least 1m")
	case o.DrainTimeout < 0:
		return errors.New("--drain-timeout cannot be negative")
	}
	if err := o.AuditSyslog.validate(); err != nil {
		return err
	}
	if err := o.validatePeers(); err != nil {
		return err
	}
	if err := blob.Validate(o.Blob); err != nil {
		return fmt.Errorf("--blob: %w", err)
	}
	_, err := o.logger(os.Stderr, new(slog.LevelVar))
	return err
}

func (o Options) logger(out *os.File, current *slog.LevelVar) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(o.LogLevel)); err != nil {
		return nil, fmt.Errorf("--log-level %q is none of debug, info, warn, error", o.LogLevel)
	}
	current.Set(level)
	options := &slog.HandlerOptions{Level: current}
	switch o.LogFormat {
	case "text":
		return slog.New(slog.NewTextHandler(out, options)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(out, options)), nil
	}
	return nil, fmt.Errorf("--log-format %q is neither text nor json", o.LogFormat)
}

func serveCommand() *cobra.Command {
	var o Options
	cmd := &cobra.Command{
		Use:   "serve --data DIR",
		Short: "Run the control plane",
		Long: `Run the control plane until SIGTERM or Ctrl-C.

The first start makes the CA and writes DIR/admin.token (0600): the token of the
first admin. State is kept in DIR; metadata in DIR/controlplane.db, or in the
PostgreSQL that --database names.

Without --tls-cert it speaks plain HTTP: put a TLS-terminating proxy in front of
anything but a lab. Agents authenticate every byte by themselves either way, but
API tokens and results of users need that TLS.

With --peer-listen several control planes share one PostgreSQL and one object store
behind a load balancer; each has a DIR of its own with the same master.key.

With --pg-listen clients of PostgreSQL connect with user=TOKENNAME, the API token as
the password and dbname=AGENT/SOURCE.`,
		Example: `  controlplane serve --data /var/lib/postern
  controlplane serve --data /var/lib/postern --listen 0.0.0.0:443 --tls-cert cert.pem --tls-key key.pem
  controlplane serve --data /var/lib/postern --listen 0.0.0.0:443 --pg-listen 0.0.0.0:5432 --tls-cert cert.pem --tls-key key.pem
  controlplane serve --data /var/lib/postern --database postgres://postern@db/postern --database-password-file /etc/postern/db.pw
  controlplane serve --data /var/lib/postern --database postgres://postern@db/postern --blob s3://postern --listen 0.0.0.0:8080 --peer-listen 10.0.0.5:9443`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.Validate(); err != nil {
				return usageError{err}
			}
			level := new(slog.LevelVar)
			log, err := o.logger(os.Stderr, level)
			if err != nil {
				return usageError{err}
			}
			harden(log)
			ctx, cancel := context.WithCancel(cmd.Context())
			followed, ready := make(chan struct{}), make(chan struct{})
			go func() { defer close(followed); followLevel(ctx, log, level, ready) }()
			<-ready
			defer func() { cancel(); <-followed }()
			server, err := NewServer(cmd.Context(), o, log)
			if err != nil {
				return err
			}
			if stop, err := serveLevel(o.Data, log, level); err != nil {
				log.Warn("controlplane log-level will not work", "err", err)
			} else {
				defer stop()
			}
			return server.Run(cmd.Context())
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Data, "data", "", "directory to keep state in; made if it is not there")
	f.StringVar(&o.Listen, "listen", "127.0.0.1:8080", "address of the API and the tunnel endpoint")
	f.StringVar(&o.PGListen, "pg-listen", "", "address for psql and other clients of PostgreSQL, such as 127.0.0.1:5432; none if empty; needs --tls-cert but on loopback")
	f.StringVar(&o.TLSCert, "tls-cert", "", "certificate chain, PEM; read again when it changes")
	f.StringVar(&o.TLSKey, "tls-key", "", "its private key, PEM")
	f.StringVar(&o.Database, "database", "", "PostgreSQL for the metadata, postgres://user@host/db; default SQLite in --data")
	f.StringVar(&o.DatabasePasswordFile, "database-password-file", "", "file with that database's password; may change at any time")
	f.StringVar(&o.Blob, "blob", "", "where contents of files are kept: a directory, or s3://BUCKET?region=R&endpoint=URL&prefix=P/; default: the directory blob in --data")
	f.Uint64Var(&o.OrganizationFiles, "organization-files", 100_000_000, "how many files, directories and links all workspaces of an organization may have together; 0: no limit")
	f.StringVar(&o.PeerListen, "peer-listen", "", "address for other control planes on the same --database, such as 10.0.0.5:9443; none if empty")
	f.StringVar(&o.PeerAdvertise, "peer-advertise", "", "https://HOST:PORT under which the others reach --peer-listen; default: that address")
	f.DurationVar(&o.DrainDelay, "drain-delay", 0, "how long everything is still served at a stop while /readyz already fails, for load balancers that ask it")
	f.DurationVar(&o.HistoryAge, "history-age", store.DefaultHistoryAge, "how long queries and the rows kept with them stay in the history")
	f.Var((*age)(&o.AuditRetention), "audit-retention", "how long audit entries are kept, such as 400d, at least 24h; without it for ever; see docs/controlplane.md before you set it")
	f.StringVar(&o.AuditSyslog.To, "audit-syslog", "", "syslog server to forward audit entries to: tls://HOST:6514, tcp://HOST:514, udp://HOST:514 or unix:///dev/log; none if empty")
	f.StringVar(&o.AuditSyslog.Facility, "audit-syslog-facility", syslog.DefaultFacility, "its facility: auth, authpriv, audit, daemon, local0 to local7, syslog or user")
	f.IntVar(&o.AuditSyslog.MaxMessage, "audit-syslog-max-message", syslog.DefaultMessage, "the longest message that it takes, in bytes; longer entries have their texts cut")
	f.StringVar(&o.AuditSyslog.Files.CA, "audit-syslog-ca", "", "with tls://: authorities of its certificate, PEM, instead of the system's; read for each connection, like the next two")
	f.StringVar(&o.AuditSyslog.Files.Cert, "audit-syslog-cert", "", "with tls://: certificate to show to it, PEM")
	f.StringVar(&o.AuditSyslog.Files.Key, "audit-syslog-key", "", "with tls://: its private key, PEM")
	f.DurationVar(&o.DrainTimeout, "drain-timeout", 30*time.Second, "how long requests under way may take to end at a stop")
	f.StringVar(&o.LogLevel, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&o.LogFormat, "log-format", "text", "text or json")
	return cmd
}
