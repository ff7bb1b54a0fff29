package convoy

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Identity signs for this host and checks what others signed: the agent's id comes back.
type Identity interface {
	Sign(statement []byte) (certificate, signature []byte, err error)
	VerifyPeer(certificate, signature, statement []byte) (agent string, err error)
}

// Move is what a key is bound to.
type Move struct {
	ID, Kernel, Organization string
	// From and To are the agents' ids.
	From, To string
}

// Party is this host's side of the exchange, for one move.
type Party struct {
	move Move
	key  *ecdh.PrivateKey
}

// NewParty makes a key for one move.
func NewParty(m Move) (*Party, error) {
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	return &Party{m, key}, err
}

// statement is what a side signs: which side it is, the move, and its key.
func (m Move) statement(side string, key []byte) []byte {
	var b []byte
	for _, field := range []string{"postern move of a kernel 1", side, m.ID, m.Kernel, m.Organization, m.From, m.To, string(key)} {
		b = binary.BigEndian.AppendUint32(b, uint32(len(field)))
		b = append(b, field...)
	}
	return b
}

const sender, receiver = "sender", "receiver"

func (p *Party) hello(i Identity, side string) (*posternv1.MoveParty, error) {
	public := p.key.PublicKey().Bytes()
	certificate, signature, err := i.Sign(p.move.statement(side, public))
	if err != nil {
		return nil, err
	}
	return &posternv1.MoveParty{Certificate: certificate, PublicKey: public, Signature: signature}, nil
}

// Offer is what the receiving host says of itself before the kernel is touched.
func (p *Party) Offer(i Identity) (*posternv1.MoveParty, error) { return p.hello(i, receiver) }

// check verifies the other side and returns its key.
func (m Move) check(i Identity, side string, other *posternv1.MoveParty) (*ecdh.PublicKey, error) {
	want := m.From
	if side == receiver {
		want = m.To
	}
	agent, err := i.VerifyPeer(other.GetCertificate(), other.GetSignature(), m.statement(side, other.GetPublicKey()))
	if err != nil {
		return nil, err
	}
	if agent != want {
		return nil, proto.Errorf(proto.CodeInvalid, "the other host is agent %.64s, and not the one that the kernel moves to or from", agent)
	}
	key, err := ecdh.X25519().NewPublicKey(other.GetPublicKey())
	if err != nil {
		return nil, proto.Errorf(proto.CodeInvalid, "the other host's key is malformed")
	}
	return key, nil
}

// CheckOffer verifies what the receiving host said, before the kernel is touched.
func CheckOffer(i Identity, m Move, offer *posternv1.MoveParty) error {
	_, err := m.check(i, receiver, offer)
	return err
}

// seal makes the ciphers that both sides share: of what the sender sends, and of answers.
func (p *Party) seal(other *ecdh.PublicKey, from, to []byte) (cargo, answers cipher.AEAD, err error) {
	secret, err := p.key.ECDH(other)
	if err != nil { // a key of low order
		return nil, nil, proto.Errorf(proto.CodeInvalid, "the other host's key is malformed")
	}
	salt := sha256.Sum256(append(p.move.statement("both", from), to...))
	if cargo, err = derive(secret, salt[:], "postern move cargo 1"); err != nil {
		return nil, nil, err
	}
	answers, err = derive(secret, salt[:], "postern move answers 1")
	return cargo, answers, err
}

func derive(secret, salt []byte, what string) (cipher.AEAD, error) {
	key, err := hkdf.Key(sha256.New, secret, salt, what, 32)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}
