package remote

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// DefaultPatience is how long after a link was lost readers wait for it.
const DefaultPatience = 10 * time.Second

const (
	// firstPause is how long after a failure a call is made again; each further one waits
	// longer, up to longestPause.
	firstPause, longestPause = 20 * time.Millisecond, 500 * time.Millisecond
)

// Patient is a Remote over which reads outlive a short loss of the link: a restart of the
// control plane or of agentd, or a tunnel that changes over. ListNodes, GetNodes, GetContent and FetchChunks
// are made again until the link has been down for the patience; after that, and until
// something succeeds, they fail at once, so that a host without a link does not wait for
// each name that it does not have. Other calls are made once: who makes them tries again.
type Patient struct {
	Remote
	patience time.Duration

	mu   sync.Mutex
	down time.Time // zero: up
}

var _ Remote = (*Patient)(nil)

// NewPatient returns a Patient over r; patience 0 means DefaultPatience.
func NewPatient(r Remote, patience time.Duration) *Patient {
	if patience == 0 {
		patience = DefaultPatience
	}
	return &Patient{Remote: r, patience: patience}
}

// passing tells whether an error may be the link's, or of a control plane that is not there yet,
// and not an answer.
func passing(ctx context.Context, err error) bool {
	if err == nil || ctx.Err() != nil {
		return false
	}
	var answer *proto.Error
	if !errors.As(proto.FromConnect(err), &answer) {
		return true
	}
	switch answer.Code {
	case proto.CodeUnavailable, proto.CodeAgentOffline, proto.CodeAgentLost:
		return true
	default:
		return false
	}
}

// saw notes how a call ended, and tells whether it is worth making again.
func (p *Patient) saw(ctx context.Context, err error) bool {
	lost := passing(ctx, err)
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case lost && p.down.IsZero():
		p.down = time.Now()
	case !lost && ctx.Err() == nil:
		p.down = time.Time{}
	}
	return lost && time.Since(p.down) < p.patience
}

// patiently calls f until it succeeds, is answered, or the patience or ctx ends.
func (p *Patient) patiently(ctx context.Context, f func() error) error {
	for pause := firstPause; ; pause = min(2*pause, longestPause) {
		err := f()
		if !p.saw(ctx, err) {
			return err
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return err
		}
	}
}

// ListNodes implements Remote.
func (p *Patient) ListNodes(ctx context.Context, req *posternv1.ListNodesRequest) (resp *posternv1.ListNodesResponse, err error) {
	err = p.patiently(ctx, func() error { resp, err = p.Remote.ListNodes(ctx, req); return err })
	return resp, err
}

// GetNodes implements Remote.
func (p *Patient) GetNodes(ctx context.Context, req *posternv1.GetNodesRequest) (resp *posternv1.GetNodesResponse, err error) {
	err = p.patiently(ctx, func() error { resp, err = p.Remote.GetNodes(ctx, req); return err })
	return resp, err
}

// GetContent implements Remote.
func (p *Patient) GetContent(ctx context.Context, req *posternv1.GetContentRequest) (resp *posternv1.GetContentResponse, err error) {
	err = p.patiently(ctx, func() error { resp, err = p.Remote.GetContent(ctx, req); return err })
	return resp, err
}

// FetchChunks implements Remote. What has come is not asked for again.
func (p *Patient) FetchChunks(ctx context.Context, workspaceID string, hashes [][]byte, each func(i int, content []byte) error) error {
	got := 0
	var refused error // by each: no fault of the link's
	err := p.patiently(ctx, func() error {
		from := got
		err := p.Remote.FetchChunks(ctx, workspaceID, hashes[from:], func(i int, content []byte) error {
			if refused = each(from+i, content); refused == nil {
				got = from + i + 1
			}
			return refused
		})
		if refused != nil {
			return nil
		}
		return err
	})
	return errors.Join(refused, err)
}

// WatchChanges implements Remote. It is made once, and tells how the link is.
func (p *Patient) WatchChanges(ctx context.Context, req *posternv1.WatchChangesRequest, each func(*posternv1.WatchChangesResponse) error) error {
	var refused error
	err := p.Remote.WatchChanges(ctx, req, func(resp *posternv1.WatchChangesResponse) error {
		p.saw(ctx, nil)
		refused = each(resp)
		return refused
	})
	if refused == nil {
		p.saw(ctx, err)
	}
	return err
}
