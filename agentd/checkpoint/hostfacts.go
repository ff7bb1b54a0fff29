package checkpoint

import (
	"context"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/checkpoint/pagestore"
	"github.com/postern-dev/postern/proto"
)

// hostFacts are what a checkpoint that is made here needs of another host.
func hostFacts(criuVersion string) pagestore.Host {
	var u unix.Utsname
	release := ""
	if unix.Uname(&u) == nil {
		release = unix.ByteSliceToString(u.Release[:])
	}
	return pagestore.Host{Architecture: runtime.GOARCH, CPU: strings.Join(cpuFeatures("/proc/cpuinfo"), " "), Kernel: release, CRIU: criuVersion}
}

// cpuFeatures are those that a program may have found and relies on, sorted.
func cpuFeatures(cpuinfo string) []string {
	b, err := os.ReadFile(cpuinfo)
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(b)) {
		key, value, _ := strings.Cut(line, ":")
		if key = strings.TrimSpace(key); key == "flags" || key == "Features" {
			f := strings.Fields(value)
			slices.Sort(f)
			return slices.Compact(f)
		}
	}
	return nil
}

// fits refuses a checkpoint that can't be restored here, with the reason.
func (e *Engine) fits(ctx context.Context, c Checkpoint) error {
	version, err := e.cfg.Driver.Version(ctx)
	if err != nil {
		return err
	}
	if reason := misfit(c.Host, hostFacts(version)); reason != "" {
		return proto.Errorf(proto.CodeVersionMismatch, "checkpoint %s can't be restored on this host: %s", c.ID, reason)
	}
	return nil
}

// misfit says why a checkpoint made on from can't be restored on here; "" if it can.
func misfit(from, here pagestore.Host) string {
	switch {
	case from.Architecture != here.Architecture:
		return "it needs a CPU of " + from.Architecture + ", here is " + here.Architecture
	case numbers(here.CRIU, 2) < numbers(from.CRIU, 2):
		return "it was made by CRIU " + from.CRIU + ", here is " + here.CRIU + ": install a newer one"
	case numbers(here.Kernel, 2) < numbers(from.Kernel, 2):
		return "it was made on Linux " + from.Kernel + ", here is " + here.Kernel + ": a newer kernel is needed"
	}
	have := map[string]bool{}
	for f := range strings.FieldsSeq(here.CPU) {
		have[f] = true
	}
	var missing []string
	for f := range strings.FieldsSeq(from.CPU) {
		if !have[f] {
			missing = append(missing, f)
		}
	}
	if len(missing) > 8 {
		missing = append(missing[:8], "...")
	}
	if len(missing) > 0 {
		return "this CPU lacks " + strings.Join(missing, ", ")
	}
	return ""
}

// numbers makes the first n numbers of a version comparable: 4.2.1 is 4002 for two.
func numbers(version string, n int) int {
	value := 0
	fields := strings.FieldsFunc(version, func(r rune) bool { return r < '0' || r > '9' })
	for i := range n {
		value *= 1000
		if i < len(fields) {
			x, _ := strconv.Atoi(fields[i])
			value += min(x, 999)
		}
	}
	return value
}
