package frame

import "encoding/binary"

// The types of frames of a session of PostgreSQL's own protocol. After Wire the
// process serves one client until its end; agentd sends Data (what the client sent),
// WireAck, WireStop and WireDrain, and gets the frames of package pgproxy.
const (
	Wire      Type = 'W' // WireRequest
	WireAck   Type = 'A' // empty: the intent is in the log; or an Error, why it is not
	WireStop  Type = 'Y' // one byte, Reason; eight bytes, the statement's number, 0 is any
	WireDrain Type = 'D' // empty: end when the server has nothing under way
)

func init() {
	limits[Wire], limits[WireAck], limits[WireStop], limits[WireDrain] = 1<<20, 64<<10, 9, 0
}

// WireRequest makes the process a proxy. The connection must have been opened with
// ConnectRequest.Settings.
type WireRequest struct {
	SessionID                                    string
	MaxRows, MaxBytes                            uint64
	TimeoutMillis, IdleMillis, IdleInTransaction int64 // milliseconds
	ReadWrite                                    bool
	Guard                                        Guard
}

// PutWireStop is a WireStop's payload.
func PutWireStop(reason Reason, seq uint64) []byte {
	return binary.BigEndian.AppendUint64([]byte{byte(reason)}, seq)
}

// ReadWireStop is the reverse of PutWireStop.
func ReadWireStop(payload []byte) (Reason, uint64, bool) {
	if len(payload) != 9 {
		return 0, 0, false
	}
	return Reason(payload[0]), binary.BigEndian.Uint64(payload[1:]), true
}
