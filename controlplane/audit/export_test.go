package audit

// Waiting is the number of entries that wait for the disk; for tests alone.
func Waiting(l *Log, organization string) int {
	c := l.chain(organization)
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.waiting)
}
