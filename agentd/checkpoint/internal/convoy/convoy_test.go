package convoy

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"

	"github.com/postern-dev/postern/proto"
)

// simulatedIdentity signs with a key of its own; its certificate is its public key and
// name, and every simulatedIdentity believes it.
type simulatedIdentity struct {
	name string
	key  ed25519.PrivateKey
}

func newIdentity(t testing.TB, name string) simulatedIdentity {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return simulatedIdentity{name, key}
}

func (i simulatedIdentity) Sign(statement []byte) (certificate, signature []byte, err error) {
	return append(slices.Clone(i.key.Public().(ed25519.PublicKey)), i.name...), ed25519.Sign(i.key, statement), nil
}

func (simulatedIdentity) VerifyPeer(certificate, signature, statement []byte) (string, error) {
	if len(certificate) < ed25519.PublicKeySize || !ed25519.Verify(certificate[:ed25519.PublicKeySize], statement, signature) {
		return "", proto.Errorf(proto.CodeInvalid, "the other host's signature is wrong")
	}
	return string(certificate[ed25519.PublicKeySize:]), nil
}

// taken is what arrived.
type taken struct{ parts []string }

func (t *taken) File(name string, size int64, r io.Reader) error {
	b, err := io.ReadAll(r)
	t.parts = append(t.parts, fmt.Sprintf("%s %d %x", name, size, b[:min(len(b), 8)]))
	return err
}

func (t *taken) Checkpoint(r io.Reader, older bool, answer func([]byte) error) error {
	b, err := io.ReadAll(r)
	if older {
		return errors.Join(answer([]byte("answer")), ErrSkip)
	}
	t.parts = append(t.parts, fmt.Sprintf("checkpoint %d", len(b)))
	return err
}

var move = Move{ID: "mov_1", Kernel: "kernel", Organization: "org", From: "agt_a", To: "agt_b"}

// sent is a whole stream, and what it takes to receive it.
func sent(t testing.TB, big int) (stream []byte, b simulatedIdentity, p *Party) {
	t.Helper()
	a, b := newIdentity(t, "agt_a"), newIdentity(t, "agt_b")
	p, err := NewParty(move)
	if err != nil {
		t.Fatal(err)
	}
	offer, err := p.Offer(b)
	if err != nil {
		t.Fatal(err)
	}
	if err := CheckOffer(a, move, offer); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	frames, answers, err := send(&out, a, move, offer)
	if err != nil {
		t.Fatal(err)
	}
	w := &Writer{frames, answers}
	cargo := bytes.Repeat([]byte("secret memory "), big)
	if err := errors.Join(
		w.File("journal/x", int64(len(cargo)), bytes.NewReader(cargo)), w.File("empty", 0, strings.NewReader("")),
		w.Checkpoint(false, func(w io.Writer, _ func() error) error { _, err := w.Write(cargo); return err }, nil), w.End(),
	); err != nil {
		t.Fatal(err)
	}
	return out.Bytes(), b, p
}

// from is a stream whose answers nobody reads.
func from(stream []byte) io.ReadWriter {
	return struct {
		io.Reader
		io.Writer
	}{bytes.NewReader(stream), io.Discard}
}

// TestAnswers: both sides speak with each other, and what is left out does not end it.
func TestAnswers(t *testing.T) {
	a, b := newIdentity(t, "agt_a"), newIdentity(t, "agt_b")
	p, err := NewParty(move)
	if err != nil {
		t.Fatal(err)
	}
	offer, err := p.Offer(b)
	if err != nil {
		t.Fatal(err)
	}
	here, there := net.Pipe()
	defer here.Close()  //nolint:errcheck // a test's
	defer there.Close() //nolint:errcheck // a test's
	var got taken
	received := make(chan error, 1)
	go func() { received <- Receive(there, b, p, []byte("greeting"), &got) }()
	w, greeting, err := Send(here, a, move, offer)
	if err != nil || string(greeting) != "greeting" {
		t.Fatalf("%q, %v", greeting, err)
	}
	failed := errors.New("damaged")
	for range 3 {
		answered := make(chan string, 1)
		err := w.Checkpoint(true, func(w io.Writer, flush func() error) error {
			if _, err := w.Write(make([]byte, 200_000)); err != nil {
				return err
			}
			return errors.Join(flush(), failed)
		}, func(err error) bool {
			go func() { // it comes when all of the checkpoint has arrived
				text, err := w.Answer()
				answered <- fmt.Sprint(string(text), err)
			}()
			return errors.Is(err, failed)
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := w.s.flush(0); err != nil {
			t.Fatal(err)
		}
		if text := <-answered; text != "answer<nil>" {
			t.Errorf("answered %q", text)
		}
	}
	if err := w.Checkpoint(false, func(io.Writer, func() error) error { return failed }, nil); !errors.Is(err, failed) {
		t.Errorf("the newest checkpoint failed: %v", err)
	}
	if err := w.File("after", 0, strings.NewReader("")); err != nil {
		t.Fatal(err)
	}
	here.Close() //nolint:errcheck // the other side must notice
	if err := <-received; err == nil {
		t.Error("a stream without an end was taken")
	}
}

func TestArrives(t *testing.T) {
	for _, n := range []int{0, 1, 5000, 200_000} {
		stream, b, p := sent(t, n)
		if bytes.Contains(stream, []byte("secret memory")) || bytes.Contains(stream, []byte("journal/x")) {
			t.Error("what is sent can be read")
		}
		var got taken
		if err := Receive(from(stream), b, p, nil, &got); err != nil {
			t.Fatal(err)
		}
		if len(got.parts) != 3 || !strings.HasPrefix(got.parts[0], fmt.Sprintf("journal/x %d", 14*n)) || got.parts[1] != "empty 0 " || got.parts[2] != fmt.Sprintf("checkpoint %d", 14*n) {
			t.Errorf("got %q", got.parts)
		}
	}
}

// TestAlteredIsRefused cuts a stream everywhere, and changes a bit of each of its bytes.
func TestAlteredIsRefused(t *testing.T) {
	stream, b, p := sent(t, 20)
	for n := range stream {
		if err := Receive(from(stream[:n]), b, p, nil, &taken{}); err == nil {
			t.Fatalf("a stream of %d of %d bytes was taken", n, len(stream))
		}
	}
	hello := 4 + int(stream[3]) + int(stream[2])<<8
	for n := range stream {
		other := slices.Clone(stream)
		other[n] ^= 1
		var got taken
		if err := Receive(from(other), b, p, nil, &got); err == nil {
			t.Fatalf("a stream with byte %d altered was taken (the hello has %d): %q", n, hello, got.parts)
		}
	}
}

func TestTheWrongHostIsRefused(t *testing.T) {
	stream, b, p := sent(t, 20)
	a, evil := newIdentity(t, "agt_a"), newIdentity(t, "agt_evil")
	offer, err := p.Offer(evil)
	if err != nil {
		t.Fatal(err)
	}
	if err := CheckOffer(a, move, offer); err == nil || !strings.Contains(err.Error(), "agt_evil") {
		t.Errorf("another host's offer: %v", err)
	}
	other := move
	other.Kernel = "another"
	if offer, err = p.Offer(b); err != nil {
		t.Fatal(err)
	}
	if err := CheckOffer(a, other, offer); err == nil {
		t.Error("an offer for another kernel was taken")
	}
	if _, _, err := Send(&bytes.Buffer{}, a, other, offer); err == nil {
		t.Error("an offer for another kernel was sent to")
	}
	// The stream of one offer, for another one of the same move.
	again, err := NewParty(move)
	if err != nil {
		t.Fatal(err)
	}
	if err := Receive(from(stream), b, again, nil, &taken{}); !errors.Is(err, ErrCut) {
		t.Errorf("a stream that was kept: %v", err)
	}
	// Somebody else sends.
	if offer, err = p.Offer(b); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	w, _, err := send(&out, evil, move, offer)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := Receive(from(out.Bytes()), b, p, nil, &taken{}); err == nil || !strings.Contains(err.Error(), "agt_evil") {
		t.Errorf("another host's stream: %v", err)
	}
}

// FuzzParts feeds what is inside of a stream, as a host that is authenticated and hostile.
func FuzzParts(f *testing.F) {
	f.Add([]byte("F\x01x\x03abcC\x02hi\x00E"))
	f.Add([]byte("F\x01x\xff\xff\xff\xff\x0fabc"))
	f.Add([]byte("C\xff\xff\xff\xff\x0f"))
	a, b := newIdentity(f, "agt_a"), newIdentity(f, "agt_b")
	p, err := NewParty(move)
	if err != nil {
		f.Fatal(err)
	}
	offer, err := p.Offer(b)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, inside []byte) {
		var out bytes.Buffer
		s, _, err := send(&out, a, move, offer)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Write(inside); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if err := Receive(from(out.Bytes()), b, p, nil, &taken{}); err == nil && !bytes.HasSuffix(inside, []byte("E")) {
			t.Errorf("%q was taken", inside)
		}
	})
}
