package resultstream

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	gproto "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// sink keeps what is written, and fails once full.
type sink struct {
	bytes.Buffer
	begun, flushed int
	full           int
	queryID        string
}

func (s *sink) Begin()       { s.begun++ }
func (s *sink) Flush() error { s.flushed++; return nil }

func (s *sink) SetQueryID(id string) { s.queryID = id }

func (s *sink) Write(p []byte) (int, error) {
	if s.full > 0 && s.Len()+len(p) > s.full {
		return 0, errors.New("hung up")
	}
	return s.Buffer.Write(p)
}

func TestRoundTrip(t *testing.T) {
	want := strings.Repeat("rows and more rows, ", 20_000)
	outcome := &posternv1.QueryOutcome{QueryId: "qry_1", Rows: 5, Error: &posternv1.ErrorDetail{Code: proto.CodeSQL, Message: "division by zero"}}
	var s sink
	w := NewWriter(&s, time.Hour)
	n, err := w.ReadFrom(iotest.HalfReader(strings.NewReader(want)))
	if err != nil || n != int64(len(want)) {
		t.Fatalf("got %d, %v", n, err)
	}
	w.QueryID("qry_1") // in the body, which has begun
	w.End(outcome)
	w.End(outcome) // nothing more
	if w.Stop() || s.begun != 1 || s.flushed == 0 || s.queryID != "" {
		t.Errorf("begun %d times, flushed %d times", s.begun, s.flushed)
	}
	for name, src := range map[string]io.Reader{
		"whole": bytes.NewReader(s.Bytes()), "bytes": iotest.OneByteReader(bytes.NewReader(s.Bytes())), "data with EOF": iotest.DataErrReader(bytes.NewReader(s.Bytes())),
	} {
		r := NewReader(src)
		got, err := io.ReadAll(r)
		if err != nil || string(got) != want {
			t.Errorf("%s: got %d bytes, %v, want %d", name, len(got), err, len(want))
		}
		if !gproto.Equal(r.Outcome(), outcome) || r.QueryID() != "qry_1" {
			t.Errorf("%s: got %v and %q", name, r.Outcome(), r.QueryID())
		}
	}
}

func TestEveryCutIsNoticed(t *testing.T) {
	var s sink
	w := NewWriter(&s, time.Hour)
	w.ReadFrom(strings.NewReader("abc"))
	w.End(&posternv1.QueryOutcome{Rows: 1})
	for n := range s.Len() {
		r := NewReader(bytes.NewReader(s.Bytes()[:n]))
		if _, err := io.ReadAll(r); !errors.Is(err, io.ErrUnexpectedEOF) || r.Outcome() != nil {
			t.Errorf("cut after %d bytes: got %v, want io.ErrUnexpectedEOF", n, err)
		}
	}
}

func TestSignsOfLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s sink
		w := NewWriter(&s, 15*time.Second)
		time.Sleep(14 * time.Second)
		synctest.Wait()
		w.mu.Lock()
		begun, size := s.begun, s.Len()
		w.mu.Unlock()
		if begun != 0 || size != 0 {
			t.Fatal("it began too early: an error could still be a status")
		}
		time.Sleep(180 * time.Second)
		synctest.Wait()
		w.mu.Lock()
		begun, size = s.begun, s.Len()
		w.mu.Unlock()
		if want := headSize * (194 / 15); size != want || begun != 1 {
			t.Errorf("after 194 s: got %d bytes, want %d", size, want)
		}
		if w.Stop() {
			t.Error("stopped as if nothing had been said")
		}
		w.ReadFrom(strings.NewReader("abc"))
		w.End(&posternv1.QueryOutcome{})
		size = s.Len()
		time.Sleep(time.Minute)
		synctest.Wait()
		if s.Len() != size {
			t.Error("a sign of life after the end")
		}
		if got, err := io.ReadAll(NewReader(&s)); err != nil || string(got) != "abc" {
			t.Errorf("got %q, %v", got, err)
		}
	})
}

func TestStopBeforeTheFirstWord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s sink
		w := NewWriter(&s, time.Second)
		w.QueryID("qry_1")
		if s.queryID != "qry_1" || !w.Stop() {
			t.Error("nothing had been written")
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if s.begun != 0 || s.Len() != 0 {
			t.Error("it wrote after Stop")
		}
	})
}

func TestSinkFails(t *testing.T) {
	s := sink{full: 100}
	w := NewWriter(&s, time.Hour)
	defer w.Close()
	_, err := w.ReadFrom(iotest.OneByteReader(strings.NewReader(strings.Repeat("x", 200))))
	if sinkErr := (*SinkError)(nil); !errors.As(err, &sinkErr) {
		t.Errorf("got %v, want a SinkError", err)
	}
	broken := errors.New("broken")
	w2 := NewWriter(&sink{}, time.Hour)
	defer w2.Close()
	if _, err := w2.ReadFrom(iotest.ErrReader(broken)); err != broken { //nolint:errorlint // exactly the source's
		t.Errorf("got %v, want the source's error", err)
	}
}

func TestUnknownKindsAreSkipped(t *testing.T) {
	body := string(frame('Z', []byte("from the future"))) + string(frame(kindData, []byte("abc"))) + string(frame(kindOutcome, []byte("{}")))
	if got, err := io.ReadAll(NewReader(strings.NewReader(body))); err != nil || string(got) != "abc" {
		t.Errorf("got %q, %v", got, err)
	}
}

func FuzzReader(f *testing.F) {
	f.Add([]byte("Q\x00\x00\x05qry_1D\x00\x00\x03abcK\x00\x00\x00O\x00\x00\x02{}"))
	f.Add([]byte("D\xff\xff\xffabc"))
	f.Add([]byte("O\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, body []byte) {
		r := NewReader(bytes.NewReader(body))
		got, err := io.ReadAll(r)
		if len(got) > len(body) {
			t.Error("more came out than went in")
		}
		if (err == nil) != (r.Outcome() != nil) {
			t.Errorf("err %v with outcome %v", err, r.Outcome())
		}
	})
}
