package main

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Who waits for a kernel that starts and never gets further is told so in the end; who waits
// for one that does is left alone.
func TestExecGivesUpOnAKernelThatStaysStarting(t *testing.T) {
	for _, c := range []struct {
		name   string
		starts time.Duration // 0: never
		fails  bool          // nobody can be asked
		gaveUp bool
	}{
		{"it starts", 20 * time.Second, false, false},
		{"it stays starting", 0, false, true},
		{"nobody answers", 0, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				work, giveUp := context.WithCancelCause(t.Context())
				defer giveUp(nil)
				watching, enough := context.WithTimeout(work, startingTime)
				defer enough()
				began := time.Now()
				giveUpOn(watching, startingLook, giveUp, "k1", func(context.Context) (*posternv1.AgentKernel, error) {
					if c.fails {
						return nil, errors.New("no answer")
					}
					k := &posternv1.AgentKernel{Agent: "a1", Kernel: &posternv1.Kernel{State: posternv1.KernelState_KERNEL_STATE_STARTING}}
					if c.starts > 0 && time.Since(began) >= c.starts {
						k.Kernel.State = posternv1.KernelState_KERNEL_STATE_IDLE
					}
					return k, nil
				})
				why := context.Cause(work)
				if !c.gaveUp {
					if why != nil || time.Since(began) != c.starts {
						t.Errorf("after %v: %v", time.Since(began), why)
					}
					return
				}
				if proto.CodeOf(why) != proto.CodeTimeout || !strings.Contains(why.Error(), "kernel k1 is starting and does not get any further") || time.Since(began) != startingTime {
					t.Errorf("after %v: %v", time.Since(began), why)
				}
			})
		})
	}
}
