package main

import (
	"context"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// retireAudit drops audit entries that are older than --audit-retention, until ctx ends.
func (s *Server) retireAudit(ctx context.Context) {
	if s.options.AuditRetention > 0 {
		s.audit.RunRetention(ctx, s.options.AuditRetention)
	}
}

// age is a flag's duration that may be in days: 400d.
type age time.Duration

// String implements pflag.Value.
func (a *age) String() string {
	switch d := time.Duration(*a); {
	case d == 0:
		return ""
	case d%(24*time.Hour) == 0:
		return strconv.FormatInt(int64(d/(24*time.Hour)), 10) + "d"
	default:
		return d.String()
	}
}

// Type implements pflag.Value.
func (a *age) Type() string { return "duration" }

// Set implements pflag.Value.
func (a *age) Set(text string) error {
	if number, ok := strings.CutSuffix(text, "d"); ok {
		n, err := strconv.ParseUint(number, 10, 32)
		if err != nil || n == 0 || n > math.MaxInt64/uint64(24*time.Hour) {
			return fmt.Errorf("it is no number of days, such as 400d")
		}
		*a = age(time.Duration(n) * 24 * time.Hour)
		return nil
	}
	d, err := time.ParseDuration(text)
	if err != nil || d <= 0 {
		return fmt.Errorf("it is no time, such as 400d or 36h")
	}
	*a = age(d)
	return nil
}
