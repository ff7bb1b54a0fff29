package uplink

import (
	"encoding/json"
	"time"

	"github.com/postern-dev/postern/tunnel"
)

// GiveUp is what an uplink does first, for what tries what it may still do.
var GiveUp = giveUp

// NeverLate makes a Starter wait for ever for uplinks whose tunnel has ended, but those that are killed for it.
func NeverLate(s *Starter) { s.farewell = time.Hour }

// Said starts a process and returns the JSON that it says, within limit.
func Said(s *Starter, c tunnel.CarrierConfig, limit time.Duration) ([]byte, error) {
	p, err := s.start(c)
	if err != nil {
		return nil, err
	}
	defer p.Close(true)
	_ = p.control.SetReadDeadline(time.Now().Add(limit))
	var said json.RawMessage
	err = json.NewDecoder(p.control).Decode(&said)
	return said, err
}
