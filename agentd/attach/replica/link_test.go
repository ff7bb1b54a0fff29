package replica

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/postern-dev/postern/agentd/attach/remote"
	"github.com/postern-dev/postern/agentd/attach/remote/simulatedremote"
	"github.com/postern-dev/postern/agentd/attach/tree"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// TestLinkComingUp: requests of a replica that was just opened wait for its link instead of failing.
func TestLinkComingUp(t *testing.T) {
	r := simulatedremote.New()
	a := open(t, r, t.TempDir(), "a")
	mkdir(t, a, "d")
	put(t, a, "small", noise(5000, 1))
	put(t, a, "large", noise(3<<20, 2))
	put(t, a, "d/inside", nil)
	drain(t, a)
	dir := t.TempDir()
	b := open(t, r, dir, "b", func(c *Config) { c.Deadline = time.Minute })
	names(t, b, tree.Root)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	r.Cut(true)
	b = open(t, r, dir, "b", func(c *Config) { c.Deadline = time.Minute })
	asks := map[string]func() error{
		"content in one piece": func() error { _, err := get(b, tree.Root, "small"); return err },
		"content in chunks":    func() error { _, err := get(b, tree.Root, "large"); return err },
		"a directory": func() error {
			at, err := b.Lookup(ctx, tree.Root, "d")
			if err == nil {
				_, err = b.Lookup(ctx, at.ID, "inside")
			}
			return err
		},
		"a change in the midst": func() error {
			at, err := b.Lookup(ctx, tree.Root, "large")
			if err == nil {
				_, err = b.Open(ctx, at.ID, true, false)
			}
			if err == nil {
				defer b.Release(at.ID, true)
				_, err = b.Write(ctx, at.ID, 100, []byte("x"))
			}
			return err
		},
	}
	answers := make(chan error, len(asks))
	for what, ask := range asks {
		go func() {
			if err := ask(); err != nil {
				answers <- fmt.Errorf("%s: %w", what, err)
				return
			}
			answers <- nil
		}()
	}
	before := r.Refused()
	eventually(t, "they ask again", func() bool { return r.Refused() > before+3*len(asks) })
	select {
	case err := <-answers:
		t.Fatalf("an answer without a link: %v", err)
	default:
	}
	r.Cut(false)
	for range asks {
		if err := <-answers; err != nil {
			t.Error(err)
		}
	}
}

// TestLinkAway: without a link for as long as a request may take, what is not here is EIO at once.
func TestLinkAway(t *testing.T) {
	r := simulatedremote.New()
	a := open(t, r, t.TempDir(), "a")
	put(t, a, "f", noise(5000, 1))
	drain(t, a)
	b := open(t, r, t.TempDir(), "b")
	names(t, b, tree.Root)
	eventually(t, "the link", func() bool { return b.Status().Connected })
	r.Cut(true)
	eventually(t, "no link", func() bool { return !b.Status().Connected })
	b.mu.Lock()
	b.unlinked = time.Now().Add(-b.cfg.Deadline)
	b.mu.Unlock()
	if b.linkMayCome(1) {
		t.Error("requests would wait")
	}
	if _, err := get(b, tree.Root, "f"); !errors.Is(err, syscall.EIO) {
		t.Errorf("%v, want EIO", err)
	}
}

// TestErrnoOfSocket: that agentd's socket is not there does not mean that a file is not.
func TestErrnoOfSocket(t *testing.T) {
	c := remote.Dial(filepath.Join(t.TempDir(), "no socket"))
	defer c.Close()
	_, err := c.ListNodes(ctx, &posternv1.ListNodesRequest{WorkspaceId: "w", Directories: []uint64{1}})
	if !errors.Is(err, syscall.ENOENT) {
		t.Fatalf("%v does not say why", err)
	}
	if errno := errnoOf(err); errno != syscall.EIO {
		t.Errorf("%v, want EIO", errno)
	}
	if !passing(err) {
		t.Error("agentd may be back in a moment")
	}
}

func TestPassing(t *testing.T) {
	codes := []proto.Code{proto.CodeInternal, proto.CodeUnavailable, proto.CodeAgentOffline, proto.CodeAgentLost}
	for number := range posternv1.ErrorCode_name {
		code := proto.Code(number)
		if want := slices.Contains(codes, code); code != 0 && passing(proto.Errorf(code, "no")) != want {
			t.Errorf("%v: %v, want %v", code, !want, want)
		}
	}
	if passing(fmt.Errorf("write: %w", syscall.ENOSPC)) {
		t.Error("a full disk passes")
	}
}

// TestUploadsWithTheLink: however long uploads could not be sent, they go on as soon as the control plane
// is there again, not when the next of the tries is due that came to be half a minute apart.
func TestUploadsWithTheLink(t *testing.T) {
	for outages := range 4 {
		synctest.Test(t, func(t *testing.T) {
			r := simulatedremote.New()
			a := open(t, r, t.TempDir(), "a")
			put(t, a, "f", []byte("before"))
			drain(t, a)
			for i := range outages + 1 { // each begins at another point of the pause between two tries
				r.Cut(true)
				put(t, a, "f", noise(5000+i, 1))
				time.Sleep(3*time.Minute + time.Duration(outages)*7*time.Second)
				if s := a.Status(); s.Ops == 0 || s.LastError == "" || s.Connected {
					t.Fatalf("in outage %d: %+v", i, s)
				}
				r.Cut(false)
				for began := time.Now(); !a.Status().Connected; time.Sleep(time.Millisecond) {
					if time.Since(began) > time.Minute {
						t.Fatal("no link")
					}
				}
				time.Sleep(100 * time.Millisecond)
				synctest.Wait()
				if s := a.Status(); s.Ops != 0 || s.LastError != "" {
					t.Fatalf("after outage %d of %d: %+v", i, outages+1, s)
				}
			}
		})
	}
}
