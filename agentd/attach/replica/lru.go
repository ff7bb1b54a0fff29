package replica

import "container/list"

// lru remembers which contents lie on disk, the one used last in front, and what they
// take. The replica's lock is held for all of it.
type lru struct {
	order list.List // of *cached
	at    map[uint64]*list.Element
	bytes int64
}

type cached struct {
	id    uint64
	bytes int64
}

// add says what a content takes.
func (l *lru) add(id uint64, bytes int64) {
	if l.at == nil {
		l.at = map[uint64]*list.Element{}
	}
	if e := l.at[id]; e != nil {
		c := e.Value.(*cached)
		l.bytes += bytes - c.bytes
		c.bytes = bytes
		l.order.MoveToFront(e)
		return
	}
	l.at[id] = l.order.PushFront(&cached{id, bytes})
	l.bytes += bytes
}

func (l *lru) use(id uint64) {
	if e := l.at[id]; e != nil {
		l.order.MoveToFront(e)
	}
}

func (l *lru) remove(id uint64) {
	if e := l.at[id]; e != nil {
		l.bytes -= e.Value.(*cached).bytes
		l.order.Remove(e)
		delete(l.at, id)
	}
}

// oldest calls each for contents, the one used longest ago first, until it returns false.
func (l *lru) oldest(each func(id uint64, bytes int64) bool) {
	for e := l.order.Back(); e != nil; {
		before := e.Prev()
		c := e.Value.(*cached)
		if !each(c.id, c.bytes) {
			return
		}
		e = before
	}
}
