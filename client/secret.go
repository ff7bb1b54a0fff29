package client

import (
	"context"
	"encoding/json"
	"log/slog"
)

// Secret is a token's text. It prints as "redacted"; Reveal gives it away.
type Secret struct{ text string }

// NewSecret wraps text.
func NewSecret(text string) Secret { return Secret{text} }

// Reveal returns the text.
func (s Secret) Reveal() string { return s.text }

// IsZero says whether there is none.
func (s Secret) IsZero() bool { return s.text == "" }

// String implements fmt.Stringer.
func (Secret) String() string { return "redacted" }

// GoString implements fmt.GoStringer.
func (Secret) GoString() string { return "redacted" }

// LogValue implements slog.LogValuer.
func (Secret) LogValue() slog.Value { return slog.StringValue("redacted") }

// MarshalJSON implements json.Marshaler.
func (Secret) MarshalJSON() ([]byte, error) { return json.Marshal("redacted") }

// StaticToken is a Config.Token that never changes.
func StaticToken(s Secret) func(context.Context) (Secret, error) {
	return func(context.Context) (Secret, error) { return s, nil }
}
