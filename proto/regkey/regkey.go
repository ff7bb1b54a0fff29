package regkey

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"log/slog"
	"strings"

	"github.com/postern-dev/postern/proto"
)

const (
	prefix       = "prk1_"
	idLen        = 10
	secretLen    = 32
	checksumLen  = 4
	rawLen       = idLen + secretLen + sha256.Size + checksumLen
	maxKeyLength = 512
)

var encoding = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// Key is a registration key in parts. It is a secret: it prints as "redacted",
// and only Encode gives its text.
type Key struct {
	// ID is public: 16 characters of base 32.
	ID string
	// Secret proves that the holder may join.
	Secret [secretLen]byte
	// Fingerprint is the SHA-256 of the DER of the control plane's CA
	// certificate.
	Fingerprint [sha256.Size]byte
}

// New makes a key with a random id and secret for the CA with this fingerprint.
func New(fingerprint [sha256.Size]byte) Key {
	var id [idLen]byte
	k := Key{Fingerprint: fingerprint}
	rand.Read(id[:])       //nolint:errcheck // never fails, it aborts the program
	rand.Read(k.Secret[:]) //nolint:errcheck // likewise
	k.ID = encoding.EncodeToString(id[:])
	return k
}

// Encode is the key's text. It panics if ID was not made by New or Parse.
func (k Key) Encode() string {
	raw := make([]byte, 0, rawLen)
	id, err := encoding.DecodeString(k.ID)
	if err != nil || len(id) != idLen {
		panic("regkey: bad key id")
	}
	raw = append(raw, id...)
	raw = append(raw, k.Secret[:]...)
	raw = append(raw, k.Fingerprint[:]...)
	sum := sha256.Sum256(raw)
	raw = append(raw, sum[:checksumLen]...)
	return prefix + encoding.EncodeToString(raw)
}

// Parse reads a key, ignoring white space around it. Its errors have the code
// KEY_MALFORMED and never quote the text.
func Parse(text string) (Key, error) {
	text = strings.TrimSpace(text)
	switch {
	case text == "":
		return Key{}, malformed("it is empty")
	case len(text) > maxKeyLength:
		return Key{}, malformed("it is too long")
	case !strings.HasPrefix(text, prefix):
		return Key{}, malformed("it does not begin with " + prefix)
	}
	body := text[len(prefix):]
	raw, err := encoding.DecodeString(body)
	if err != nil {
		return Key{}, malformed("it has characters that no key has")
	}
	if len(raw) != rawLen {
		return Key{}, malformed("it has the wrong length; was all of it copied?")
	}
	if encoding.EncodeToString(raw) != body {
		return Key{}, malformed("its last character is off")
	}
	sum := sha256.Sum256(raw[:rawLen-checksumLen])
	if string(sum[:checksumLen]) != string(raw[rawLen-checksumLen:]) {
		return Key{}, malformed("its checksum does not match; was a character changed?")
	}
	k := Key{ID: encoding.EncodeToString(raw[:idLen])}
	copy(k.Secret[:], raw[idLen:])
	copy(k.Fingerprint[:], raw[idLen+secretLen:])
	return k, nil
}

func malformed(why string) error {
	return proto.Errorf(proto.CodeKeyMalformed, "this is not a registration key: %s", why)
}

// String hides the key.
func (k Key) String() string { return "redacted" }

// GoString hides the key.
func (k Key) GoString() string { return "redacted" }

// LogValue hides the key.
func (k Key) LogValue() slog.Value { return slog.StringValue("redacted") }

// MarshalJSON hides the key.
func (k Key) MarshalJSON() ([]byte, error) { return []byte(`"redacted"`), nil }
