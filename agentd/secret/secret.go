package secret

import (
	"fmt"
	"io"
	"log/slog"
)

const redacted = "redacted"

// Secret is a credential. It prints, logs and marshals as "redacted"; only
// Reveal gives the value.
type Secret struct {
	value string
}

// New makes a Secret.
func New(value string) Secret { return Secret{value: value} }

// Reveal returns the value, for the one place that hands it on.
func (s Secret) Reveal() string { return s.value }

// Empty tells whether there is no value.
func (s Secret) Empty() bool { return s.value == "" }

// String returns "redacted".
func (s Secret) String() string { return redacted }

// GoString returns "redacted".
func (s Secret) GoString() string { return redacted }

// Format writes "redacted" for every verb.
func (s Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// LogValue returns "redacted".
func (s Secret) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalJSON returns "redacted".
func (s Secret) MarshalJSON() ([]byte, error) { return []byte(`"` + redacted + `"`), nil }

// MarshalText returns "redacted"; YAML and others use it.
func (s Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }
