package config

import (
	"errors"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/policy"
	"github.com/postern-dev/postern/agentd/secret"
)

const whole = `# a comment
url: https://cp.example.com
name: host-1
proxy: http://user:marked-secret@proxy:3128
no_proxy: 10.0.0.0/8,.internal
metrics:
  listen: 127.0.0.1:9469
log: {level: debug, format: json}
sql:
  warm: 2
  idle_timeout: 30s
  uid_base: 2000000
  memory: 512MiB
sources:
  - name: warehouse
    engine: postgres
    dsn: host=/run/postgresql dbname=warehouse user=reader
    password: {file: /etc/postern/warehouse.pw}
    policy:
      mode: read-write
      max_rows: 5
      max_bytes: 2MiB
      statement_timeout: 10s
      concurrency: 3
      keep_rows: {first: 7}
      plans: off
  - name: other
    engine: postgres
    dsn: postgres://reader@db.example.com/other?sslmode=require
`

func TestWholeFile(t *testing.T) {
	c, err := Parse("f.yaml", []byte(whole), nil)
	if err != nil {
		t.Fatal(err)
	}
	if c.URL != "https://cp.example.com" || c.Name != "host-1" || c.Metrics != (Metrics{"tcp", "127.0.0.1:9469"}) ||
		c.Log != (Log{slog.LevelDebug, "json"}) || c.SQL != (SQL{2, 30 * time.Second, 2000000, 512 << 20}) {
		t.Errorf("got %+v", c)
	}
	if len(c.Sources) != 2 || c.Sources[0].Password != (secret.Ref{File: "/etc/postern/warehouse.pw"}) ||
		!reflect.DeepEqual(c.Sources[0].Policy, policy.Source{Mode: policy.ModeReadWrite, MaxRows: 5, MaxBytes: 2 << 20, StatementTimeout: 10 * time.Second, Concurrency: 3, ClientIdle: time.Hour, ClientIdleInTransaction: 10 * time.Minute, KeepFirst: 7, KeepLast: 100, Plans: policy.PlansOff, MaskFilters: policy.FiltersEquality}) ||
		!reflect.DeepEqual(c.Sources[1].Policy, policy.Default()) {
		t.Errorf("sources %+v", c.Sources)
	}
	for target, want := range map[string]string{"wss://cp.example.com/tunnel": "proxy:3128", "https://cp.internal": "", "http://10.1.2.3": ""} {
		u, _ := url.Parse(target) //nolint:errcheck // they are good
		got, err := c.Proxy(u)
		if err != nil || (got == nil) != (want == "") || (got != nil && got.Host != want) {
			t.Errorf("proxy for %s: %v, %v", target, got, err)
		}
	}
}

func TestEmptyFile(t *testing.T) {
	for _, text := range []string{"", "# nothing\n", "---\n"} {
		c, err := Parse("f.yaml", []byte(text), nil)
		if err != nil || c.SQL.Warm != DefaultWarm || c.Log.Format != "text" || c.Proxy != nil {
			t.Errorf("%q: %+v, %v", text, c, err)
		}
	}
}

func TestProblems(t *testing.T) {
	source := "sources:\n  - name: w\n    engine: postgres\n    dsn: host=h dbname=d user=u\n"
	for _, tt := range []struct{ name, text, want string }{
		{"unknown key", "url: https://a\nsorces: []\n", "f.yaml:2: unknown key sorces: did you mean sources?"},
		{"unknown, no idea", "colour: blue\n", "f.yaml:1: unknown key colour: known are attachments, audit, ca_file, kernels, log"},
		{"nested unknown", "log:\n  levle: debug\n", "f.yaml:2: unknown key log.levle: did you mean level?"},
		{"unknown in a source", source + "    passwort: {file: /x}\n", "f.yaml:5: unknown key sources.passwort: did you mean password?"},
		{"unknown in a policy", source + "    policy:\n      max_row: 3\n", "f.yaml:6: unknown key sources.policy.max_row: did you mean max_rows?"},
		{"twice", "url: https://a\nurl: https://b\n", "f.yaml:2: key url is there twice"},
		{"not YAML", "url: [\n", "f.yaml:"},
		{"a list", "- url\n", "f.yaml:1: the file must be a map"},
		{"two documents", "url: https://a\n---\nurl: https://b\n", "more than one YAML document"},
		{"alias", "log: &a {level: info}\nsql: *a\n", "f.yaml:2: sql.an alias"},
		{"wrong type", "sql:\n  warm: many\n", "f.yaml:2: text cannot stand here: a whole number is expected"},
		{"sources as a map", "sources: {name: w}\n", "a list is expected"},
		{"url scheme", "url: ftp://cp\n", "f.yaml:1: url: \"ftp://cp\" is not a URL"},
		{"url password", "url: https://u:marked-secret@cp\n", "f.yaml:1: url: it holds a user or password"},
		{"name", "name: Host_1\n", "f.yaml:1: name:"},
		{"ca_file missing", "ca_file: /nonexistent/ca.pem\n", "f.yaml:1: ca_file: open /nonexistent/ca.pem"},
		{"proxy", "proxy: 'socks5://u:marked-secret@p'\n", "f.yaml:1: proxy: it is not a URL"},
		{"no_proxy alone", "no_proxy: x\n", "f.yaml:1: no_proxy"},
		{"metrics on a network", "metrics: {listen: '0.0.0.0:9469'}\n", "f.yaml:1: metrics.listen: \"0.0.0.0:9469\" is not a loopback address"},
		{"metrics on all", "metrics: {listen: ':9469'}\n", "not a loopback address"},
		{"metrics by name", "metrics: {listen: 'example.com:9469'}\n", "not a loopback address"},
		{"metrics relative", "metrics: {listen: 'unix:x'}\n", "absolute path"},
		{"log level", "log: {level: loud}\n", "log.level"},
		{"log format", "log: {format: xml}\n", "log.format"},
		{"warm", "sql: {warm: 99}\n", "sql.warm"},
		{"idle", "sql: {idle_timeout: 5}\n", "sql.idle_timeout"},
		{"uid", "sql: {uid_base: 0}\n", "sql.uid_base"},
		{"memory", "sql: {memory: 1MiB}\n", "f.yaml:1: sql.memory: 1MiB is not between 128MiB and 1TiB"},
		{"memory's unit", "sql: {memory: much}\n", "f.yaml:1: sql.memory:"},
		{"no name", "sources:\n  - engine: postgres\n    dsn: host=h\n", "f.yaml:2: sources[0]: it has no name"},
		{"bad source name", strings.Replace(source, "name: w", "name: A/B", 1), "f.yaml:2: source name"},
		{"two of a name", source + strings.TrimPrefix(source, "sources:\n"), "f.yaml:5: source w: there are two"},
		{"engine missing", "sources:\n  - name: w\n    dsn: host=h\n", "it has no engine"},
		{"engine mysql without a dsn", "sources:\n  - {name: w, engine: mysql}\n", "f.yaml:2: source w: dsn: it is empty"},
		{"engine mysql with a password", "sources:\n  - {name: w, engine: mysql, dsn: host=h user=u password=x}\n", "f.yaml:2: source w: dsn: it holds a password"},
		{"engine oracle", "sources:\n  - {name: w, engine: oracle, dsn: x}\n", "f.yaml:2: source w: engine \"oracle\" is unknown: use postgres, mysql"},
		{"engine sqlite without a path", "sources:\n  - {name: w, engine: sqlite}\n", "f.yaml:2: source w: dsn: it is empty: write path="},
		{"engine sqlite with a password", "sources:\n  - {name: w, engine: sqlite, dsn: path=/x.db, password: {file: /x}}\n", "f.yaml:2: source w: password: SQLite has none"},
		{"engine sqlite with plans", "sources:\n  - {name: w, engine: sqlite, dsn: path=/x.db, policy: {plans: analyze}}\n", "f.yaml:2: source w: policy.plans"},
		{"engine unknown", strings.Replace(source, "postgres", "oracle", 1), "f.yaml:3: source w: engine \"oracle\" is unknown"},
		{"dsn missing", "sources:\n  - name: w\n    engine: postgres\n", "dsn: it is empty"},
		{"dsn password", strings.Replace(source, "user=u", "user=u password=marked-secret", 1), "f.yaml:4: source w: dsn: it holds a password"},
		{"dsn url password", strings.Replace(source, "host=h dbname=d user=u", "postgres://u:marked-secret@h/d", 1), "it holds a password"},
		{"dsn bad url", strings.Replace(source, "host=h dbname=d user=u", "postgres://u:marked-secret%zz@h/d", 1), "it is not a URL"},
		{"password two ways", source + "    password: {file: /x, env: Y}\n", "f.yaml:5: source w: password: exactly one"},
		{"password as text", source + "    password: marked-secret\n", "f.yaml:5: text"},
		{"vault as text", source + "    password: {vault: x}\n", "text cannot stand here"},
		{"vault without the server", source + "    password: {vault: {kv: secret/w}}\n", "f.yaml:5: source w: password: vault: the file says nothing of the Vault"},
		{"vault without a token", "vault: {address: 'https://v'}\n", "f.yaml:1: vault: it has neither token nor approle"},
		{"vault in the clear", "vault: {address: 'http://v', token: {file: /t}}\n", "f.yaml:1: vault.address: http://v is not encrypted"},
		{"vault in itself", "vault: {address: 'https://v', token: {vault: {kv: secret/t}}}\n", "f.yaml:1: vault.token: what opens Vault can't be in it"},
		{"mask", source + "    policy:\n      mask: [{columns: ['*.email']}]\n", "f.yaml:6: source w: policy.mask: rule 1: with"},
		{"mask key", "mask_key: {file: relative}\n" + source, "f.yaml:1: mask_key: file \"relative\" is not an absolute path"},
		{"keep rows", source + "    policy:\n      keep_rows: some\n", "f.yaml:6: policy.keep_rows is neither off nor {first: N, last: N}"},
		{"keep rows, unknown key", source + "    policy:\n      keep_rows: {frist: 1}\n", "f.yaml:6: unknown key sources.policy.keep_rows.frist: did you mean first?"},
		{"keep too many rows", source + "    policy:\n      keep_rows: {first: 5000}\n", "f.yaml:6: source w: policy.keep_rows: first: 5000 is not between 0 and 1000"},
		{"plans", source + "    policy:\n      plans: some\n", `f.yaml:6: source w: policy.plans: "some" is none of off, structure, full, analyze`},
		{"unknown mode", source + "    policy: {mode: all}\n", `f.yaml:5: source w: policy.mode: "all" is none of metadata, read-only, read-write`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Parse("f.yaml", []byte(tt.text), nil)
			var problems *Error
			if !errors.As(err, &problems) {
				t.Fatalf("got %v", err)
			}
			if !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\n") || strings.Contains(err.Error(), "marked") {
				t.Errorf("got  %v\nwant %s", err, tt.want)
			}
		})
	}
}

func TestAllProblemsAtOnce(t *testing.T) {
	_, err := Parse("f.yaml", []byte("name: A\nlog: {level: loud}\nsources:\n  - {name: w, engine: mysql}\nx: 1\n"), nil)
	var problems *Error
	if !errors.As(err, &problems) || len(problems.Problems) != 4 {
		t.Fatalf("got %v", err)
	}
	if !strings.HasPrefix(err.Error(), "f.yaml:1: name:") || !strings.HasSuffix(err.Error(), "(and 3 more)") {
		t.Errorf("got %v", err)
	}
	if lines := problems.Lines(); !strings.HasPrefix(lines[3], "f.yaml:5:") {
		t.Errorf("got %v", lines)
	}
}

func TestLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agentd.yaml")
	if _, err := Load(path, nil); err == nil || !strings.Contains(err.Error(), "--config") || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
	if err := os.WriteFile(path, []byte(whole), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(path, nil); err == nil || !strings.Contains(err.Error(), "proxy's password") || strings.Contains(err.Error(), "marked") {
		t.Errorf("a password that everybody may read: %v", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(path, nil); err != nil {
		t.Error(err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(path, nil); err == nil || !strings.Contains(err.Error(), "chmod") {
		t.Errorf("writable: %v", err)
	}
}

func TestNeedRestart(t *testing.T) {
	parse := func(text string) *Config {
		t.Helper()
		c, err := Parse("f.yaml", []byte(text), nil)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	base := parse("url: https://a\nproxy: http://p:1\n")
	for text, want := range map[string]string{
		"url: https://a\nproxy: http://p:1\nlog: {level: debug}\nsources: [{name: w, engine: postgres, dsn: host=h}]\n": "",
		"url: https://b\nproxy: http://p:1\n": "url",
		"url: https://a\nproxy: http://q:1\n": "proxy",
		"url: https://a\nproxy: http://p:1\nno_proxy: x\nsql: {warm: 3}\nlog: {format: json}\nmetrics: {listen: '127.0.0.1:1'}\n": "proxy metrics sql log.format",
	} {
		if got := strings.Join(parse(text).NeedRestart(base), " "); got != want {
			t.Errorf("%q: got %q, want %q", text, got, want)
		}
	}
}

func TestBundle(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ca.pem")
	for text, want := range map[string]string{
		"":      "holds no PEM certificate",
		"hello": "holds no PEM certificate",
		"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n": "block 1 is malformed",
		"-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n":    "malformed",
		"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n": "not a certificate",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Parse("f.yaml", []byte("ca_file: "+path+"\n"), nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %q", text, err, want)
		}
	}
}

func TestTunnelURL(t *testing.T) {
	for in, want := range map[string]string{
		"https://cp.example.com": "wss://cp.example.com/tunnel", "http://127.0.0.1:8080/": "ws://127.0.0.1:8080/tunnel",
		"wss://cp.example.com/postern/": "wss://cp.example.com/postern/tunnel", "cp.example.com": "", "https://": "", "https://a?b": "", "": "", "https://%zz": "",
	} {
		got, err := TunnelURL(in)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: got %q, %v", in, got, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(whole))
	f.Add([]byte("a: &a [*a]"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if _, err := Parse("f.yaml", raw, nil); err != nil && strings.Contains(err.Error(), "\n") {
			t.Fatalf("more than one line: %q", err)
		}
	})
}
