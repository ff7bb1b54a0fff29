package fdkeeper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/postern-dev/postern/agentd/attach/packet"
)

// Client speaks with a keeper. It is safe for concurrent use; calls wait for each other.
type Client struct {
	dir  string
	conn *packet.Conn
	lock *os.File // of a server, for its life
}

// serverLock is held by the server, so that a new keeper knows that there is one.
const serverLock = "server.lock"

// Dial reaches the keeper of a directory; an error that is fs.ErrNotExist or ECONNREFUSED
// means that there is none.
func Dial(dir string) (*Client, error) {
	conn, err := packet.Dial(dir, SocketName)
	if err != nil {
		return nil, fmt.Errorf("reach the keeper of mounts: %w", err)
	}
	return &Client{dir: dir, conn: conn}, nil
}

// Close ends the conversation. A server that has claimed is replaced when it ends, not now.
func (c *Client) Close() error {
	if c.lock != nil {
		return errors.Join(c.conn.Close(), c.lock.Close())
	}
	return c.conn.Close()
}

// Again reaches the keeper of now, when the one before has died. A server goes on holding
// its lock meanwhile, so that the new keeper waits for it instead of starting another. c
// is done with if it succeeds; it may be tried again if not.
func (c *Client) Again() (*Client, error) {
	_ = c.conn.Close()
	next, err := Dial(c.dir)
	if err != nil {
		return nil, err
	}
	next.lock, c.lock = c.lock, nil
	return next, nil
}

// call sends a message and waits for its answer, until the time is over.
func (c *Client) call(until time.Time, m message, files ...*os.File) (answer message, got []*os.File, err error) {
	got, err = c.conn.Call(until, m, &answer, files...)
	switch {
	case err != nil:
		return answer, nil, fmt.Errorf("keeper of mounts: %w", err)
	case answer.NotFound:
		err = fmt.Errorf("%s: %w", m.Name, ErrUnknown)
	case answer.Error != "":
		err = fmt.Errorf("keeper of mounts: %s", answer.Error)
	}
	if err != nil {
		packet.CloseAll(got)
		return answer, nil, err
	}
	return answer, got, nil
}

func (c *Client) simple(m message, files ...*os.File) error {
	_, got, err := c.call(time.Now().Add(callTime), m, files...)
	packet.CloseAll(got)
	return err
}

// Claim makes this process the server, once the one before is dead, and tells the names
// of the connections that it takes over. It may take as long as ctx.
func (c *Client) Claim(ctx context.Context) ([]string, error) {
	until, ok := ctx.Deadline()
	if !ok {
		until = time.Now().Add(time.Minute)
	}
	answer, got, err := c.call(until, message{Op: opClaim})
	packet.CloseAll(got)
	if err != nil {
		return nil, err
	}
	if c.lock != nil {
		return answer.Names, nil
	}
	if c.lock, err = lockFile(filepath.Join(c.dir, serverLock)); err == nil && c.lock == nil {
		err = fmt.Errorf("another server of mounts lives: %s is locked", filepath.Join(c.dir, serverLock))
	}
	return answer.Names, err
}

// Kept is a connection that the keeper holds. Dev is the caller's own copy.
type Kept struct {
	Name  string
	Minor uint32
	Blob  []byte
	Dev   *os.File
}

// Fetch gets a connection.
func (c *Client) Fetch(name string) (*Kept, error) {
	answer, got, err := c.call(time.Now().Add(callTime), message{Op: opFetch, Name: name})
	if err != nil {
		return nil, err
	}
	if len(got) != 1 {
		packet.CloseAll(got)
		return nil, fmt.Errorf("keeper of mounts: %d descriptors came, not 1", len(got))
	}
	return &Kept{Name: name, Minor: answer.Minor, Blob: answer.Blob, Dev: got[0]}, nil
}

// Put gives the keeper a new connection; it copies dev, and moves tree, a detached mount,
// into its namespace.
func (c *Client) Put(name string, minor uint32, blob []byte, dev, tree *os.File) error {
	return c.simple(message{Op: opPut, Name: name, Minor: minor, Blob: blob}, dev, tree)
}

// Update replaces a connection's blob.
func (c *Client) Update(name string, blob []byte) error {
	return c.simple(message{Op: opUpdate, Name: name, Blob: blob})
}

// Serving tells that a connection is answered from now on.
func (c *Client) Serving(name string) error {
	return c.simple(message{Op: opServing, Name: name})
}

// Clone gets a detached mount of a connection's root, for move_mount(2).
func (c *Client) Clone(name string, readOnly bool) (*os.File, error) {
	_, got, err := c.call(time.Now().Add(callTime), message{Op: opClone, Name: name, ReadOnly: readOnly})
	if err != nil {
		return nil, err
	}
	if len(got) != 1 {
		packet.CloseAll(got)
		return nil, fmt.Errorf("keeper of mounts: %d descriptors came, not 1", len(got))
	}
	return got[0], nil
}

// Drop makes the keeper forget a connection. Mounts elsewhere keep it going.
func (c *Client) Drop(name string) error { return c.simple(message{Op: opDrop, Name: name}) }

// Beat tells that the server lives. More than Silence without it, while somebody waits for
// a mount, and the server is killed.
func (c *Client) Beat() error { return c.simple(message{Op: opBeat}) }

// Opening is Beat of a server that does not yet serve all that it has claimed: whoever waits is
// let wait longer than Patience, OpeningTime at most.
func (c *Client) Opening() error { return c.simple(message{Op: opOpening}) }

// List tells the names of all connections.
func (c *Client) List() ([]string, error) {
	answer, got, err := c.call(time.Now().Add(callTime), message{Op: opList})
	packet.CloseAll(got)
	return answer.Names, err
}

// Renew makes the keeper start a server anew by this command, which takes over from the
// one that runs: an upgrade. Later servers are started by it too.
func (c *Client) Renew(command []string) error {
	return c.simple(message{Op: opRenew, Command: command})
}

// SpawnConfig says how to start a keeper.
type SpawnConfig struct {
	// Command is the keeper's program and arguments; it gets descriptor 3, on which it says
	// "ready", or what is wrong, and closes it.
	Command []string
	// LogFile takes what keeper and server print.
	LogFile string
	// Env is the whole environment.
	Env []string
}

// Spawn starts a keeper that outlives the caller and waits until it can be dialed, or
// found that another one runs already. A caller that stays must reap it: it gets the
// process.
func Spawn(ctx context.Context, c SpawnConfig) (*os.Process, error) {
	if err := os.MkdirAll(filepath.Dir(c.LogFile), 0o700); err != nil {
		return nil, err
	}
	ready, theirs, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer ready.Close() //nolint:errcheck // it was read
	log, err := os.OpenFile(c.LogFile, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, errors.Join(err, theirs.Close())
	}
	cmd := exec.Command(c.Command[0], c.Command[1:]...)
	cmd.Dir, cmd.Env = "/", c.Env
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = errors.Join(cmd.Start(), theirs.Close(), log.Close())
	if err != nil {
		return nil, fmt.Errorf("start the keeper of mounts: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = ready.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	said := make([]byte, 4<<10)
	n, err := ready.Read(said)
	if text := strings.TrimSpace(string(said[:n])); text == sayReady {
		return cmd.Process, nil
	} else if n > 0 {
		err = errors.New(text)
	} else if ctx.Err() != nil {
		err = context.Cause(ctx)
	} else {
		err = fmt.Errorf("it ended at once (%w): see %s", err, c.LogFile)
	}
	_ = cmd.Process.Kill()
	_, _ = cmd.Process.Wait()
	return nil, fmt.Errorf("start the keeper of mounts: %w", err)
}

const sayReady = "ready"
