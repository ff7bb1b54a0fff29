package checkpoint

import (
	"context"
	"log/slog"
	"testing"

	"github.com/postern-dev/postern/proto"
)

// heldKernel is one suspended kernel that a move holds; what is not here is not called.
type heldKernel struct {
	Kernels
	Moves
	Identity
	held    *HeldMove
	let     bool
	stopped bool
}

func (h *heldKernel) Look(context.Context, string) (Kernel, error) {
	return Kernel{ID: "k", Organization: "org", Suspended: true, Held: h.held != nil}, nil
}

func (h *heldKernel) moves(context.Context, string) (*HeldMove, string, error) {
	return h.held, "", nil
}

func (h *heldKernel) Let(context.Context, string, string, bool) error {
	h.let = true
	return nil
}

func (h *heldKernel) Stop(context.Context, string) error {
	h.stopped = true
	return nil
}

// movesOf is a heldKernel's side of moves: the embedded interface has its method's name.
type movesOf struct{ *heldKernel }

func (m movesOf) Moves(ctx context.Context, id string) (*HeldMove, string, error) {
	return m.moves(ctx, id)
}

func (m movesOf) Held(context.Context) map[string]HeldMove { return nil }

// TestEndMoveOfWhatWasSent: a host lets a kernel go on, or forgets it, only as what it knows
// itself allows, whatever the caller believes.
func TestEndMoveOfWhatWasSent(t *testing.T) {
	for name, test := range map[string]struct {
		sent, gone, unsent bool
		code               proto.Code
		let, stopped       bool
	}{
		"not sent":                              {unsent: true, let: true},
		"not sent, the other was asked":         {let: true},
		"sent, and nobody was asked":            {sent: true, unsent: true, code: proto.CodeUnavailable},
		"sent, and the other has it not":        {sent: true, let: true},
		"sent, and the other has it":            {sent: true, gone: true, stopped: true},
		"not sent, and the other is said to":    {gone: true, code: proto.CodeInvalid},
		"sent, gone, and nobody was asked, too": {sent: true, gone: true, unsent: true, code: proto.CodeUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			h := &heldKernel{held: &HeldMove{ID: "mov_1", To: "agt_b", Sent: test.sent}}
			e, err := Open(Config{State: t.TempDir(), Memory: t.TempDir(), Kernels: h, Moves: movesOf{h}, Identity: h, Driver: NewDriver(""), Logger: slog.New(slog.DiscardHandler)})
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := e.Close(); err != nil {
					t.Error(err)
				}
			}()
			err = e.EndMove(t.Context(), "org", "k", "mov_1", test.gone, test.unsent)
			if proto.CodeOf(err) != test.code && (err != nil || test.code != 0) || h.let != test.let || h.stopped != test.stopped {
				t.Errorf("got %v, let go %v, forgotten %v", err, h.let, h.stopped)
			}
		})
	}
}
