package sqlsession

import "time"

// SetKillAfter shortens the time that a process has to end a stopped
// statement. It returns the way back.
func SetKillAfter(d time.Duration) func() {
	before := killAfter
	killAfter = d
	return func() { killAfter = before }
}
