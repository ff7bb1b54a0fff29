package tunnel

import (
	"context"
	"errors"
	"net"
	"os"
	"syscall"
)

// carrierError is a DialError on its way from a Carrier: what callers look at, and
// texts. It holds no type of an error below, but what errors.Is and errors.As are
// asked for.
type carrierError struct {
	Step     Step   `json:"step"`
	Target   string `json:"target"`
	Hint     string `json:"hint,omitempty"`
	Status   int    `json:"status,omitempty"`
	Text     string `json:"text"`
	Timeout  bool   `json:"timeout,omitempty"`
	Canceled bool   `json:"canceled,omitempty"`
	Errno    int    `json:"errno,omitempty"`
	Name     string `json:"name,omitempty"` // what could not be resolved
	NotFound bool   `json:"not_found,omitempty"`
}

// carriedStep tells whether a step of a dial is a Carrier's: what it says of others
// is not believed.
func carriedStep(s Step) bool {
	switch s {
	case StepDNS, StepTCP, StepProxy, StepOuterTLS, StepUpgrade:
		return true
	}
	return false
}

func encodeError(d *DialError) *carrierError {
	e := &carrierError{
		Step: d.Step, Target: oneLine(d.Target, maxCarrierText), Hint: oneLine(d.Hint, maxCarrierText),
		Status: d.Status, Text: oneLine(d.Err.Error(), maxCarrierText),
		Timeout:  errors.Is(d.Err, os.ErrDeadlineExceeded) || errors.Is(d.Err, context.DeadlineExceeded),
		Canceled: errors.Is(d.Err, context.Canceled),
	}
	var network net.Error
	if errors.As(d.Err, &network) && network.Timeout() {
		e.Timeout = true
	}
	var errno syscall.Errno
	if errors.As(d.Err, &errno) {
		e.Errno = int(errno)
	}
	var dns *net.DNSError
	if errors.As(d.Err, &dns) {
		e.Name, e.NotFound = oneLine(dns.Name, maxCarrierText), dns.IsNotFound
	}
	return e
}

// decode is nil if e is none that a Carrier may send.
func (e *carrierError) decode() *DialError {
	if !carriedStep(e.Step) || e.Status < 0 || e.Status > 999 {
		return nil
	}
	said := &carrierCause{text: oneLine(e.Text, maxCarrierText)}
	if e.Timeout {
		said.causes = append(said.causes, os.ErrDeadlineExceeded)
	}
	if e.Canceled {
		said.causes = append(said.causes, context.Canceled)
	}
	if e.Errno > 0 && e.Errno < 4096 { // MAX_ERRNO
		said.causes = append(said.causes, syscall.Errno(e.Errno))
	}
	if e.Name != "" {
		said.causes = append(said.causes, &net.DNSError{Err: said.text, Name: oneLine(e.Name, maxCarrierText), IsNotFound: e.NotFound, IsTimeout: e.Timeout})
	}
	return &DialError{
		Step: e.Step, Target: oneLine(e.Target, maxCarrierText), Hint: oneLine(e.Hint, maxCarrierText),
		Status: e.Status, Err: said,
	}
}

// carrierCause is the cause of a decoded DialError.
type carrierCause struct {
	text   string
	causes []error
}

func (c *carrierCause) Error() string   { return c.text }
func (c *carrierCause) Unwrap() []error { return c.causes }
