package leakwait

import (
	"time"

	"go.uber.org/goleak"
)

// Patience is how long goroutines of a package's tests have to end once the last test is over.
const Patience = 20 * time.Second

// Patient gives goleak.VerifyTestMain a testing.M that ends only when nothing but the caller's
// goroutine runs, or after Patience. The options are those that VerifyTestMain gets to let
// goroutines be; none of them may be goleak.Cleanup.
func Patient(m goleak.TestingM, options ...goleak.Option) goleak.TestingM { return patient{m, options} }

type patient struct {
	goleak.TestingM
	options []goleak.Option
}

// Run runs the tests, then waits. It returns the tests' code.
func (p patient) Run() int {
	code := p.TestingM.Run()
	if code == 0 {
		Wait(p.options...)
	}
	return code
}

// Wait returns when nothing but the caller's goroutine runs, or after Patience. It tells
// nobody: who calls it asks goleak then.
func Wait(options ...goleak.Option) { wait(Patience, options...) }

func wait(patience time.Duration, options ...goleak.Option) {
	for end := time.Now().Add(patience); goleak.Find(options...) != nil && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
}
