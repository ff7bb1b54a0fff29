package frame

// Bytes with which an agentd takes up a process whose agentd is gone, before any
// frame: it sends TakeUp with the descriptor that leads to the parser of statements,
// and the process answers Taken as soon as it is idle.
const (
	TakeUp = 'R'
	Taken  = 'r'
)

// HoldRequest tells a process that it belongs to a session that stays, and that it is to
// wait for another agentd when its own is gone.
type HoldRequest struct {
	// GraceMillis is how long it waits; then it ends.
	GraceMillis int64
}

// ResumedReply is how a process is found by the agentd that took it up.
type ResumedReply struct {
	// Transaction is the status that the last statement left: I, T or E.
	Transaction string
	// IdleMillis is how long ago that was; Statements how many there were.
	IdleMillis int64
	Statements uint64
}
