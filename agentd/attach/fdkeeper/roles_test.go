package fdkeeper

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/postern-dev/postern/agentd/attach/fuseserver"
)

// role makes a command line for this program in another role; env replaces os.Environ.
func role(name string, args ...string) ([]string, []string) {
	return append([]string{os.Args[0]}, args...), append(os.Environ(), "FDKEEPER_TEST_ROLE="+name)
}

func keeperMain() int {
	dir := os.Args[1]
	ready := os.NewFile(3, "ready")
	say := func(s string) { _, _ = ready.WriteString(s); _ = ready.Close() }
	control, err := fuseserver.OpenControl()
	if err != nil {
		say(err.Error())
		return 1
	}
	command, env := role("server", dir)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	err = Run(ctx, Config{
		Dir: dir, Command: command, Env: env, Control: control, Patience: 700 * time.Millisecond, Silence: 1500 * time.Millisecond,
		Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)),
	}, func() { say(sayReady) })
	if errors.Is(err, ErrTaken) {
		say(sayReady)
		return 0
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// single is a file system of one file, "f", with five bytes.
type single struct{ fuse.RawFileSystem }

func (single) attr(node uint64, a *fuse.Attr) fuse.Status {
	a.Ino, a.Nlink, a.Mode = node, 1, syscall.S_IFDIR|0o755
	if node == 2 {
		a.Mode, a.Size = syscall.S_IFREG|0o644, 5
	}
	return fuse.OK
}

func (s single) Lookup(_ <-chan struct{}, _ *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if name != "f" {
		return fuse.ENOENT
	}
	out.NodeId = 2
	return s.attr(2, &out.Attr)
}

func (s single) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	return s.attr(in.NodeId, &out.Attr)
}

func (single) Open(_ <-chan struct{}, _ *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	out.OpenFlags = fuse.FOPEN_DIRECT_IO
	return fuse.OK
}

func (single) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	text := "12345"
	return fuse.ReadResultData([]byte(text[min(int(in.Offset), len(text)):])), fuse.OK
}

// serverMain is what mountd is: it claims, serves, and goes on without its keeper. Files
// in its directory make it fail: "refuse" (it ends at once), "deaf" (it claims and does
// nothing).
func serverMain() int {
	dir := os.Args[1]
	has := func(name string) bool { _, err := os.Stat(filepath.Join(dir, name)); return err == nil }
	if has("refuse") {
		return 1
	}
	fail := func(err error) int { fmt.Fprintln(os.Stderr, "server:", err); return 1 }
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	c, err := Dial(dir)
	if err != nil {
		return fail(err)
	}
	names, err := c.Claim(ctx)
	if err != nil {
		return fail(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "pid"), fmt.Appendf(nil, "%d", os.Getpid()), 0o600); err != nil {
		return fail(err)
	}
	if has("deaf") {
		select {}
	}
	for begun := time.Now(); has("slow") && time.Since(begun) < 3*Patience/2; time.Sleep(100 * time.Millisecond) {
		if err := c.Opening(); err != nil {
			return fail(err)
		}
	}
	var saved *fuseserver.Saved
	var dev *os.File
	var minor uint32
	if len(names) == 0 {
		m, err := fuseserver.NewMount(fuseserver.MountConfig{AllowOther: true})
		if err != nil {
			return fail(err)
		}
		if err := c.Put("one", m.Minor, nil, m.Dev, m.Tree); err != nil {
			return fail(err)
		}
		dev, minor = m.Dev, m.Minor
	} else {
		kept, err := c.Fetch(names[0])
		if err != nil {
			return fail(err)
		}
		dev, minor = kept.Dev, kept.Minor
		if len(kept.Blob) > 0 {
			saved = &fuseserver.Saved{}
			if err := json.Unmarshal(kept.Blob, saved); err != nil {
				return fail(err)
			}
		}
	}
	var blob []byte
	if saved != nil {
		blob, _ = json.Marshal(saved)
	}
	server, err := fuseserver.New(fuseserver.Config{
		Dev: dev, FS: single{fuse.NewDefaultRawFileSystem()}, Options: fuse.MountOptions{MaxWrite: 64 << 10}, Saved: saved,
		Save: func(v fuseserver.Saved) (err error) {
			blob, err = json.Marshal(v)
			return errors.Join(err, c.Update("one", blob))
		},
	})
	if err != nil {
		return fail(err)
	}
	if err := c.Serving("one"); err != nil {
		return fail(err)
	}
	go func() {
		reserve, _ := c.Clone("one", false)
		for ctx.Err() == nil {
			time.Sleep(100 * time.Millisecond)
			if os.Remove(filepath.Join(dir, "hangup")) == nil {
				_ = c.conn.Close()
			}
			if c.Beat() == nil {
				continue
			}
			// The keeper is gone: another one gets everything.
			command, env := role("keeper", dir)
			p, err := Spawn(ctx, SpawnConfig{Command: command, Env: env, LogFile: filepath.Join(dir, "log")})
			if err != nil {
				fmt.Fprintln(os.Stderr, "server:", err)
				continue
			}
			_ = p.Release()
			if next, aerr := c.Again(); aerr == nil {
				c = next
				var kept []string
				if kept, err = c.Claim(ctx); err == nil && len(kept) > 0 {
					err = errors.Join(c.Update("one", blob), c.Serving("one"))
					_ = os.WriteFile(filepath.Join(dir, "again"), nil, 0o600)
				} else if err == nil {
					err = errors.Join(c.Put("one", minor, blob, dev, reserve), c.Serving("one"))
					reserve, _ = c.Clone("one", false)
				}
			}
			if err != nil {
				fmt.Fprintln(os.Stderr, "server:", err)
			}
		}
	}()
	if err := server.Serve(ctx); err != nil && !errors.Is(err, fuseserver.ErrGone) {
		return fail(err)
	}
	if ctx.Err() != nil {
		return ExitReplaced
	}
	return 0
}

// readMain reads a file and prints what it got and how long it took, in milliseconds.
func readMain() int {
	began := time.Now()
	text, err := os.ReadFile(os.Args[1])
	var errno syscall.Errno
	errors.As(err, &errno)
	fmt.Printf("%q %d %d\n", text, errno, time.Since(began).Milliseconds())
	return 0
}
