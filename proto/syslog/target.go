package syslog

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
)

// Target is a syslog server.
type Target struct {
	// Network is "unixgram", "udp", "tcp" or "tls".
	Network string
	// Address is a path, or HOST:PORT.
	Address string
}

// String is the URL of a target.
func (t Target) String() string {
	if t.Network == "unixgram" {
		return "unix://" + t.Address
	}
	return t.Network + "://" + t.Address
}

// ParseTarget reads unix:///dev/log, udp://HOST[:514], tcp://HOST[:514] or tls://HOST[:6514].
func ParseTarget(text string) (Target, error) {
	u, err := url.Parse(text)
	if err != nil || u.User != nil { // err would show a password
		return Target{}, errors.New("it is not a URL such as tls://logs.example.com:6514, tcp://…, udp://… or unix:///dev/log")
	}
	if u.RawQuery != "" || u.Fragment != "" {
		return Target{}, fmt.Errorf("%q has more than scheme, host and port", text)
	}
	port := "514"
	switch u.Scheme {
	case "unix":
		if u.Host != "" || !filepath.IsAbs(u.Path) || len(u.Path) > 107 {
			return Target{}, fmt.Errorf("%q is not unix:// and an absolute path of at most 107 bytes, such as unix:///dev/log", text)
		}
		return Target{"unixgram", u.Path}, nil
	case "tls":
		port = "6514"
	case "udp", "tcp":
	default:
		return Target{}, fmt.Errorf("%q is not a URL such as tls://logs.example.com:6514, tcp://…, udp://… or unix:///dev/log", text)
	}
	if u.Hostname() == "" || strings.Trim(u.Path, "/") != "" {
		return Target{}, fmt.Errorf("%q is not %s://HOST:PORT", text, u.Scheme)
	}
	if p := u.Port(); p != "" {
		if n, err := strconv.ParseUint(p, 10, 16); err != nil || n == 0 {
			return Target{}, fmt.Errorf("%q has no port between 1 and 65535", text)
		}
		port = p
	}
	return Target{u.Scheme, net.JoinHostPort(u.Hostname(), port)}, nil
}

// facilities are those of RFC 5424 that programs other than the kernel's own use.
var facilities = map[string]int{
	"user": 1, "daemon": 3, "auth": 4, "syslog": 5, "authpriv": 10, "audit": 13,
	"local0": 16, "local1": 17, "local2": 18, "local3": 19, "local4": 20, "local5": 21, "local6": 22, "local7": 23,
}

// DefaultFacility is where statements' texts belong: not readable by everybody.
const DefaultFacility = "authpriv"

// Facility is the number of a name such as authpriv, audit or local4; "" is DefaultFacility.
func Facility(name string) (int, error) {
	if name == "" {
		name = DefaultFacility
	}
	n, ok := facilities[name]
	if !ok {
		return 0, fmt.Errorf("%q is none of auth, authpriv, audit, daemon, local0 to local7, syslog, user", name)
	}
	return n, nil
}
