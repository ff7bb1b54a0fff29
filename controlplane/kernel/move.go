package kernel

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	"github.com/postern-dev/postern/proto/kernelmove"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// MoveAgent is what an agent does for moves, see MoveHostService.
type MoveAgent interface {
	DescribeMove(context.Context, *posternv1.MoveRequest) (*posternv1.KernelNeeds, error)
	OfferMove(context.Context, *posternv1.OfferMoveRequest) (*posternv1.MoveParty, error)
	BeginMove(context.Context, *posternv1.BeginMoveRequest) (*posternv1.BeginMoveResponse, error)
	FinishMove(context.Context, *posternv1.FinishMoveRequest) (*posternv1.FinishMoveResponse, error)
	EndMove(context.Context, *posternv1.EndMoveRequest) (*posternv1.EndMoveResponse, error)
}

const (
	// silentTime is how long a kernel on its way may stand still before the move is given
	// up; storing it on the other host counts.
	silentTime = 2 * time.Minute
	// backTime is how long a host that was lost in the midst of a move is waited for.
	backTime = 45 * time.Second
	// tellEvery is how often a move's progress is told; proxies end what is silent for a
	// minute.
	tellEvery = 500 * time.Millisecond
	// carryBuffer is what of a kernel is in hand at once, in bytes.
	carryBuffer = 128 << 10
)

// errHeld is what an agent says of a kernel that a move holds.
var errHeld = proto.Errorf(proto.CodeUnavailable, "the kernel is being moved")

// moving are the moves under way in this process.
type moving struct {
	mu  sync.Mutex
	ids map[string]struct{}
}

func (m *moving) enter(id string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, busy := m.ids[id]; busy {
		return false
	}
	if m.ids == nil {
		m.ids = map[string]struct{}{}
	}
	m.ids[id] = struct{}{}
	return true
}

func (m *moving) leave(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.ids, id)
}

// Move moves a kernel to another agent, by its id or name, and tells how far it is; an
// error of tell ends it. Whatever fails, the kernel is on one of the two agents.
func (s *Service) Move(ctx context.Context, c Caller, id, to string, tell func(*posternv1.MoveKernelProgress) error) error {
	row, from, la, err := s.reach(ctx, c, id, true)
	if err != nil {
		return err
	}
	other, lb, err := s.agent(ctx, c, to)
	if err != nil {
		return err
	}
	if other.Id == from.Id {
		return proto.Errorf(proto.CodeInvalid, "kernel %s is on agent %s already", id, from.Name)
	}
	if !s.moving.enter(id) {
		return proto.Errorf(proto.CodeUnavailable, "kernel %s is being moved already", id)
	}
	defer s.moving.leave(id)
	// What an earlier move left half done is decided first.
	if k, err := ask(ctx, la, row); err != nil {
		return s.gone(ctx, row, err)
	} else if k.Move != nil {
		if here, err := s.decide(ctx, row, k, la); err != nil || !here {
			return errors.Join(err, proto.Errorf(proto.CodeUnavailable, "kernel %s was just moved: ask where it is, and try again", id))
		}
	}
	// The other host may hold it still, if it was away when it had left there.
	if k, err := ask(ctx, lb, row); err == nil && k.Move.GetSent() {
		ended, cancel := context.WithTimeout(ctx, checkpointTime)
		_, err := lb.EndMove(ended, &posternv1.EndMoveRequest{Move: &posternv1.MoveRequest{MoveId: k.Move.Id, KernelId: id, Principal: k.Owner}, Gone: true})
		cancel()
		if err != nil {
			return on(other, err)
		}
	}
	v := &voyage{
		s: s, row: row, from: from, to: other, la: la, lb: lb, tell: tell,
		move: &posternv1.MoveRequest{MoveId: proto.NewID(kernelmove.IDPrefix), KernelId: id, Principal: c.Principal},
	}
	k, err := v.run(ctx)
	aerr := s.audit(ctx, c, "kernel.move", from, id, err, func(e *auditchain.Entry) { e.Statement = "to agent " + other.Name })
	if err != nil {
		return err
	}
	if aerr != nil {
		return aerr // it is there, and can't be recorded
	}
	return tell(&posternv1.MoveKernelProgress{Stage: "done", Bytes: v.sent.Load(), Expected: v.expected, Kernel: k})
}

// ask asks an agent for a kernel, for its owner.
func ask(ctx context.Context, l Agent, row Row) (*posternv1.Kernel, error) {
	ctx, cancel := context.WithTimeout(ctx, agentTime)
	defer cancel()
	return l.GetKernel(ctx, &posternv1.KernelRequest{Id: row.ID, Principal: row.Owner})
}

// voyage is one move under way.
type voyage struct {
	s        *Service
	row      Row
	from, to *posternv1.Agent
	la, lb   Agent
	move     *posternv1.MoveRequest
	tell     func(*posternv1.MoveKernelProgress) error
	sent     atomic.Uint64
	expected uint64
}

// during does something that takes time while progress is told; the teller's error ends
// it.
func (v *voyage) during(ctx context.Context, stage string, limit time.Duration, do func(context.Context) error) error {
	if err := v.say(stage); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- do(ctx) }()
	tick := time.NewTicker(tellEvery)
	defer tick.Stop()
	var told error
	for {
		select {
		case err := <-done:
			if told != nil {
				return told
			}
			return err
		case <-tick.C:
			if told == nil {
				if told = v.say(stage); told != nil {
					cancel()
				}
			}
		}
	}
}

func (v *voyage) say(stage string) error {
	return v.tell(&posternv1.MoveKernelProgress{Stage: stage, Bytes: v.sent.Load(), Expected: max(v.expected, v.sent.Load())})
}

func (v *voyage) run(ctx context.Context) (*posternv1.Kernel, error) {
	var needs *posternv1.KernelNeeds
	var offer *posternv1.MoveParty
	err := v.during(ctx, "checking", time.Minute, func(ctx context.Context) (err error) {
		if needs, err = v.la.DescribeMove(ctx, v.move); err == nil {
			offer, err = v.lb.OfferMove(ctx, &posternv1.OfferMoveRequest{Move: v.move, Needs: needs, From: v.from.Id})
			err = on(v.to, err)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	err = v.during(ctx, "suspending", checkpointTime, func(ctx context.Context) error {
		begun, err := v.la.BeginMove(ctx, &posternv1.BeginMoveRequest{Move: v.move, To: v.to.Id, Party: offer, Running: needs.Running})
		v.expected = begun.GetBytes()
		return err
	})
	if err == nil {
		err = v.during(ctx, "sending", 24*time.Hour, v.carry)
	}
	// Nothing is half done when it is returned, if both hosts can be asked.
	forward := ctx.Err() == nil
	var moved bool
	var reason string
	settled := v.during(context.WithoutCancel(ctx), "restoring", checkpointTime, func(ctx context.Context) (serr error) {
		moved, reason, serr = v.settle(ctx, forward)
		return serr
	})
	switch {
	case moved:
		v.expected = v.sent.Load()
		k, err := ask(context.WithoutCancel(ctx), v.lb, v.row)
		return k, err
	case err != nil && settled != nil:
		return nil, proto.Errorf(proto.CodeUnavailable, "%s; whose kernel %s is, is decided when both agents can be asked: postern kernel list does that", proto.Detail(err).Message, v.row.ID)
	case err != nil:
		return nil, err
	case settled != nil:
		return nil, settled
	case ctx.Err() != nil:
		return nil, proto.Errorf(proto.CodeCancelled, "the move was given up: kernel %s goes on where it was", v.row.ID)
	}
	return nil, proto.Errorf(proto.CodeUnavailable, "agent %s could not restore kernel %s, which goes on where it was: %s", v.to.Name, v.row.ID, reason)
}

// on says that it was the other host that refused.
func on(agent *posternv1.Agent, err error) error {
	var told *proto.Error
	if errors.As(err, &told) {
		return &proto.Error{Code: told.Code, Message: "agent " + agent.Name + ": " + told.Message, Err: err}
	}
	return err
}

// carry passes the kernel's bytes from one host to the other, at the pace of the slower.
func (v *voyage) carry(ctx context.Context) error {
	opening, cancel := context.WithTimeout(ctx, agentTime)
	defer cancel()
	in, err := kernelmove.Import.Dial(opening, v.lb, v.move)
	if err != nil {
		return on(v.to, err)
	}
	defer in.Close() //nolint:errcheck // it is done with
	out, err := kernelmove.Export.Dial(opening, v.la, v.move)
	if err != nil {
		return on(v.from, err)
	}
	defer out.Close() //nolint:errcheck // it is done with
	hangUp := func() {
		_ = out.Close()
		_ = in.Close()
	}
	defer context.AfterFunc(ctx, hangUp)()
	life := time.AfterFunc(silentTime, hangUp)
	defer life.Stop()
	copied := make(chan error, 1)
	go func() {
		_, err := io.CopyBuffer(struct{ io.Writer }{&counted{in, &v.sent, life}}, struct{ io.Reader }{out}, make([]byte, carryBuffer))
		if err != nil {
			hangUp()
		}
		copied <- err
	}()
	err = kernelmove.ReadResult(in, out)
	hangUp()
	cerr := <-copied
	var told *proto.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &told):
		return on(v.to, err)
	case ctx.Err() != nil:
		return proto.Errorf(proto.CodeCancelled, "the move was given up before the kernel had arrived")
	}
	return &proto.Error{Code: proto.CodeAgentLost, Message: "the kernel did not arrive: the stream from agent " + v.from.Name + " to agent " + v.to.Name + " broke", Err: errors.Join(err, cerr)}
}

// counted counts what passes, and keeps a move alive as long as something does.
type counted struct {
	w    io.Writer
	n    *atomic.Uint64
	life *time.Timer
}

// Write implements io.Writer.
func (c *counted) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n.Add(uint64(n))
	c.life.Reset(silentTime)
	return n, err
}

// settle asks the other host whether it has the kernel, and tells the first one. A host
// that was lost is waited for.
func (v *voyage) settle(ctx context.Context, forward bool) (moved bool, reason string, err error) {
	until := time.Now().Add(backTime)
	for {
		moved, reason, err = v.s.settle(ctx, v.row, v.move, v.la, v.lb, v.to, forward)
		if err == nil || moved || time.Now().After(until) || !comesBack(err) {
			return moved, reason, err
		}
		time.Sleep(tellEvery)
		if l, cerr := v.s.cfg.Connect(v.from.Id); cerr == nil {
			v.la = l
		}
		if l, cerr := v.s.cfg.Connect(v.to.Id); cerr == nil {
			v.lb = l
		}
	}
}

// comesBack reports whether an error is of an agent that may come back.
func comesBack(err error) bool {
	switch proto.CodeOf(err) {
	case proto.CodeAgentLost, proto.CodeAgentOffline, proto.CodeUnavailable, proto.CodeTimeout:
		return true
	}
	return false
}

// settle ends a move: the other host says whether the kernel is its own, and the first one
// forgets it or lets it go on. reason is why the other host does not have it, if it says
// so. It may be repeated, by anybody.
func (s *Service) settle(ctx context.Context, row Row, move *posternv1.MoveRequest, la, lb Agent, to *posternv1.Agent, forward bool) (moved bool, reason string, err error) {
	f, err := lb.FinishMove(ctx, &posternv1.FinishMoveRequest{Move: move, Forward: forward})
	if err != nil {
		return false, "", on(to, err)
	}
	if !f.Committed {
		_, err := la.EndMove(ctx, &posternv1.EndMoveRequest{Move: move})
		return false, f.Reason, err
	}
	if err := s.cfg.Store.MoveKernel(ctx, row.Owner.Organization, row.ID, to.Id); err != nil {
		return true, "", err
	}
	row.Agent = to.Id
	s.cfg.Secrets.Moved(ctx, row)
	if _, err := la.EndMove(ctx, &posternv1.EndMoveRequest{Move: move, Gone: true}); err != nil {
		// It is held there, and forgotten when somebody sees it.
		s.cfg.Logger.Warn("a kernel that was moved is still held where it was", "kernel", row.ID, "err", err)
	}
	return true, "", nil
}

// decide ends a move that nobody looks after any more: la has the kernel k, held. here
// says whether it is (still) there. The caller has the kernel's move, see moving.
func (s *Service) decide(ctx context.Context, row Row, k *posternv1.Kernel, la Agent) (here bool, err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), checkpointTime)
	defer cancel()
	move := &posternv1.MoveRequest{MoveId: k.Move.Id, KernelId: k.Id, Principal: k.Owner}
	if !k.Move.Sent { // no other host can have it
		_, err := la.EndMove(ctx, &posternv1.EndMoveRequest{Move: move, Unsent: true})
		return true, err
	}
	to, err := s.cfg.Store.FindAgent(ctx, k.Owner.GetOrganization(), k.Move.To)
	if proto.CodeOf(err) == proto.CodeNotFound || err == nil && to.Revoked != nil {
		// It can't come back, and nobody reaches a kernel there.
		_, err := la.EndMove(ctx, &posternv1.EndMoveRequest{Move: move})
		return true, err
	}
	if err != nil {
		return true, err
	}
	lb, err := s.cfg.Connect(to.Id)
	if err != nil {
		return true, proto.Errorf(proto.CodeAgentOffline, "kernel %s was being moved to agent %s, which is offline: whose it is can only be said when that is back (or was revoked)", k.Id, to.Name)
	}
	moved, reason, err := s.settle(ctx, row, move, la, lb, to, true)
	if reason != "" {
		s.cfg.Logger.Warn("a kernel's move failed: it goes on where it was", "kernel", k.Id, "reason", reason)
	}
	return !moved, err
}

// unheld decides the move that holds a kernel, if one does that nobody looks after. It
// reports whether what was refused should be tried again.
func (s *Service) unheld(ctx context.Context, row Row, l Agent, refused error) bool {
	if proto.CodeOf(refused) != proto.CodeUnavailable || !s.moving.enter(row.ID) {
		return false
	}
	defer s.moving.leave(row.ID)
	k, err := ask(ctx, l, row)
	if err != nil || k.Move == nil {
		return false
	}
	if _, err := s.decide(ctx, row, k, l); err != nil {
		s.cfg.Logger.Warn("a kernel's move is not decided", "kernel", row.ID, "err", err)
		return false
	}
	return true
}

// listed decides the move that holds a kernel which agent lists; here: it is still there.
func (s *Service) listed(ctx context.Context, agent *posternv1.Agent, l Agent, k *posternv1.Kernel) (here bool) {
	row, err := s.cfg.Store.Kernel(ctx, k.Owner.GetOrganization(), k.Id)
	elsewhere := err == nil && row.Agent != agent.Id
	if elsewhere && k.Move.To == "" {
		return false // it comes here, and is where it was until it has arrived
	}
	if !s.moving.enter(k.Id) {
		return !elsewhere // it is on its way, or was, and this host is being told that
	}
	defer s.moving.leave(k.Id)
	// What a host lists may be of a moment ago: what is decided by it must not be.
	now, aerr := ask(ctx, l, Row{ID: k.Id, Owner: k.Owner})
	switch {
	case proto.CodeOf(aerr) == proto.CodeNotFound:
		return false
	case aerr != nil || now.Move == nil:
		return !elsewhere
	}
	k = now
	switch {
	case elsewhere && k.Move.Sent: // it arrived, and this host was not told
		_, err := l.EndMove(ctx, &posternv1.EndMoveRequest{Move: &posternv1.MoveRequest{MoveId: k.Move.Id, KernelId: k.Id, Principal: k.Owner}, Gone: true})
		if err != nil {
			s.cfg.Logger.Warn("a kernel that was moved is still held where it was", "kernel", k.Id, "err", err)
		}
		return false
	case proto.CodeOf(err) == proto.CodeNotFound:
		row = Row{ID: k.Id, Agent: agent.Id, Owner: k.Owner}
	case err != nil:
		return true
	}
	if here, err = s.decide(ctx, row, k, l); err != nil {
		s.cfg.Logger.Warn("a kernel's move is not decided", "kernel", k.Id, "err", err)
	}
	return here
}
