package report

import (
	"container/list"
	"sync"

	gproto "google.golang.org/protobuf/proto"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// detailBytes bounds what is kept of statements that are not told yet, and detailMost
	// their number. The oldest go first.
	detailBytes = 32 << 20
	detailMost  = 10_000
)

// details is what the log has not of statements. Safe for concurrent use.
type details struct {
	mu    sync.Mutex
	all   map[string]*detail
	order *list.List // of those that have ended, oldest first: ids
	bytes int
}

type detail struct {
	ended bool
	err   *posternv1.ErrorDetail
	kept  *posternv1.KeptRows
	size  int
	at    *list.Element
}

func newDetails() *details { return &details{all: map[string]*detail{}, order: list.New()} }

// begin notes a statement whose details will come.
func (d *details) begin(id string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.all[id] = &detail{}
}

// end keeps the details of one that began; nil: there are none.
func (d *details) end(id string, err *posternv1.ErrorDetail, kept *posternv1.KeptRows) {
	d.mu.Lock()
	defer d.mu.Unlock()
	one := d.all[id]
	if one == nil || one.ended {
		return
	}
	if err == nil && kept == nil {
		delete(d.all, id)
		return
	}
	one.ended, one.err, one.kept = true, err, kept
	one.size, one.at = gproto.Size(err)+gproto.Size(kept), d.order.PushBack(id)
	d.bytes += one.size
	for d.bytes > detailBytes || d.order.Len() > detailMost {
		d.forgetLocked(d.order.Front().Value.(string))
	}
}

// of returns what is kept of a statement; wait: it has not ended yet.
func (d *details) of(id string) (err *posternv1.ErrorDetail, kept *posternv1.KeptRows, wait bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	one := d.all[id]
	if one == nil {
		return nil, nil, false
	}
	return one.err, one.kept, !one.ended
}

// forget drops what was told.
func (d *details) forget(id string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.forgetLocked(id)
}

func (d *details) forgetLocked(id string) {
	one := d.all[id]
	if one == nil || !one.ended {
		return
	}
	d.bytes -= one.size
	d.order.Remove(one.at)
	delete(d.all, id)
}
