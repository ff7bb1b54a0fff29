package pgwire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"slices"
	"strings"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Codes in place of a protocol version, and the newest version that is spoken.
const (
	codeCancel  = 80877102
	codeTLS     = 80877103
	codeGSS     = 80877104
	major       = 3
	newestMinor = 2
)

// maxStartup bounds a message before authentication, in bytes, as in PostgreSQL;
// maxPassword a PasswordMessage.
const (
	maxStartup  = 10_000
	maxPassword = 1024
)

// errNoise is what is closed without an answer: nothing that speaks this protocol.
var errNoise = errors.New("no message of PostgreSQL's protocol")

// readStartup reads one message without type: its code and what follows. Exactly
// its bytes are read, so that nothing sent before TLS is taken for what came
// inside.
func readStartup(r io.Reader) (code uint32, rest []byte, err error) {
	var head [8]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, err
	}
	length := binary.BigEndian.Uint32(head[:])
	if length < 8 || length > maxStartup {
		return 0, nil, errNoise
	}
	rest = make([]byte, length-8)
	_, err = io.ReadFull(r, rest)
	return binary.BigEndian.Uint32(head[4:]), rest, err
}

// startup is a parsed StartupMessage.
type startup struct {
	user, database string
	// settings are what the session is asked to begin with, each name once.
	settings []*posternv1.WireSetting
	// minor is the protocol's minor version from now on; downgraded says that the
	// client asked for another, or for options: those of ours that are unknown.
	minor      uint32
	downgraded bool
	options    []string
}

// parseStartup reads the parameters of a StartupMessage. A *fatal says what is
// wrong.
func parseStartup(version uint32, rest []byte) (*startup, error) {
	if version>>16 != major {
		return nil, fatalf(reasonProtocol, stateNotSupported, "unsupported frontend protocol %d.%d: server supports 3.0 to 3.%d", version>>16, version&0xffff, newestMinor)
	}
	s := &startup{minor: version & 0xffff}
	switch {
	case s.minor == 1: // there is none
		s.minor, s.downgraded = 0, true
	case s.minor > newestMinor:
		s.minor, s.downgraded = newestMinor, true
	}
	malformed := fatalf(reasonProtocol, stateProtocolViolation, "invalid startup packet layout: expected pairs of strings and a terminator as last byte")
	var replication string
	var fromOptions, direct []*posternv1.WireSetting
	for {
		name, after, ok := cutString(rest)
		if !ok {
			return nil, malformed
		}
		if name == "" {
			if len(after) != 0 {
				return nil, malformed
			}
			break
		}
		value, after, ok := cutString(after)
		if !ok {
			return nil, malformed
		}
		rest = after
		switch {
		case name == "user":
			s.user = value
		case name == "database":
			s.database = value
		case name == "replication":
			replication = value
		case name == "options":
			parsed, err := parseOptions(value)
			if err != nil {
				return nil, err
			}
			fromOptions = append(fromOptions, parsed...)
		case strings.HasPrefix(name, "_pq_."):
			s.options, s.downgraded = append(s.options, name), true
		default:
			direct = append(direct, &posternv1.WireSetting{Name: name, Value: value})
		}
	}
	if s.user == "" {
		return nil, fatalf(reasonProtocol, stateInvalidAuth, "no PostgreSQL user name specified in startup packet")
	}
	if !slices.Contains([]string{"", "false", "off", "no", "0", "f", "n"}, strings.ToLower(replication)) {
		return nil, fatalf(reasonRefused, stateNotSupported, "replication connections are not supported here")
	}
	if s.database == "" {
		s.database = s.user // as PostgreSQL has it
	}
	// What stands beside options counts more than what is in them.
	for _, one := range append(fromOptions, direct...) {
		if !mayBegin(one.Name) {
			return nil, fatalf(reasonRefused, statePrivilege, "setting %.64q cannot be given when connecting to a data source of Postern", one.Name).
				with("these can: " + strings.Join(settings, ", "))
		}
		s.settings = slices.DeleteFunc(s.settings, func(other *posternv1.WireSetting) bool { return strings.EqualFold(other.Name, one.Name) })
		s.settings = append(s.settings, one)
	}
	return s, nil
}

// setting is the value of a setting; empty if there is none.
func (s *startup) setting(name string) string {
	for _, one := range s.settings {
		if strings.EqualFold(one.Name, name) {
			return one.Value
		}
	}
	return ""
}

// settings are what a client may ask for at startup; the host holds them against
// its own list.
var settings = []string{
	"application_name", "client_encoding", "DateStyle", "TimeZone", "IntervalStyle", "extra_float_digits", "search_path",
	"statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout", "client_min_messages", "bytea_output", "jit",
	"default_transaction_isolation",
}

func mayBegin(name string) bool {
	return slices.ContainsFunc(settings, func(s string) bool { return strings.EqualFold(s, name) })
}

// cutString cuts a string and its zero byte off.
func cutString(b []byte) (text string, rest []byte, ok bool) {
	i := bytes.IndexByte(b, 0)
	if i < 0 {
		return "", nil, false
	}
	return string(b[:i]), b[i+1:], true
}

// parseOptions reads the command-line options of a startup message: -c name=value and
// --name=value, split as PostgreSQL splits them (a backslash keeps the next
// character). All others are refused.
func parseOptions(text string) ([]*posternv1.WireSetting, error) {
	words := splitOptions(text)
	var parsed []*posternv1.WireSetting
	for i := 0; i < len(words); i++ {
		word := words[i]
		var pair string
		switch {
		case word == "-c" && i+1 < len(words):
			i++
			pair = words[i]
		case strings.HasPrefix(word, "-c"):
			pair = word[2:]
		case strings.HasPrefix(word, "--"):
			pair = word[2:]
		default:
			return nil, fatalf(reasonRefused, statePrivilege, "option %.64q in options= is not allowed", word).with("only -c name=value and --name=value are")
		}
		name, value, ok := strings.Cut(pair, "=")
		if !ok || name == "" {
			return nil, fatalf(reasonRefused, stateInvalidParameter, "option %.64q in options= has no value", word).with("write -c name=value")
		}
		parsed = append(parsed, &posternv1.WireSetting{Name: strings.ReplaceAll(name, "-", "_"), Value: value})
	}
	return parsed, nil
}

func splitOptions(text string) []string {
	var words []string
	var word []byte
	in := false
	for i := 0; i < len(text); i++ {
		c := text[i]
		if strings.IndexByte(" \t\n\r\v\f", c) >= 0 {
			if in {
				words, word, in = append(words, string(word)), nil, false
			}
			continue
		}
		in = true
		if c == '\\' {
			if i++; i == len(text) {
				break
			}
			c = text[i]
		}
		word = append(word, c)
	}
	if in {
		words = append(words, string(word))
	}
	return words
}

// negotiation appends NegotiateProtocolVersion.
func (s *startup) negotiation(b []byte) []byte {
	start := len(b)
	b = append(b, 'v', 0, 0, 0, 0)
	b = binary.BigEndian.AppendUint32(b, major<<16|s.minor)
	b = binary.BigEndian.AppendUint32(b, uint32(len(s.options)))
	for _, option := range s.options {
		b = cstring(b, option)
	}
	return seal(b, start)
}

// readPassword reads a PasswordMessage.
func readPassword(r io.Reader) (string, error) {
	var head [5]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return "", err
	}
	length := binary.BigEndian.Uint32(head[1:])
	if head[0] != 'p' || length < 5 || length > maxPassword {
		return "", fatalf(reasonProtocol, stateProtocolViolation, "expected password response of at most %d bytes, got message type %q with length %d", maxPassword, head[0], length)
	}
	body := make([]byte, length-4)
	if _, err := io.ReadFull(r, body); err != nil {
		return "", err
	}
	text, rest, ok := cutString(body)
	if !ok || len(rest) != 0 {
		return "", fatalf(reasonProtocol, stateProtocolViolation, "invalid password packet size")
	}
	return text, nil
}
