package main

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/controlplane/hub"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// maxPendingEvents bounds the queue of link events. When it is full, further ones
// are dropped: they are history for people, and the log has them too.
const maxPendingEvents = 20_000

// linkEvents writes links that come and go to the store, one after the other and
// away from the tunnels' own goroutines.
type linkEvents struct {
	store eventStore
	log   *slog.Logger
	queue chan linkEvent
	done  sync.WaitGroup
	stop  context.CancelFunc
}

type eventStore interface {
	AppendLinkEvent(ctx context.Context, organization, agent string, e *posternv1.LinkEvent) error
}

type linkEvent struct {
	id    hub.Identity
	event *posternv1.LinkEvent
}

func newLinkEvents(store eventStore, log *slog.Logger) *linkEvents {
	ctx, stop := context.WithCancel(context.Background())
	e := &linkEvents{store: store, log: log, queue: make(chan linkEvent, maxPendingEvents), stop: stop}
	e.done.Go(func() { e.run(ctx) })
	return e
}

func (e *linkEvents) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case l := <-e.queue:
			if err := e.store.AppendLinkEvent(ctx, l.id.Organization, l.id.Agent, l.event); err != nil && ctx.Err() == nil {
				e.log.Warn("link event not written", "agent", l.id.Agent, "err", err)
			}
		}
	}
}

// LinkUp implements hub.Events.
func (e *linkEvents) LinkUp(id hub.Identity, remote string) { e.add(id, "up", "from "+remote) }

// LinkDown implements hub.Events.
func (e *linkEvents) LinkDown(id hub.Identity, cause error) {
	text := "closed"
	if cause != nil {
		text = cause.Error()
	}
	e.add(id, "down", text)
}

func (e *linkEvents) add(id hub.Identity, state, cause string) {
	select {
	case e.queue <- linkEvent{id, &posternv1.LinkEvent{Time: timestamppb.New(time.Now()), State: state, Cause: cause}}:
	default:
	}
}

// close drops what is still waiting.
func (e *linkEvents) close() {
	e.stop()
	e.done.Wait()
}
