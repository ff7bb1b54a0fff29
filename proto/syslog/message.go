package syslog

import (
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/postern-dev/postern/proto/auditchain"
)

const (
	// DefaultMessage is the longest message that is sent, in bytes, where nothing else is said: what rsyslog
	// takes. LeastMessage and MostMessage bound it; a datagram of UDP has no more.
	DefaultMessage = 8 << 10
	LeastMessage   = 2 << 10
	MostMessage    = 1 << 20
	mostDatagram   = 65_000
)

// Severities of RFC 5424 that are used.
const (
	severityWarning = 4
	severityNotice  = 5
)

// maxSequenceID is the largest that RFC 5424 allows (7.3.1); it begins anew with 1.
const maxSequenceID = 2147483647

// format makes an entry's line a message of at most most bytes.
func (c *Config) format(line []byte, most int) ([]byte, error) {
	e, err := auditchain.Decode(line)
	if err != nil {
		return nil, err
	}
	severity := severityNotice
	if e.Outcome == "failed" || e.Outcome == "denied" || e.Verdict == "denied" {
		severity = severityWarning
	}
	head := fmt.Sprintf(`<%d>1 %s %s %s %d %s [meta sequenceId="%d"] `, c.Facility*8+severity, e.Time.UTC().Format("2006-01-02T15:04:05.000Z"),
		word(c.Hostname, 255), word(c.App, 48), c.PID, word(e.Action, 32), (e.Sequence-1)%maxSequenceID+1)
	if len(head)+len(line) > most {
		line = cut(e, most-len(head))
	}
	return append([]byte(head), line...), nil
}

// word is a field of a header: printable ASCII without spaces, at most n of them; "-" is none.
func word(s string, n int) string {
	s = strings.Map(func(r rune) rune {
		if r <= ' ' || r >= 0x7f {
			return '_'
		}
		return r
	}, s)
	if s == "" {
		return "-"
	}
	return s[:min(n, len(s))]
}

// cut makes an entry fit into most bytes: its longest texts first, statement and error.
func cut(e auditchain.Entry, most int) []byte {
	const mark = `{"cut":true,`
	var line []byte
	for limit := most; ; limit /= 2 {
		short := e
		for _, s := range []*string{&short.Statement, &short.Error} {
			*s = clip(*s, limit)
		}
		if limit < auditchain.MaxStatement/128 {
			for _, s := range []*string{
				&short.Organization, &short.Actor, &short.Role, &short.Action, &short.Target, &short.Agent, &short.Source, &short.QueryID, &short.SessionID,
				&short.Verdict, &short.Outcome, &short.Remote,
			} {
				*s = clip(*s, limit)
			}
		}
		line = append([]byte(mark), short.Encode()[1:]...)
		if len(line) <= most || limit == 0 {
			return line
		}
	}
}

// clip is at most n bytes of s, whole characters.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}

// frame makes a message one of a stream: its length first (RFC 6587, 3.4.1).
func frame(message []byte) []byte {
	return append(append(strconv.AppendInt(make([]byte, 0, len(message)+8), int64(len(message)), 10), ' '), message...)
}

// timeOf is an entry's time; zero if it cannot be read.
func timeOf(line []byte) time.Time {
	e, err := auditchain.Decode(line)
	if err != nil {
		return time.Time{}
	}
	return e.Time
}
