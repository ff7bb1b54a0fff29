package fdkeeper

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// SocketName is the keeper's socket in its directory.
	SocketName = "keeper.sock"
	// MaxBlob bounds a connection's blob, in bytes.
	MaxBlob = 32 << 10
	// MaxEntries bounds the connections that a keeper holds.
	MaxEntries = 512
	// maxName bounds a connection's name: [a-z0-9-] alone.
	maxName = 64

	maxMessage = 128 << 10
	maxFiles   = 4
	// callTime bounds each call but a claim.
	callTime = 20 * time.Second
)

// The kinds of messages. Answers have none.
const (
	opClaim   = "claim"   // -> names; waits until the server before is dead
	opFetch   = "fetch"   // name -> minor, blob, [dev]
	opPut     = "put"     // name, minor, blob, [dev, tree]
	opUpdate  = "update"  // name, blob
	opServing = "serving" // name: it is answered from now on
	opClone   = "clone"   // name, readonly -> [tree]; for everybody
	opDrop    = "drop"    // name
	opBeat    = "beat"    // the server lives
	opList    = "list"    // -> names; for everybody
	opRenew   = "renew"   // command: start a new server of this program; for everybody
)

type message struct {
	Op       string   `json:"op,omitempty"`
	Name     string   `json:"name,omitempty"`
	Minor    uint32   `json:"minor,omitempty"`
	Blob     []byte   `json:"blob,omitempty"`
	ReadOnly bool     `json:"readonly,omitempty"`
	Command  []string `json:"command,omitempty"`
	Names    []string `json:"names,omitempty"`
	Error    string   `json:"error,omitempty"`
	NotFound bool     `json:"not_found,omitempty"`
}

// ErrUnknown is returned for a name that the keeper does not hold.
var ErrUnknown = errors.New("the keeper holds no such connection")

func validName(name string) bool {
	if name == "" || len(name) > maxName {
		return false
	}
	for _, c := range []byte(name) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

func send(c *net.UnixConn, m message, files ...*os.File) error {
	text, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if len(text) > maxMessage {
		return fmt.Errorf("a message of %d bytes", len(text))
	}
	var rights []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		rights = unix.UnixRights(fds...)
	}
	_, _, err = c.WriteMsgUnix(text, rights, nil)
	return err
}

// receive reads one message; the files are the caller's.
func receive(c *net.UnixConn) (m message, files []*os.File, err error) {
	buf := make([]byte, maxMessage)
	rights := make([]byte, unix.CmsgSpace(maxFiles*4))
	n, oobn, flags, _, err := c.ReadMsgUnix(buf, rights)
	if err != nil {
		return m, nil, err
	}
	files, err = parseRights(rights[:oobn])
	switch {
	case err != nil:
	case n == 0:
		err = net.ErrClosed
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
		err = errors.New("a message that is too long")
	default:
		err = json.Unmarshal(buf[:n], &m)
	}
	if err != nil {
		closeAll(files)
		return m, nil, err
	}
	return m, files, nil
}

func parseRights(b []byte) (files []*os.File, err error) {
	controls, err := unix.ParseSocketControlMessage(b)
	if err != nil {
		return nil, err
	}
	for _, c := range controls {
		fds, err := unix.ParseUnixRights(&c)
		if err != nil {
			continue // no descriptors
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "kept"))
		}
	}
	return files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// inDir calls f with a short path to a file in dir: addresses of unix sockets have at
// most 107 bytes.
func inDir(dir, name string, f func(path string) error) error {
	if path := filepath.Join(dir, name); len(path) < 100 {
		return f(path)
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close() //nolint:errcheck // it was only looked through
	return f(fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), name))
}
