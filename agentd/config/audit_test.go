package config

import (
	"strings"
	"testing"
	"time"
)

func TestAudit(t *testing.T) {
	if c, err := Parse("f.yaml", []byte("url: https://cp\n"), nil); err != nil || c.Audit != (Audit{}) {
		t.Errorf("without audit: %+v, %v", c, err)
	}
	c, err := Parse("f.yaml", []byte("audit: {retention: 400d, max_size: 4GiB}\n"), nil)
	if want := (Audit{Retention: 400 * 24 * time.Hour, MaxSize: 4 << 30}); err != nil || c.Audit != want {
		t.Errorf("got %+v, %v, want %+v", c, err, want)
	}
	for in, want := range map[string]string{
		"{retention: 23h}":       `f.yaml:1: audit.retention: "23h" is not a time of 24h or more`,
		"{retention: 0d}":        `audit.retention: "0d"`,
		"{retention: -3d}":       `audit.retention: "-3d"`,
		"{retention: 99999999d}": `audit.retention: "99999999d"`,
		"{retention: for ever}":  `audit.retention: "for ever"`,
		"{max_size: 63MiB}":      "audit.max_size: 63MiB is less than 64MiB",
		"{max_size: lots}":       `audit.max_size: "lots" is not a size`,
		"{max_sice: 1GiB}":       "unknown key audit.max_sice: did you mean max_size?",
	} {
		if _, err := Parse("f.yaml", []byte("audit: "+in+"\n"), nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", in, err, want)
		}
	}
}
