package remote_test

import (
	"context"
	"errors"
	"io"
	"sync/atomic"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/attach/remote"
	"github.com/postern-dev/postern/agentd/attach/remote/simulatedremote"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// faulty counts the calls of a Remote and lets some of them fail.
type faulty struct {
	remote.Remote
	calls atomic.Int64
	fail  func(call int64) error // nil: none
	cut   int                    // chunks that each fetch gives before it breaks off; 0: all
}

func (f *faulty) try() error {
	n := f.calls.Add(1)
	if f.fail == nil {
		return nil
	}
	return f.fail(n)
}

func (f *faulty) ListNodes(ctx context.Context, req *posternv1.ListNodesRequest) (*posternv1.ListNodesResponse, error) {
	if err := f.try(); err != nil {
		return nil, err
	}
	return f.Remote.ListNodes(ctx, req)
}

func (f *faulty) FetchChunks(_ context.Context, _ string, hashes [][]byte, each func(i int, content []byte) error) error {
	f.calls.Add(1)
	for i, h := range hashes {
		if f.cut > 0 && i == f.cut {
			return io.ErrUnexpectedEOF
		}
		if err := each(i, h); err != nil {
			return err
		}
	}
	return nil
}

func TestPatience(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	root := &posternv1.ListNodesRequest{Directories: []uint64{1}}
	for name, lost := range map[string]error{
		"cut":         simulatedremote.ErrCut,
		"broken off":  io.ErrUnexpectedEOF,
		"unavailable": proto.Errorf(proto.CodeUnavailable, "it starts"),
		"link lost":   proto.Errorf(proto.CodeAgentLost, "the link to the control plane broke"),
		"no link":     proto.ConnectError(proto.Errorf(proto.CodeAgentOffline, "the link to the control plane is down")),
	} {
		t.Run(name, func(t *testing.T) {
			f := &faulty{Remote: simulatedremote.New(), fail: func(call int64) error {
				if call < 4 {
					return lost
				}
				return nil
			}}
			if _, err := remote.NewPatient(f, time.Minute).ListNodes(ctx, root); err != nil || f.calls.Load() != 4 {
				t.Errorf("%v after %d calls", err, f.calls.Load())
			}
		})
	}
	t.Run("answers are not asked for again", func(t *testing.T) {
		f := &faulty{Remote: simulatedremote.New(), fail: func(int64) error { return proto.Errorf(proto.CodeNotFound, "no such workspace") }}
		if _, err := remote.NewPatient(f, time.Minute).ListNodes(ctx, root); proto.CodeOf(err) != proto.CodeNotFound || f.calls.Load() != 1 {
			t.Errorf("%v after %d calls", err, f.calls.Load())
		}
	})
	t.Run("a link that stays down is waited for once", func(t *testing.T) {
		f := &faulty{Remote: simulatedremote.New(), fail: func(int64) error { return simulatedremote.ErrCut }}
		p := remote.NewPatient(f, 100*time.Millisecond)
		if _, err := p.ListNodes(ctx, root); !errors.Is(err, simulatedremote.ErrCut) || f.calls.Load() < 2 {
			t.Errorf("%v after %d calls", err, f.calls.Load())
		}
		before := f.calls.Load()
		if _, err := p.ListNodes(ctx, root); !errors.Is(err, simulatedremote.ErrCut) || f.calls.Load() != before+1 {
			t.Errorf("then %v after %d calls", err, f.calls.Load()-before)
		}
	})
	t.Run("the end of the context", func(t *testing.T) {
		f := &faulty{Remote: simulatedremote.New(), fail: func(int64) error { return simulatedremote.ErrCut }}
		short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
		defer cancel()
		if _, err := remote.NewPatient(f, time.Hour).ListNodes(short, root); err == nil {
			t.Error("no error")
		}
	})
}

// TestPatientFetch: a fetch that is broken off goes on where it was.
func TestPatientFetch(t *testing.T) {
	var hashes [][]byte
	for i := range 7 {
		hashes = append(hashes, []byte{byte(i)})
	}
	f := &faulty{cut: 3}
	var got []int
	err := remote.NewPatient(f, time.Minute).FetchChunks(t.Context(), "w", hashes, func(i int, content []byte) error {
		if int(content[0]) != i {
			t.Errorf("chunk %d is %d", i, content[0])
		}
		got = append(got, i)
		return nil
	})
	if err != nil || len(got) != 7 || f.calls.Load() != 3 {
		t.Errorf("%v: %v in %d calls", err, got, f.calls.Load())
	}
	stop := errors.New("stop")
	f = &faulty{}
	if err := remote.NewPatient(f, time.Minute).FetchChunks(t.Context(), "w", hashes, func(int, []byte) error { return stop }); !errors.Is(err, stop) || f.calls.Load() != 1 {
		t.Errorf("%v in %d calls, want the caller's error", err, f.calls.Load())
	}
}
