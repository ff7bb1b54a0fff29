package pagestore

import (
	"encoding/json"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/postern-dev/postern/proto"
)

const (
	metaMagic  = "PSTMETA1"
	metaSuffix = ".meta"
	fileSuffix = ".files"

	// maxMeta bounds a sealed Meta in bytes.
	maxMeta = 256 << 10
)

// ID names a checkpoint: "ckp_" and 26 characters that sort by time.
type ID string

// IDPrefix begins every checkpoint's id.
const IDPrefix = "ckp_"

// NewID returns a fresh id.
func NewID() ID { return ID(proto.NewID(IDPrefix)) }

func (id ID) valid() bool {
	return len(id) == len(IDPrefix)+26 && strings.HasPrefix(string(id), IDPrefix) && plainName(string(id))
}

// plainName: a name that is safe as a file's.
func plainName(s string) bool {
	if s == "" || len(s) > 64 {
		return false
	}
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '_' && c != '-' {
			return false
		}
	}
	return true
}

// Host is what a checkpoint needs of a host to be restored there.
type Host struct {
	Architecture string `json:"architecture,omitempty"` // GOARCH
	CPU          string `json:"cpu,omitempty"`          // as the caller describes its features
	Kernel       string `json:"kernel,omitempty"`       // release
	CRIU         string `json:"criu,omitempty"`         // version
}

// Meta says what a checkpoint is. The store reads Organization, Kernel, Parent, Time
// and Protected; the rest it keeps for the caller. All of it together is at most
// 256 KiB, as JSON.
type Meta struct {
	ID           ID     `json:"id"`           // Put makes one if it is empty
	Organization string `json:"organization"` // [a-z0-9_-], 1 to 64 characters
	Kernel       string `json:"kernel"`       // [a-z0-9_-], 1 to 64 characters
	Parent       ID     `json:"parent,omitempty"`
	// Label is what a person called it, Kind what made it (the caller's words).
	Label string    `json:"label,omitempty"`
	Cell  string    `json:"cell,omitempty"`
	Kind  string    `json:"kind,omitempty"`
	Time  time.Time `json:"time"` // Put takes the present if it is zero
	// Protected checkpoints are never deleted by Retain.
	Protected  bool              `json:"protected,omitempty"`
	Host       Host              `json:"host"`
	Attributes map[string]string `json:"attributes,omitempty"`
}

// Checkpoint is a stored checkpoint.
type Checkpoint struct {
	Meta
	// Size is what Restore writes, in bytes, holes included; Written what storing it
	// added to the store's directory.
	Size    int64 `json:"size"`
	Written int64 `json:"written"`
}

// record is a Checkpoint as it lies in a .meta file.
type record struct {
	Checkpoint
	Files    string `json:"files"`     // what the .files file is bound to: random, hexadecimal
	FileSize int64  `json:"file_size"` // bytes of the .files file
}

func (m *Meta) check() error {
	switch {
	case !plainName(m.Organization):
		return invalid("store a checkpoint: organization %q is not a name of [a-z0-9_-]", m.Organization)
	case !plainName(m.Kernel):
		return invalid("store a checkpoint: kernel %q is not a name of [a-z0-9_-]", m.Kernel)
	case !m.ID.valid():
		return invalid("store a checkpoint: id %q is not one of a checkpoint", m.ID)
	case m.Parent != "" && !m.Parent.valid():
		return invalid("store a checkpoint: parent %q is not a checkpoint's id", m.Parent)
	case m.Parent == m.ID:
		return invalid("store a checkpoint: %s can't be its own parent", m.ID)
	}
	for _, s := range []string{m.Label, m.Cell, m.Kind} {
		if !utf8.ValidString(s) {
			return invalid("store a checkpoint: a label, cell or kind is not UTF-8")
		}
	}
	return nil
}

// place is what a sealed file of a checkpoint is bound to.
func (o *orgStore) place(id ID) string { return o.name + "\x00" + string(id) }

// sealRecord is the content of r's .meta file.
func (o *orgStore) sealRecord(k *keys, r *record) ([]byte, error) {
	b, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	sealed := k.seal(metaMagic, o.place(r.ID), b)
	if len(sealed) > maxMeta {
		return nil, invalid("store checkpoint %s: its label and attributes take %d bytes, the bound is %d", r.ID, len(sealed), maxMeta)
	}
	return sealed, nil
}

func (o *orgStore) unsealRecord(id ID, sealed []byte) (*record, keyID, error) {
	b, key, err := o.keyset().unseal(metaMagic, o.place(id), "the description of checkpoint "+string(id), sealed)
	if err != nil {
		return nil, key, err
	}
	var r record
	if err := json.Unmarshal(b, &r); err != nil || r.ID != id || r.Organization != o.name || r.Size < 0 || r.FileSize < 0 {
		return nil, key, damaged("the description of checkpoint %s is malformed", id)
	}
	return &r, key, nil
}
