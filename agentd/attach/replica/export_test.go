package replica

// openForTest lists the nodes whose contents are open.
func (r *Replica) openForTest() []uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	var ids []uint64
	for id := range r.open {
		ids = append(ids, id)
	}
	return ids
}
