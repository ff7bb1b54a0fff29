package mountd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"github.com/postern-dev/postern/agentd/attach/packet"
	"github.com/postern-dev/postern/proto"
)

const (
	opAttach   = "attach"   // holder -> holder
	opTree     = "tree"     // holder -> [tree]
	opSettle   = "settle"   // holder, patience
	opDetach   = "detach"   // holder
	opStatus   = "status"   // -> status
	opDetails  = "details"  // holder's workspace, from -> details
	opShutdown = "shutdown" // ends the process if it has nothing to do
)

type question struct {
	Op       string        `json:"op"`
	Holder   Holder        `json:"holder,omitzero"`
	Patience time.Duration `json:"patience,omitempty"`
	From     int           `json:"from,omitempty"`
}

type answer struct {
	Holder  Holder     `json:"holder,omitzero"`
	Status  *Status    `json:"status,omitempty"`
	Details *Details   `json:"details,omitempty"`
	Code    proto.Code `json:"code,omitempty"`
	Error   string     `json:"error,omitempty"`
}

// maxPeers bounds the conversations at once.
const maxPeers = 64

// accept answers at the socket until ctx ends.
func (d *Daemon) accept(ctx context.Context, l *net.UnixListener, idle func()) {
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	room := make(chan struct{}, maxPeers)
	for {
		room <- struct{}{}
		conn, err := l.AcceptUnix()
		if err != nil {
			return
		}
		d.wg.Go(func() {
			defer func() { <-room }()
			d.talk(ctx, conn, idle)
		})
	}
}

func (d *Daemon) talk(ctx context.Context, conn *net.UnixConn, idle func()) {
	defer conn.Close() //nolint:errcheck // it was only answered
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	if _, err := packet.Peer(conn); err != nil {
		d.cfg.Logger.Warn("stranger turned away from mountd", "err", err)
		return
	}
	for {
		var q question
		files, err := packet.Receive(conn, &q)
		if err != nil {
			return
		}
		packet.CloseAll(files)
		a, give := d.answer(ctx, q, idle)
		err = packet.Send(conn, a, give...)
		packet.CloseAll(give)
		if err != nil {
			return
		}
	}
}

func (d *Daemon) answer(ctx context.Context, q question, idle func()) (answer, []*os.File) {
	h := q.Holder
	var err error
	switch q.Op {
	case opAttach:
		if h, err = d.attach(ctx, h); err == nil {
			return answer{Holder: h}, nil
		}
	case opTree:
		_, s, found := d.find(h.Workspace, h.Name)
		if s == nil {
			err = proto.Errorf(proto.CodeNotFound, "%.200s holds no mount of %.80q", h.Name, h.Workspace)
			break
		}
		var tree *os.File
		// A kernel's sandbox makes its own copy read-only; the source is for all kernels.
		if tree, err = d.tree(s.name, found.ReadOnly && strings.HasPrefix(h.Name, hostHolder)); err == nil {
			return answer{Holder: found}, []*os.File{tree}
		}
	case opSettle:
		if q.Patience <= 0 || q.Patience > time.Minute {
			q.Patience = drainTime
		}
		_, err = d.settle(ctx, h.Workspace, h.Name, q.Patience)
	case opDetach:
		err = d.detach(h.Workspace, h.Name)
	case opStatus:
		s := d.status()
		return answer{Status: &s}, nil
	case opDetails:
		var found *Details
		if found, err = d.details(h.Workspace, q.From); err == nil {
			return answer{Details: found}, nil
		}
	case opShutdown:
		d.mu.Lock()
		busy := len(d.open)
		d.mu.Unlock()
		if busy > 0 {
			err = proto.Errorf(proto.CodeUnavailable, "%d workspaces are open", busy)
			break
		}
		idle()
	default:
		err = proto.Errorf(proto.CodeInvalid, "no such question: %.32q", q.Op)
	}
	if err == nil {
		return answer{}, nil
	}
	a := answer{Code: proto.CodeInternal, Error: err.Error()}
	var coded *proto.Error
	if errors.As(err, &coded) {
		a.Code, a.Error = coded.Code, coded.Message
	}
	return a, nil
}

// Client asks mountd. Each call is a conversation of its own.
type Client struct{ Dir string }

// startTime is how long a mount waits for a mountd that is being started.
const startTime = 10 * time.Second

// dial connects; to mount something it waits for mountd to come up.
func (c Client) dial(ctx context.Context, op string) (*packet.Conn, error) {
	for until := time.Now().Add(startTime); ; {
		conn, err := packet.Dial(c.Dir, SocketName)
		if err == nil || op != opAttach || time.Now().After(until) {
			return conn, err
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (c Client) ask(ctx context.Context, q question) (answer, []*os.File, error) {
	conn, err := c.dial(ctx, q.Op)
	if err != nil {
		return answer{}, nil, proto.Errorf(proto.CodeUnavailable, "mountd does not answer: it is started by agentd when attachments: is in agentd.yaml (%v)", err)
	}
	defer conn.Close() //nolint:errcheck // it has answered
	until, ok := ctx.Deadline()
	if !ok {
		until = time.Now().Add(2 * openTime)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	var a answer
	files, err := conn.Call(until, q, &a)
	switch {
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	case err != nil:
		err = proto.Errorf(proto.CodeUnavailable, "mountd went away: try again (%w)", err)
	case a.Error != "":
		err = &proto.Error{Code: a.Code, Message: a.Error}
	}
	if err != nil {
		packet.CloseAll(files)
		return a, nil, err
	}
	return a, files, nil
}

// Attach makes h a holder and tells what it got.
func (c Client) Attach(ctx context.Context, h Holder) (Holder, error) {
	a, files, err := c.ask(ctx, question{Op: opAttach, Holder: h})
	packet.CloseAll(files)
	return a.Holder, err
}

// Tree gets a detached mount for a holder, to be moved with move_mount(2).
func (c Client) Tree(ctx context.Context, workspace, holder string) (*os.File, error) {
	_, files, err := c.ask(ctx, question{Op: opTree, Holder: Holder{Workspace: workspace, Name: holder}})
	if err != nil {
		return nil, err
	}
	if len(files) != 1 {
		packet.CloseAll(files)
		return nil, fmt.Errorf("mountd gave %d descriptors, not 1", len(files))
	}
	return files[0], nil
}

// Settle waits until what a holder's workspace has written is at the control plane; an
// UNAVAILABLE error says what is not.
func (c Client) Settle(ctx context.Context, workspace, holder string, patience time.Duration) error {
	_, files, err := c.ask(ctx, question{Op: opSettle, Holder: Holder{Workspace: workspace, Name: holder}, Patience: patience})
	packet.CloseAll(files)
	return err
}

// Detach ends what a holder has, of one workspace or of any ("").
func (c Client) Detach(ctx context.Context, workspace, holder string) error {
	_, files, err := c.ask(ctx, question{Op: opDetach, Holder: Holder{Workspace: workspace, Name: holder}})
	packet.CloseAll(files)
	return err
}

// Status asks how things are.
func (c Client) Status(ctx context.Context) (Status, error) {
	a, files, err := c.ask(ctx, question{Op: opStatus})
	packet.CloseAll(files)
	if err != nil {
		return Status{}, err
	}
	if a.Status == nil {
		return Status{}, errors.New("mountd said nothing of itself")
	}
	return *a.Status, nil
}

// Details lists what is not sent of a workspace that is open, and what was kept under another name.
// It asks as often as one message has not got room for all, and 32 times at most.
func (c Client) Details(ctx context.Context, workspace string) (Details, error) {
	var all Details
	for range 32 {
		a, files, err := c.ask(ctx, question{Op: opDetails, Holder: Holder{Workspace: workspace}, From: all.Next})
		packet.CloseAll(files)
		if err != nil {
			return all, err
		}
		if a.Details == nil {
			return all, errors.New("mountd said nothing of the workspace")
		}
		all.Unsent = append(all.Unsent, a.Details.Unsent...)
		all.Conflicts = append(all.Conflicts, a.Details.Conflicts...)
		if all.Next = a.Details.Next; all.Next == 0 {
			break
		}
	}
	return all, nil
}

// Shutdown ends mountd, and its keeper, if no workspace is open.
func (c Client) Shutdown(ctx context.Context) error {
	_, files, err := c.ask(ctx, question{Op: opShutdown})
	packet.CloseAll(files)
	if errors.Is(err, io.EOF) {
		return nil // it ended before it could say so
	}
	return err
}
