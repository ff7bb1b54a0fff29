package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/postern-dev/postern/e2e/stack"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// startRsyslog starts a real rsyslogd that takes messages by TCP, and returns its address and the file that has what it took, a
// message's text to a line.
func startRsyslog(t *testing.T) (address, file string) {
	t.Helper()
	dir := shortDir(t)
	conf := strings.NewReplacer("DIR", dir).Replace(`global(workDirectory="DIR" maxMessageSize="64k" parser.escapeControlCharactersOnReceive="off")
module(load="imtcp") input(type="imtcp" address="127.0.0.1" port="0" listenPortFileName="DIR/port")
template(name="text" type="string" string="%app-name% %msg:::drop-last-lf%\n")
main_queue(queue.type="direct")
action(type="omfile" file="DIR/out" template="text")
`)
	if err := os.WriteFile(filepath.Join(dir, "conf"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/usr/sbin/rsyslogd", "-n", "-f", filepath.Join(dir, "conf"), "-i", filepath.Join(dir, "pid")) // of packaging/dev/deps.sh rsyslog
	said := &lockedBuffer{}
	cmd.Stdout, cmd.Stderr = said, said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM) //nolint:errcheck // it may have ended
		kill := time.AfterFunc(10*time.Second, func() { _ = cmd.Process.Kill() })
		cmd.Wait() //nolint:errcheck // likewise
		kill.Stop()
	})
	eventually(t, patience, "rsyslogd listens", func() error {
		port, err := os.ReadFile(filepath.Join(dir, "port"))
		if err != nil || len(port) == 0 {
			return fmt.Errorf("%w: %s", err, said.String())
		}
		address = "127.0.0.1:" + strings.TrimSpace(string(port))
		return nil
	})
	return address, filepath.Join(dir, "out")
}

// lockedBuffer is what a process says, to be looked at while it runs.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// logged is how often each entry of the chain is in rsyslogd's file, by number, with its text; cut is how many lines are none.
func logged(t *testing.T, file string) (times map[uint64]int, texts map[uint64]string, cut int) {
	t.Helper()
	raw, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	times, texts = map[uint64]int{}, map[uint64]string{}
	for line := range strings.Lines(string(raw)) {
		text, ok := strings.CutPrefix(line, "postern-controlplane ")
		e, err := auditchain.Decode([]byte(strings.TrimSpace(text)))
		if !ok || err != nil {
			cut++
			continue
		}
		times[e.Sequence]++
		if was, seen := texts[e.Sequence]; seen && was != strings.TrimSpace(text) {
			t.Errorf("entry %d came with two texts: %q, %q", e.Sequence, was, text)
		}
		texts[e.Sequence] = strings.TrimSpace(text)
	}
	return times, texts, cut
}

// gaugeOf is the value of a metric without labels.
func gaugeOf(t *testing.T, s *stack.Stack, name string) float64 {
	t.Helper()
	resp, err := http.Get(s.URL + "/metrics") // of this machine, without a token
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(text), "\n"+name+" ")
	var value float64
	if _, err := fmt.Sscan(rest, &value); !ok || err != nil {
		t.Fatalf("metric %s: %v", name, err)
	}
	return value
}

// TestSyslogOfReplicas kills the replica that forwards audit entries to a real rsyslogd while entries are written, and brings it
// back: the other one goes on and hands back, no entry is lost, and only those come again that were not known to be delivered.
func TestSyslogOfReplicas(t *testing.T) {
	t.Parallel()
	address, file := startRsyslog(t)
	set := newReplicas(t, 2, "--audit-syslog", "tcp://"+address)
	first, second := set.all[0], set.all[1] // by name: the first one forwards
	var names [2]string
	for i, s := range set.all {
		name, err := os.ReadFile(filepath.Join(s.DataDir(), "replica"))
		if err != nil {
			t.Fatal(err)
		}
		names[i] = strings.TrimSpace(string(name))
	}
	if names[1] < names[0] {
		first, second = second, first
	}
	conn, err := set.pg.Connect(t.Context(), "postern")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background()) //nolint:errcheck // only read
	number := func(column, table string) (n uint64) {
		t.Helper()
		if err := conn.QueryRow(t.Context(), "SELECT coalesce(max("+column+"), 0) FROM "+table+" WHERE organization = 'org_default'").Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}

	// Entries, some 30 a second, by the one that lives.
	calls := api(t, second)
	ctx, stop := context.WithCancel(t.Context())
	var work sync.WaitGroup
	defer work.Wait()
	defer stop()
	work.Go(func() {
		for ctx.Err() == nil {
			if _, err := calls.Keys.CreateKey(ctx, connect.NewRequest(&posternv1.CreateKeyRequest{Ttl: durationpb.New(time.Minute)})); err != nil && ctx.Err() == nil {
				t.Errorf("create a key: %v", err)
				return
			}
			select {
			case <-ctx.Done():
			case <-time.After(30 * time.Millisecond):
			}
		}
	})
	arrived := func(what string, past uint64) {
		t.Helper()
		eventually(t, patience, what, func() error {
			times, _, _ := logged(t, file)
			if times[past] == 0 {
				return fmt.Errorf("entry %d is not there, of %d", past, len(times))
			}
			return nil
		})
	}
	const forwards, messages = "controlplane_audit_syslog_up", "controlplane_audit_syslog_messages_total"
	eventually(t, patience, "a replica forwards", func() error {
		if p := number("sequence", "audit_forwards"); p < 40 {
			return fmt.Errorf("up to %d", p)
		}
		return nil
	})
	eventually(t, patience, "the first one by name forwards", func() error {
		if gaugeOf(t, first, forwards) != 1 || gaugeOf(t, second, forwards) != 0 {
			return errors.New("not yet")
		}
		return nil
	})
	// On a machine so busy that a heartbeat is late for 6 s the other one forwards meanwhile, as it should.
	alone := gaugeOf(t, second, messages) == 0
	first.ControlPlane.Kill()
	kept, written := number("sequence", "audit_forwards"), number("sequence", "audit_heads")
	arrived("the other one to go on", written+20)
	began := time.Now()
	eventually(t, patience, "what it forwards is noted", func() error {
		if p := number("sequence", "audit_forwards"); p <= written {
			return fmt.Errorf("up to %d", p)
		}
		return nil
	})
	t.Logf("killed at entry %d, of which %d were known to be delivered; noted again after another %v", written, kept, time.Since(began))

	back := number("sequence", "audit_forwards")
	startControlPlane(t, first)
	eventually(t, patience, "the first one forwards again", func() error {
		if gaugeOf(t, first, forwards) != 1 || gaugeOf(t, second, forwards) != 0 {
			return errors.New("not yet")
		}
		return nil
	})
	arrived("it to go on", number("sequence", "audit_heads")+10)
	stop()
	work.Wait()

	// All of the chain is there, as it is in the database.
	last := number("sequence", "audit_heads")
	eventually(t, patience, "all entries", func() error {
		if p := number("sequence", "audit_forwards"); p != last {
			return fmt.Errorf("up to %d of %d", p, last)
		}
		return nil
	})
	times, texts, cut := logged(t, file)
	v := auditchain.NewVerifier(auditchain.Head{})
	again := 0
	for i := uint64(1); i <= last; i++ {
		if err := v.Add([]byte(texts[i])); err != nil {
			t.Fatalf("entry %d of %d is %q: %v", i, last, texts[i], err)
		}
		switch {
		case times[i] == 1:
		case i <= kept && alone, i > written && i <= back:
			t.Errorf("entry %d came %d times though it was known to be delivered (%d at the kill, %d to %d later)", i, times[i], kept, written, back)
		case times[i] > 3:
			t.Errorf("entry %d came %d times", i, times[i])
		default:
			again++
		}
	}
	t.Logf("%d entries, %d of them came again, %d lines cut off", last, again, cut)
	if cut > 1 {
		t.Errorf("%d lines are no entries: a kill can cut off one", cut)
	}
}
