package config

import (
	"path/filepath"

	"github.com/postern-dev/postern/agentd/policy"
	"github.com/postern-dev/postern/proto/syslog"
)

// Syslog is where the audit log is forwarded to. A zero Target means nowhere.
type Syslog struct {
	Target     syslog.Target
	Files      syslog.Files
	Facility   int
	MaxMessage int // in bytes
}

// syslogFile is audit.syslog as written.
type syslogFile struct {
	To         string `yaml:"to"`
	CAFile     string `yaml:"ca_file"`
	CertFile   string `yaml:"cert_file"`
	KeyFile    string `yaml:"key_file"`
	Facility   string `yaml:"facility"`
	MaxMessage string `yaml:"max_message"`
}

func (p *problems) syslog(in syslogFile, out *Syslog, at func(...any) int) {
	line := func(key string) int { return at("audit", "syslog", key) }
	if in.To == "" {
		if in != (syslogFile{}) {
			p.add(at("audit", "syslog"), "audit.syslog: it has no to: set to: tls://logs.example.com:6514, tcp://…, udp://… or unix:///dev/log")
		}
		return
	}
	var err error
	if out.Target, err = syslog.ParseTarget(in.To); err != nil {
		p.add(line("to"), "audit.syslog.to: %v", err)
	}
	if out.Facility, err = syslog.Facility(in.Facility); err != nil {
		p.add(line("facility"), "audit.syslog.facility: %v", err)
	}
	out.MaxMessage = syslog.DefaultMessage
	if in.MaxMessage != "" {
		n, err := policy.ParseSize(in.MaxMessage)
		switch {
		case err != nil:
			p.add(line("max_message"), "audit.syslog.max_message: %v", err)
		case n < syslog.LeastMessage || n > syslog.MostMessage:
			p.add(line("max_message"), "audit.syslog.max_message: %s is not between 2KiB and 1MiB", in.MaxMessage)
		}
		out.MaxMessage = int(min(n, syslog.MostMessage))
	}
	out.Files = syslog.Files{CA: in.CAFile, Cert: in.CertFile, Key: in.KeyFile}
	for key, path := range map[string]string{"ca_file": in.CAFile, "cert_file": in.CertFile, "key_file": in.KeyFile} {
		switch {
		case path == "":
		case !filepath.IsAbs(path):
			p.add(line(key), "audit.syslog.%s: %q is no absolute path", key, path)
		case out.Target.Network != "tls":
			p.add(line(key), "audit.syslog.%s: it means nothing without to: tls://…", key)
		}
	}
	if (in.CertFile == "") != (in.KeyFile == "") {
		p.add(at("audit", "syslog"), "audit.syslog: cert_file and key_file go together: set both, or neither")
	}
}
