package config

import (
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/proto/syslog"
)

func TestAudit(t *testing.T) {
	if c, err := Parse("f.yaml", []byte("url: https://cp\n"), nil); err != nil || c.Audit != (Audit{}) {
		t.Errorf("without audit: %+v, %v", c, err)
	}
	c, err := Parse("f.yaml", []byte("audit: {retention: 400d, max_size: 4GiB}\n"), nil)
	if want := (Audit{Retention: 400 * 24 * time.Hour, MaxSize: 4 << 30}); err != nil || c.Audit != want {
		t.Errorf("got %+v, %v, want %+v", c, err, want)
	}
	c, err = Parse("f.yaml", []byte("audit: {syslog: {to: 'tls://logs.example.com', ca_file: /ca.pem, cert_file: /c.pem, key_file: /k.pem, facility: audit, max_message: 64KiB}}\n"), nil)
	want := Syslog{
		Target: syslog.Target{Network: "tls", Address: "logs.example.com:6514"}, Facility: 13, MaxMessage: 64 << 10,
		Files: syslog.Files{CA: "/ca.pem", Cert: "/c.pem", Key: "/k.pem"},
	}
	if err != nil || c.Audit.Syslog != want {
		t.Errorf("got %+v, %v, want %+v", c, err, want)
	}
	if keys := c.NeedRestart(Default()); len(keys) != 1 || keys[0] != "audit.syslog" {
		t.Errorf("a restart is needed for %v", keys)
	}
	for in, want := range map[string]string{
		"{retention: 23h}":                                `f.yaml:1: audit.retention: "23h" is not a time of 24h or more`,
		"{retention: 0d}":                                 `audit.retention: "0d"`,
		"{retention: -3d}":                                `audit.retention: "-3d"`,
		"{retention: 99999999d}":                          `audit.retention: "99999999d"`,
		"{retention: for ever}":                           `audit.retention: "for ever"`,
		"{max_size: 63MiB}":                               "audit.max_size: 63MiB is less than 64MiB",
		"{max_size: lots}":                                `audit.max_size: "lots" is not a size`,
		"{syslog: {facility: local0}}":                    "audit.syslog: it has no to",
		"{syslog: {to: logs}}":                            `f.yaml:1: audit.syslog.to: "logs" is not a URL`,
		"{syslog: {to: 'tcp://logs', facility: kern}}":    `audit.syslog.facility: "kern"`,
		"{syslog: {to: 'tcp://logs', max_message: 1KiB}}": "audit.syslog.max_message: 1KiB is not between 2KiB and 1MiB",
		"{syslog: {to: 'tcp://logs', ca_file: /ca.pem}}":  "audit.syslog.ca_file: it means nothing without to: tls://",
		"{syslog: {to: 'tls://logs', ca_file: ca.pem}}":   `audit.syslog.ca_file: "ca.pem" is no absolute path`,
		"{syslog: {to: 'tls://logs', cert_file: /c.pem}}": "cert_file and key_file go together",
		"{syslog: {to: 'tls://logs', password: x}}":       "unknown key audit.syslog.password",
		"{max_sice: 1GiB}":                                "unknown key audit.max_sice: did you mean max_size?",
	} {
		if _, err := Parse("f.yaml", []byte("audit: "+in+"\n"), nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", in, err, want)
		}
	}
}
