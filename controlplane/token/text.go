package token

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"log/slog"
	"strings"

	"github.com/postern-dev/postern/proto"
)

const (
	textPrefix  = "pst1_"
	idLen       = 26
	secretLen   = 32
	checksumLen = 4
	maxText     = 256
)

var encoding = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// Text is an API token in parts. It is a secret: it prints as "redacted", and
// only Encode gives its text.
type Text struct {
	// ID is the token's public id, tok_….
	ID     string
	secret [secretLen]byte
}

// NewText makes a token with a new id and secret.
func NewText() Text {
	t := Text{ID: proto.NewID(proto.TokenPrefix)}
	rand.Read(t.secret[:]) //nolint:errcheck // never fails, it aborts the program
	return t
}

// Encode is the token's text.
func (t Text) Encode() string {
	sum := t.checksum()
	return textPrefix + strings.TrimPrefix(t.ID, proto.TokenPrefix) + "_" + encoding.EncodeToString(append(t.secret[:], sum[:]...))
}

// Hash is what is stored of it: the SHA-256 of the secret.
func (t Text) Hash() [sha256.Size]byte { return sha256.Sum256(t.secret[:]) }

func (t Text) checksum() [checksumLen]byte {
	sum := sha256.Sum256(append([]byte(textPrefix+t.ID), t.secret[:]...))
	return [checksumLen]byte(sum[:checksumLen])
}

// Parse reads a token. Its errors have the code UNAUTHENTICATED and never quote
// the text.
func Parse(text string) (Text, error) {
	body, ok := strings.CutPrefix(text, textPrefix)
	switch {
	case text == "":
		return Text{}, malformed("it is empty")
	case len(text) > maxText:
		return Text{}, malformed("it is too long")
	case !ok:
		return Text{}, malformed("it does not begin with " + textPrefix)
	}
	id, rest, ok := strings.Cut(body, "_")
	if !ok || len(id) != idLen || strings.Trim(id, "0123456789abcdefghijklmnopqrstuvwxyz") != "" {
		return Text{}, malformed("its id is not one")
	}
	raw, err := encoding.DecodeString(rest)
	if err != nil || len(raw) != secretLen+checksumLen || encoding.EncodeToString(raw) != rest {
		return Text{}, malformed("it has the wrong length or characters that no token has; was all of it copied?")
	}
	t := Text{ID: proto.TokenPrefix + id, secret: [secretLen]byte(raw)}
	if t.checksum() != [checksumLen]byte(raw[secretLen:]) {
		return Text{}, malformed("its checksum does not match; was a character changed?")
	}
	return t, nil
}

func malformed(why string) error {
	return proto.Errorf(proto.CodeUnauthenticated, "this is not an API token: %s", why)
}

// String hides the token.
func (Text) String() string { return "redacted" }

// GoString hides the token.
func (Text) GoString() string { return "redacted" }

// LogValue hides the token.
func (Text) LogValue() slog.Value { return slog.StringValue("redacted") }

// MarshalJSON hides the token.
func (Text) MarshalJSON() ([]byte, error) { return []byte(`"redacted"`), nil }
