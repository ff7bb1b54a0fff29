package leakwait

import (
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(Patient(m)) }

type tests func() int

func (f tests) Run() int { return f() }

// TestPatient: a goroutine that ends after goleak alone has given up is waited for, one that
// goes on is not waited for longer than that.
func TestPatient(t *testing.T) {
	// The test's own goroutines are none of those looked for.
	mine := goleak.IgnoreCurrent()
	code := Patient(tests(func() int {
		go time.Sleep(1500 * time.Millisecond)
		return 0
	}), mine).Run()
	if err := goleak.Find(mine); code != 0 || err != nil {
		t.Errorf("code %d; not waited for: %v", code, err)
	}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		<-stop
		close(stopped)
	}()
	wait(time.Millisecond, mine)
	if err := goleak.Find(mine); err == nil {
		t.Error("the one that goes on is not told of")
	}
	close(stop)
	<-stopped
}

// TestFailure: failed tests are not waited for.
func TestFailure(t *testing.T) {
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		<-stop
		close(stopped)
	}()
	if code := Patient(tests(func() int { return 3 })).Run(); code != 3 {
		t.Errorf("code %d, want 3", code)
	}
	close(stop)
	<-stopped
}
