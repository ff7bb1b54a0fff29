package config

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"golang.org/x/net/http/httpproxy"

	"github.com/postern-dev/postern/agentd/policy"
	"github.com/postern-dev/postern/agentd/secret"
)

// Defaults of what may be left out.
const (
	DefaultFile        = "/etc/postern/agentd.yaml"
	DefaultWarm        = 1
	DefaultIdleTimeout = time.Minute
	// DefaultUIDBase is the first of the user ids that SQL sessions run as; it is
	// above every range that distributions hand out.
	DefaultUIDBase = 1_900_000_000
	// DefaultSQLMemory bounds the process of a SQL session, in bytes; what a file says is between
	// MinSQLMemory and MaxSQLMemory.
	DefaultSQLMemory = 4 << 30
	MinSQLMemory     = 128 << 20
	MaxSQLMemory     = 1 << 40
)

// maxSources bounds the data sources of one host.
const maxSources = 256

// maxFile bounds the configuration file, in bytes.
const maxFile = 1 << 20

// Config is a checked configuration.
type Config struct {
	// File is where it was read; "" if there was none.
	File string
	// URL of the control plane; "" means the one the host registered with.
	URL string
	// Name is what the host would like to be called; "" means its host name.
	Name string
	// OuterCAs are trusted for the outer TLS beside the system's, in DER; may be nil.
	OuterCAs [][]byte
	CAFile   string
	// Proxy chooses the proxy; nil means by the environment.
	Proxy   func(*url.URL) (*url.URL, error)
	Metrics Metrics
	Log     Log
	Audit   Audit
	SQL     SQL
	Vault   Vault
	// MaskKey is the key of masks that hosts share; zero means the host's own.
	MaskKey secret.Ref
	Sources []Source
	Kernels Kernels
	// Attachments are mounts of workspaces.
	Attachments policy.Attachments
	// Buckets are those of Attachments, with how they are reached.
	Buckets []Bucket

	proxy, noProxy string // as written; proxy may hold a password
}

// NeedRestart names the keys whose change from old counts from the next start on.
func (c *Config) NeedRestart(old *Config) []string {
	var keys []string
	for _, k := range []struct {
		key     string
		changed bool
	}{
		{"url", c.URL != old.URL},
		{"ca_file", c.CAFile != old.CAFile},
		{"proxy", c.proxy != old.proxy || c.noProxy != old.noProxy},
		{"metrics", c.Metrics != old.Metrics},
		{"sql", c.SQL != old.SQL},
		{"vault", c.Vault.text != old.Vault.text},
		{"kernels.uid_base", c.Kernels.UIDBase != old.Kernels.UIDBase},
		{"kernels.checkpoints", c.Kernels.Checkpoints != old.Kernels.Checkpoints},
		{"audit.syslog", c.Audit.Syslog != old.Audit.Syslog},
		{"log.format", c.Log.Format != old.Log.Format},
	} {
		if k.changed {
			keys = append(keys, k.key)
		}
	}
	return keys
}

// passwordInside reports whether the file itself holds a password.
func (c *Config) passwordInside() bool {
	u, err := url.Parse(c.proxy)
	if err != nil || u.User == nil {
		return false
	}
	_, has := u.User.Password()
	return has
}

// Metrics says where metrics are served besides the tunnel. Both empty: nowhere.
type Metrics struct {
	Network string // "tcp" (loopback alone) or "unix"
	Address string
}

// Log says what is logged and how.
type Log struct {
	Level  slog.Level
	Format string // "text" or "json"
}

// SQL is how SQL sessions are kept.
type SQL struct {
	// Warm is how many sessions of a source wait connected for their owner.
	Warm int
	// IdleTimeout is how long an owner's session is kept after a statement.
	IdleTimeout time.Duration
	// UIDBase is the first user id that they run as.
	UIDBase uint32
	// Memory bounds the process of one, in bytes.
	Memory uint64
}

// Source is a data source.
type Source struct {
	Name     string
	Engine   string
	DSN      string
	Password secret.Ref
	Policy   policy.Source
}

// file is the YAML as written.
type file struct {
	URL     string `yaml:"url"`
	Name    string `yaml:"name"`
	CAFile  string `yaml:"ca_file"`
	Proxy   string `yaml:"proxy"`
	NoProxy string `yaml:"no_proxy"`
	Metrics struct {
		Listen string `yaml:"listen"`
	} `yaml:"metrics"`
	Log struct {
		Level  string `yaml:"level"`
		Format string `yaml:"format"`
	} `yaml:"log"`
	Audit auditFile `yaml:"audit"`
	SQL   struct {
		Warm        *int    `yaml:"warm"`
		IdleTimeout string  `yaml:"idle_timeout"`
		UIDBase     *uint32 `yaml:"uid_base"`
		Memory      string  `yaml:"memory"`
	} `yaml:"sql"`
	Vault       vaultFile       `yaml:"vault"`
	MaskKey     secret.Ref      `yaml:"mask_key"`
	Sources     []source        `yaml:"sources"`
	Kernels     kernelsFile     `yaml:"kernels"`
	Attachments attachmentsFile `yaml:"attachments"`
}

type source struct {
	Name     string      `yaml:"name"`
	Engine   string      `yaml:"engine"`
	DSN      string      `yaml:"dsn"`
	Password secret.Ref  `yaml:"password"`
	Policy   policy.Spec `yaml:"policy"`
}

// Default is the configuration of a host without a file.
func Default() *Config {
	return &Config{
		Log:     Log{Level: slog.LevelInfo, Format: "text"},
		SQL:     SQL{Warm: DefaultWarm, IdleTimeout: DefaultIdleTimeout, UIDBase: DefaultUIDBase, Memory: DefaultSQLMemory},
		Kernels: defaultKernels(),
	}
}

// Load reads and checks a configuration file. The error is a *Error that lists
// every problem, or the operating system's.
// checkDSN looks at a source's engine and connection string; nil passes all.
func Load(path string, checkDSN func(engine, dsn string) error) (*Config, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("configuration %s does not exist: write it or name another with --config (%w)", path, fs.ErrNotExist)
	} else if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	defer f.Close() //nolint:errcheck // it is only read
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	if st.Mode().Perm()&0o002 != 0 {
		return nil, fmt.Errorf("configuration %s can be written by everybody (mode %04o): run chmod 0644 %s", path, st.Mode().Perm(), path)
	}
	raw, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	if len(raw) > maxFile {
		return nil, fmt.Errorf("configuration %s has more than %d bytes", path, maxFile)
	}
	c, err := Parse(path, raw, checkDSN)
	if err == nil && c.passwordInside() && st.Mode().Perm()&0o004 != 0 {
		return nil, fmt.Errorf("configuration %s holds the proxy's password and can be read by everybody (mode %04o): run chmod 0600 %s", path, st.Mode().Perm(), path)
	}
	return c, err
}

// Parse checks a configuration that was read from path; see Load.
func Parse(path string, raw []byte, checkDSN func(engine, dsn string) error) (*Config, error) {
	c := Default()
	c.File = path
	var in file
	p := &problems{file: path}
	root := p.decode(raw, &in)
	if root == nil && len(p.list) > 0 {
		return nil, p.err()
	}
	at := func(keys ...any) int { return lineOf(root, keys...) }

	c.URL, c.Name = in.URL, in.Name
	if in.URL != "" {
		if _, err := TunnelURL(in.URL); err != nil {
			p.add(at("url"), "url: %v", err)
		}
	}
	if in.Name != "" && !ValidName(in.Name) {
		p.add(at("name"), "name: %q is not 1 to 63 of a-z, 0-9 and -, beginning and ending with a letter or digit", in.Name)
	}
	c.CAFile = in.CAFile
	if in.CAFile != "" {
		ders, err := ReadBundle(in.CAFile)
		if err != nil {
			p.add(at("ca_file"), "ca_file: %v", err)
		}
		c.OuterCAs = ders
	}
	c.Proxy, c.proxy, c.noProxy = p.proxy(in, at), in.Proxy, in.NoProxy
	c.Metrics = p.metrics(in.Metrics.Listen, at("metrics", "listen"))
	p.log(in, c, at)
	p.audit(in, c, at)
	p.sql(in, c, at)
	p.vault(in, c, at)
	if c.MaskKey = in.MaskKey; !in.MaskKey.IsZero() {
		switch err := in.MaskKey.Validate(); {
		case err != nil:
			p.add(at("mask_key"), "mask_key: %v", err)
		case in.MaskKey.Vault != nil:
			p.add(at("mask_key"), "mask_key: vault is not supported here: use file, env or credential")
		}
	}
	p.sources(in, c, at, checkDSN)
	p.kernels(in, c, at, hasKey(root, "kernels"))
	p.attachments(in, c, at, hasKey(root, "attachments"))
	if err := p.err(); err != nil {
		return nil, err
	}
	return c, nil
}

// TunnelURL is where the tunnel of the control plane at this URL is dialed:
// https://cp.example.com gives wss://cp.example.com/tunnel.
func TunnelURL(text string) (string, error) {
	u, err := url.Parse(text)
	if err != nil {
		return "", errors.New("it is not a URL such as https://cp.example.com") // err would show a password
	}
	switch u.Scheme {
	case "https", "wss":
		u.Scheme = "wss"
	case "http", "ws":
		u.Scheme = "ws"
	default:
		return "", fmt.Errorf("%q is not a URL such as https://cp.example.com", u.Redacted())
	}
	switch {
	case u.Hostname() == "":
		return "", fmt.Errorf("%q names no host", u.Redacted())
	case u.User != nil:
		return "", errors.New("it holds a user or password: the host proves itself by its certificate")
	case u.RawQuery != "" || u.Fragment != "":
		return "", fmt.Errorf("%q has more than scheme, host, port and path", u.Redacted())
	}
	u.Path = strings.TrimSuffix(u.Path, "/") + "/tunnel"
	return u.String(), nil
}

var nameForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// ValidName reports whether an agent may be called so.
func ValidName(name string) bool { return nameForm.MatchString(name) }

func (p *problems) proxy(in file, at func(...any) int) func(*url.URL) (*url.URL, error) {
	if in.Proxy == "" {
		if in.NoProxy != "" {
			p.add(at("no_proxy"), "no_proxy: it means nothing without proxy: set both, or neither and use HTTPS_PROXY and NO_PROXY")
		}
		return nil
	}
	u, err := url.Parse(in.Proxy)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Hostname() == "" {
		p.add(at("proxy"), "proxy: it is not a URL such as http://proxy.example.com:3128")
		return nil
	}
	choose := (&httpproxy.Config{HTTPProxy: in.Proxy, HTTPSProxy: in.Proxy, NoProxy: in.NoProxy}).ProxyFunc()
	return func(target *url.URL) (*url.URL, error) {
		u := *target
		switch u.Scheme {
		case "wss":
			u.Scheme = "https"
		case "ws":
			u.Scheme = "http"
		}
		return choose(&u)
	}
}

// metrics accepts loopback addresses and unix sockets: agentd listens on no
// network.
func (p *problems) metrics(listen string, line int) Metrics {
	if listen == "" || listen == "off" {
		return Metrics{}
	}
	if path, ok := strings.CutPrefix(listen, "unix:"); ok {
		if !filepath.IsAbs(path) {
			p.add(line, "metrics.listen: %q is not unix: and an absolute path", listen)
		}
		return Metrics{"unix", path}
	}
	host, port, err := net.SplitHostPort(listen)
	ip := net.ParseIP(host)
	switch {
	case err != nil || port == "":
		p.add(line, "metrics.listen: %q is neither ADDRESS:PORT nor unix:/PATH", listen)
	case host == "localhost":
		host = "127.0.0.1"
	case ip == nil || !ip.IsLoopback():
		p.add(line, "metrics.listen: %q is not a loopback address: agentd listens on no network, use 127.0.0.1:%s or unix:/PATH", listen, port)
	}
	return Metrics{"tcp", net.JoinHostPort(host, port)}
}

func (p *problems) log(in file, c *Config, at func(...any) int) {
	switch in.Log.Level {
	case "", "info":
	case "debug":
		c.Log.Level = slog.LevelDebug
	case "warn":
		c.Log.Level = slog.LevelWarn
	case "error":
		c.Log.Level = slog.LevelError
	default:
		p.add(at("log", "level"), "log.level: %q is none of debug, info, warn, error", in.Log.Level)
	}
	switch in.Log.Format {
	case "":
	case "text", "json":
		c.Log.Format = in.Log.Format
	default:
		p.add(at("log", "format"), "log.format: %q is none of text, json", in.Log.Format)
	}
}

func (p *problems) sql(in file, c *Config, at func(...any) int) {
	if w := in.SQL.Warm; w != nil {
		if *w < 0 || *w > 16 {
			p.add(at("sql", "warm"), "sql.warm: %d is not between 0 and 16", *w)
		}
		c.SQL.Warm = *w
	}
	if text := in.SQL.IdleTimeout; text != "" {
		d, err := time.ParseDuration(text)
		switch {
		case err != nil:
			p.add(at("sql", "idle_timeout"), "sql.idle_timeout: %q is not a duration such as 30s or 5m", text)
		case d < time.Second || d > time.Hour:
			p.add(at("sql", "idle_timeout"), "sql.idle_timeout: %s is not between 1s and 1h", d)
		}
		c.SQL.IdleTimeout = d
	}
	if base := in.SQL.UIDBase; base != nil {
		if *base < 1000 || *base > 4_294_900_000 {
			p.add(at("sql", "uid_base"), "sql.uid_base: %d is not between 1000 and 4294900000", *base)
		}
		c.SQL.UIDBase = *base
	}
	if text := in.SQL.Memory; text != "" {
		n, err := policy.ParseSize(text)
		switch {
		case err != nil:
			p.add(at("sql", "memory"), "sql.memory: %v", err)
		case n < MinSQLMemory || n > MaxSQLMemory:
			p.add(at("sql", "memory"), "sql.memory: %s is not between 128MiB and 1TiB", text)
		}
		c.SQL.Memory = n
	}
}
