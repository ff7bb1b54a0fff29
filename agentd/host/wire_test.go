package host

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/wirestream"
)

// fakeWire serves sessions by a function.
type fakeWire struct {
	serve   func(stream io.ReadWriter, log WireLog) error
	drained chan struct{}
	fail    error
}

func (f *fakeWire) OpenWire(_ context.Context, o WireOpen) (WireSession, error) {
	if f.fail != nil {
		return nil, f.fail
	}
	if len(o.Settings) != 1 || o.Settings[0] != [2]string{"TimeZone", "UTC"} {
		return nil, errors.New("the settings are not those asked for")
	}
	return f, nil
}

func (f *fakeWire) Serve(stream io.ReadWriter, log WireLog, hangup func()) error {
	defer hangup()
	return f.serve(stream, log)
}
func (f *fakeWire) Drain() { close(f.drained) }
func (f *fakeWire) Stop()  {}

type wireAgent struct{ url string }

func (a wireAgent) Do(r *http.Request) (*http.Response, error) {
	r.URL.Host = strings.TrimPrefix(a.url, "http://")
	return http.DefaultClient.Do(r)
}

func (b *bench) dialWire(t *testing.T, source string) (io.ReadWriteCloser, error) {
	t.Helper()
	return wirestream.Dial(t.Context(), wireAgent{b.url}, &posternv1.WireRequest{
		SessionId: "w1", Source: source, Principal: principal, Settings: []*posternv1.WireSetting{{Name: "TimeZone", Value: "UTC"}}, Remote: "192.0.2.1",
	})
}

func TestWire(t *testing.T) {
	event := func(id string, state posternv1.WireEvent_State) *posternv1.WireEvent {
		return &posternv1.WireEvent{StatementId: id, State: state, Sql: "SELECT 1", Verdict: "allowed", Rows: 2, Bytes: 20}
	}
	const running, ended = posternv1.WireEvent_STATE_RUNNING, posternv1.WireEvent_STATE_ENDED
	tests := []struct {
		name   string
		source string
		serve  func(stream io.ReadWriter, log WireLog) error
		fail   error
		want   proto.Code
		record string
	}{
		{"reads and writes", "open", func(_ io.ReadWriter, log WireLog) error {
			denied := event("w1_4", ended)
			denied.Verdict, denied.Error = "denied", &posternv1.ErrorDetail{Code: proto.CodePolicyDenied, Message: "no"}
			return errors.Join(log.Event(event("w1_1", ended)), log.Event(event("w1_2", running)), log.Event(event("w1_2", ended)),
				log.Intend([]*posternv1.WireEvent{event("w1_3", running)}), log.Event(event("w1_3", running)), log.Event(event("w1_3", ended)), log.Event(denied))
		}, nil, 0, "wire.open, sql.run done, sql.begin, sql.run done, sql.begin, sql.run done, sql.run denied, wire.close done"},
		{"a statement is lost", "open", func(_ io.ReadWriter, log WireLog) error {
			return errors.Join(log.Event(event("w1_1", running)), proto.Errorf(proto.CodeSQLSessionDied, "killed"))
		}, nil, 0, "wire.open, sql.begin, sql.run failed, wire.close failed"},
		{"refused", "closed", nil, nil, proto.CodePolicyDenied, "wire.close denied"},
		{"unknown", "nothing", nil, nil, proto.CodeNotFound, "wire.close failed"},
		{"no database", "open", nil, proto.Errorf(proto.CodeSourceUnreachable, "no"), proto.CodeSourceUnreachable, "wire.open, wire.close failed"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			b := newBench(t, nil)
			b.cfg.Wire = &fakeWire{serve: test.serve, fail: test.fail}
			stream, err := b.dialWire(t, test.source)
			if proto.CodeOf(err) != test.want {
				t.Fatalf("dial: %v, want code %v", err, test.want)
			}
			if err == nil {
				if _, err := io.ReadAll(stream); err != nil {
					t.Error(err)
				}
				_ = stream.Close()
			}
			for end := time.Now().Add(time.Minute); !strings.Contains(b.audit.actions(), "wire.close") && time.Now().Before(end); {
				time.Sleep(time.Millisecond)
			}
			if got := b.audit.actions(); got != test.record {
				t.Errorf("recorded %s, want %s", got, test.record)
			}
			b.audit.mu.Lock()
			defer b.audit.mu.Unlock()
			for _, e := range b.audit.entries {
				if e.SessionID != "w1" || e.Actor != "token ci" || e.Remote != "192.0.2.1" || strings.HasPrefix(e.Action, "sql.") && e.Statement != "SELECT 1" {
					t.Errorf("entry %+v", e)
				}
			}
		})
	}
}

func TestWireDrain(t *testing.T) {
	b := newBench(t, nil)
	f := &fakeWire{drained: make(chan struct{})}
	f.serve = func(io.ReadWriter, WireLog) error {
		<-f.drained
		return nil
	}
	b.cfg.Wire = f
	stream, err := b.dialWire(t, "open")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = stream.Close() }()
	if err := b.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := b.dialWire(t, "open"); proto.CodeOf(err) != proto.CodeUnavailable {
		t.Errorf("while draining: %v", err)
	}
}

// TestWireWithoutLog shows that nothing begins that can't be recorded.
func TestWireWithoutLog(t *testing.T) {
	b := newBench(t, nil)
	b.cfg.Wire = &fakeWire{serve: func(io.ReadWriter, WireLog) error { panic("it was opened") }}
	b.audit.set(proto.Errorf(proto.CodeStorageFull, "full"))
	if _, err := b.dialWire(t, "open"); proto.CodeOf(err) != proto.CodeStorageFull {
		t.Errorf("got %v", err)
	}
	b.audit.set(nil)
	log := &wireLog{h: b.Host, begun: map[string]auditchain.Entry{}}
	b.audit.set(proto.Errorf(proto.CodeStorageFull, "full"))
	if err := log.Event(&posternv1.WireEvent{StatementId: "x", State: posternv1.WireEvent_STATE_ENDED}); proto.CodeOf(err) != proto.CodeStorageFull {
		t.Errorf("got %v", err)
	}
	if err := log.Intend([]*posternv1.WireEvent{{StatementId: "x"}, {StatementId: "y"}}); proto.CodeOf(err) != proto.CodeStorageFull {
		t.Errorf("got %v", err)
	}
}
