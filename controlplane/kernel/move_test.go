package kernel

import (
	"context"
	"log/slog"
	"testing"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// simulatedAgent is an agent that answers to moves; what is not set is not to be called.
type simulatedAgent struct {
	Agent
	finish func(*posternv1.FinishMoveRequest) (*posternv1.FinishMoveResponse, error)
	kernel *posternv1.Kernel
	ended  []bool // gone, of each EndMove
}

func (a *simulatedAgent) FinishMove(_ context.Context, r *posternv1.FinishMoveRequest) (*posternv1.FinishMoveResponse, error) {
	return a.finish(r)
}

func (a *simulatedAgent) EndMove(_ context.Context, r *posternv1.EndMoveRequest) (*posternv1.EndMoveResponse, error) {
	a.ended = append(a.ended, r.Gone)
	return &posternv1.EndMoveResponse{}, nil
}

func (a *simulatedAgent) DescribeMove(context.Context, *posternv1.MoveRequest) (*posternv1.KernelNeeds, error) {
	return nil, proto.Errorf(proto.CodeInvalid, "a test goes no further")
}

func (a *simulatedAgent) GetKernel(context.Context, *posternv1.KernelRequest) (*posternv1.Kernel, error) {
	return a.kernel, nil
}

// simulatedStore remembers one kernel.
type simulatedStore struct {
	Store
	row     Row
	revoked bool
}

func (s *simulatedStore) Kernel(context.Context, string, string) (Row, error) { return s.row, nil }

func (s *simulatedStore) MoveKernel(_ context.Context, _, _, agent string) error {
	s.row.Agent = agent
	return nil
}

func (s *simulatedStore) FindAgent(_ context.Context, _, id string) (*posternv1.Agent, error) {
	a := &posternv1.Agent{Id: id, Name: "name of " + id}
	if s.revoked {
		a.Revoked = timestamppb.Now()
	}
	return a, nil
}

// simulatedSecrets counts who got them.
type simulatedSecrets struct {
	Secrets
	moved []string
}

func (s *simulatedSecrets) Moved(_ context.Context, r Row) { s.moved = append(s.moved, r.Agent) }

// TestAHeldKernelIsDecided: what becomes of a kernel that a move holds when nobody looks
// after the move any more.
func TestAHeldKernelIsDecided(t *testing.T) {
	for _, test := range []struct {
		name             string
		sent             bool
		stale            bool // its list is of before it was sent
		offline, revoked bool
		elsewhere        bool // it is known to be on the other agent
		committed        bool
		here             bool   // it is still on its first agent
		ended            []bool // gone
		agent            string // that has it at the end
	}{
		{name: "not sent", here: true, ended: []bool{false}, agent: "agt_a"},
		{name: "sent, and it has it", sent: true, committed: true, ended: []bool{true}, agent: "agt_b"},
		{name: "sent since it was listed", sent: true, stale: true, committed: true, ended: []bool{true}, agent: "agt_b"},
		{name: "sent, and it has it not", sent: true, here: true, ended: []bool{false}, agent: "agt_a"},
		{name: "sent, and it is away", sent: true, offline: true, here: true, agent: "agt_a"},
		{name: "sent, and it was revoked", sent: true, offline: true, revoked: true, here: true, ended: []bool{false}, agent: "agt_a"},
		{name: "moved long ago", sent: true, offline: true, elsewhere: true, ended: []bool{true}, agent: "agt_b"},
	} {
		t.Run(test.name, func(t *testing.T) {
			owner := &posternv1.Principal{Organization: "org", TokenId: "tok"}
			k := &posternv1.Kernel{Id: "k", Owner: owner, Move: &posternv1.KernelMove{Id: "mov_1", To: "agt_b", Sent: test.sent}}
			a := &simulatedAgent{kernel: k}
			b := &simulatedAgent{finish: func(r *posternv1.FinishMoveRequest) (*posternv1.FinishMoveResponse, error) {
				if !r.Forward || r.Move.MoveId != "mov_1" || r.Move.KernelId != "k" || r.Move.Principal != owner {
					t.Errorf("asked %v", r)
				}
				return &posternv1.FinishMoveResponse{Committed: test.committed}, nil
			}}
			store, secrets := &simulatedStore{row: Row{ID: "k", Agent: "agt_a", Owner: owner}, revoked: test.revoked}, &simulatedSecrets{}
			if test.elsewhere {
				store.row.Agent = "agt_b"
			}
			s := New(Config{
				Logger: slog.New(slog.DiscardHandler), Store: store, Secrets: secrets, Append: func(context.Context, auditchain.Entry) error { return nil },
				Connect: func(id string) (Agent, error) {
					if id != "agt_b" || test.offline {
						return nil, proto.Errorf(proto.CodeAgentOffline, "it is away")
					}
					return b, nil
				},
			})
			list := &posternv1.Kernel{Id: "k", Owner: owner, Move: &posternv1.KernelMove{Id: "mov_1", To: "agt_b", Sent: test.sent && !test.stale}}
			here := s.listed(t.Context(), &posternv1.Agent{Id: "agt_a", Name: "a"}, a, list)
			if here != test.here || store.row.Agent != test.agent || len(a.ended) != len(test.ended) || len(test.ended) > 0 && a.ended[0] != test.ended[0] {
				t.Errorf("here %v, on %s, ended %v", here, store.row.Agent, a.ended)
			}
			if test.committed && (len(secrets.moved) != 1 || secrets.moved[0] != "agt_b") {
				t.Errorf("secrets for %v", secrets.moved)
			}
			if !s.moving.enter("k") {
				t.Error("the kernel's move is not over")
			}
			// While a move is under way nobody else decides.
			a.ended = nil
			if here := s.listed(t.Context(), &posternv1.Agent{Id: "agt_a", Name: "a"}, a, k); here != (store.row.Agent == "agt_a") || len(a.ended) > 0 {
				t.Errorf("under way: here %v, ended %v", here, a.ended)
			}
			if s.unheld(t.Context(), store.row, a, errHeld) || len(a.ended) > 0 {
				t.Error("somebody decided a move that is under way")
			}
		})
	}
}

// TestAMoveBack: a host that still holds a kernel which has left it, since it was not told,
// forgets it before the kernel comes back. What it has otherwise is let be.
func TestAMoveBack(t *testing.T) {
	owner := &posternv1.Principal{Organization: "org", TokenId: "tok"}
	for name, test := range map[string]struct {
		move *posternv1.KernelMove
		want int
	}{
		"held and sent": {&posternv1.KernelMove{Id: "mov_1", To: "agt_a", Sent: true}, 1},
		"held":          {&posternv1.KernelMove{Id: "mov_1", To: "agt_a"}, 0},
		"not held":      {nil, 0},
	} {
		t.Run(name, func(t *testing.T) {
			a := &simulatedAgent{kernel: &posternv1.Kernel{Id: "k", Owner: owner}}
			b := &simulatedAgent{kernel: &posternv1.Kernel{Id: "k", Owner: owner, Move: test.move}}
			s := New(Config{
				Logger: slog.New(slog.DiscardHandler), Store: &simulatedStore{row: Row{ID: "k", Agent: "agt_a", Owner: owner}},
				Append:   func(context.Context, auditchain.Entry) error { return nil },
				Operator: func(string) bool { return false },
				Connect:  func(id string) (Agent, error) { return map[string]Agent{"agt_a": a, "agt_b": b}[id], nil },
			})
			err := s.Move(t.Context(), Caller{Principal: owner}, "k", "agt_b", func(*posternv1.MoveKernelProgress) error { return nil })
			if proto.CodeOf(err) != proto.CodeInvalid || len(b.ended) != test.want || len(b.ended) > 0 && !b.ended[0] || len(a.ended) != 0 {
				t.Errorf("got %v; the other host's moves ended %v, the first one's %v", err, b.ended, a.ended)
			}
		})
	}
}
