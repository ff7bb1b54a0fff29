package config

import (
	"strconv"
	"strings"
	"time"

	"github.com/postern-dev/postern/agentd/policy"
)

// leastRetention is the shortest time that entries can be kept for, leastAuditSize the least
// that the log can be bounded to.
const (
	leastRetention = 24 * time.Hour
	leastAuditSize = 64 << 20
)

// Audit is what the configuration says of the host's audit log.
type Audit struct {
	// Retention is the age from which on entries may be dropped, and MaxSize the size of the
	// log in bytes above which the oldest are; 0: that is no reason.
	Retention time.Duration
	MaxSize   int64
	// Syslog is where it is forwarded to.
	Syslog Syslog
}

// auditFile is audit: as written.
type auditFile struct {
	Retention string     `yaml:"retention"`
	MaxSize   string     `yaml:"max_size"`
	Syslog    syslogFile `yaml:"syslog"`
}

func (p *problems) audit(in file, c *Config, at func(...any) int) {
	if text := in.Audit.Retention; text != "" {
		d, ok := parseAge(text)
		if !ok || d < leastRetention {
			p.add(at("audit", "retention"), "audit.retention: %q is not a time of 24h or more, such as 36h or 400d", text)
		}
		c.Audit.Retention = d
	}
	if text := in.Audit.MaxSize; text != "" {
		n, err := policy.ParseSize(text)
		switch {
		case err != nil:
			p.add(at("audit", "max_size"), "audit.max_size: %v", err)
		case n < leastAuditSize:
			p.add(at("audit", "max_size"), "audit.max_size: %s is less than 64MiB", text)
		}
		c.Audit.MaxSize = int64(n)
	}
	p.syslog(in.Audit.Syslog, &c.Audit.Syslog, at)
}

// parseAge reads 36h or 400d.
func parseAge(text string) (time.Duration, bool) {
	if days, ok := strings.CutSuffix(text, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 16)
		return time.Duration(n) * 24 * time.Hour, err == nil
	}
	d, err := time.ParseDuration(text)
	return d, err == nil
}
