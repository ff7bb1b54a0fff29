package filebroker

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// File is one of a database's files.
type File byte

// The files: the database and what SQLite keeps beside it.
const (
	Database File = iota
	Journal
	WAL
	SharedMemory
)

// suffixes are what the files' names end in.
var suffixes = [...]string{"", "-journal", "-wal", "-shm"}

// What a request asks for.
const (
	opOpen   = 'o' // flags: write, create, exclusive
	opStat   = 's' // a descriptor that is good for fstat alone
	opUnlink = 'u' // the journal, the log and its index
	opDir    = 'd' // the directory, to fsync it
)

// Flags of opOpen.
const (
	flagWrite = 1 << iota
	flagCreate
	flagExclusive
)

// Server opens the files of one database.
type Server struct {
	// Path is the database's, absolute.
	Path string
	// ReadWrite lets the process write.
	ReadWrite bool
}

// Serve answers the process at the other end of a SOCK_SEQPACKET socket until that is
// closed. It closes the socket.
func (s Server) Serve(socket int) {
	defer func() { _ = unix.Close(socket) }()
	var request [8]byte
	for {
		n, _, err := recv(socket, request[:])
		if err != nil || n != 3 {
			return
		}
		fd, err := s.answer(request[0], File(request[1]), request[2])
		var code unix.Errno
		if err != nil && !errors.As(err, &code) {
			code = unix.EIO
		}
		var reply [4]byte
		binary.LittleEndian.PutUint32(reply[:], uint32(code))
		var rights []byte
		if fd >= 0 {
			rights = unix.UnixRights(fd)
		}
		err = unix.Sendmsg(socket, reply[:], rights, nil, unix.MSG_NOSIGNAL)
		if fd >= 0 {
			_ = unix.Close(fd)
		}
		if err != nil {
			return
		}
	}
}

func (s Server) answer(op byte, file File, flags byte) (fd int, err error) {
	if int(file) >= len(suffixes) {
		return -1, unix.EINVAL
	}
	path := s.Path + suffixes[file]
	switch op {
	case opOpen:
		return s.open(path, file, flags)
	case opStat:
		return openRegular(path, unix.O_PATH, 0)
	case opUnlink:
		if !s.ReadWrite || file == Database {
			return -1, unix.EACCES
		}
		return -1, unix.Unlink(path)
	case opDir:
		if !s.ReadWrite {
			return -1, unix.EACCES
		}
		return unix.Open(filepath.Dir(s.Path), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	}
	return -1, unix.EINVAL
}

func (s Server) open(path string, file File, flags byte) (int, error) {
	write := flags&flagWrite != 0
	// The index of a log holds no data, and every reader writes its marks there.
	if write && !s.ReadWrite && file != SharedMemory {
		// As SQLite expects of a file that may only be read: it asks again.
		if file == WAL && s.logged() {
			return -1, s.createEmpty(path, unix.EACCES)
		}
		return -1, unix.EACCES
	}
	mode := unix.O_RDONLY
	if write {
		mode = unix.O_RDWR
	}
	fd, err := openRegular(path, mode, 0)
	if err == nil && flags&flagExclusive != 0 {
		_ = unix.Close(fd)
		return -1, unix.EEXIST
	}
	if !errors.Is(err, unix.ENOENT) || flags&flagCreate == 0 || file == Database {
		return fd, err
	}
	if file == SharedMemory && !s.ReadWrite && !s.logged() {
		return -1, err
	}
	if err := s.createEmpty(path, nil); err != nil {
		return -1, err
	}
	return openRegular(path, mode, 0)
}

// createEmpty makes an empty file with the database's owner and mode, unless there is
// one, and then returns after.
func (s Server) createEmpty(path string, after error) error {
	var like unix.Stat_t
	if err := unix.Stat(s.Path, &like); err != nil {
		return err
	}
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if errors.Is(err, unix.EEXIST) {
		return after
	}
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	// Without the right to give it away it is ours, as we are who opens the database.
	if os.Geteuid() == 0 {
		if err := unix.Fchown(fd, int(like.Uid), int(like.Gid)); err != nil {
			_ = unix.Unlink(path)
			return err
		}
	}
	if err := unix.Fchmod(fd, like.Mode&0o666); err != nil {
		return err
	}
	return after
}

// logged tells whether the database keeps a write-ahead log.
func (s Server) logged() bool {
	fd, err := openRegular(s.Path, unix.O_RDONLY, 0)
	if err != nil {
		return false
	}
	defer func() { _ = unix.Close(fd) }()
	var versions [2]byte
	n, err := unix.Pread(fd, versions[:], 18)
	return err == nil && n == 2 && versions == [2]byte{2, 2}
}

// openRegular opens a regular file that is no symbolic link.
func openRegular(path string, flags int, mode uint32) (int, error) {
	// A pipe must not hold us up.
	fd, err := unix.Open(path, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, mode)
	if err != nil {
		return -1, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		_ = unix.Close(fd)
		return -1, unix.EACCES
	}
	return fd, nil
}

// CheckPath says in one line what is wrong with the path of a database: it must be
// absolute, in its shortest form, and a regular file as far as that can be seen.
func CheckPath(path string) error {
	switch {
	case !filepath.IsAbs(path):
		return errors.New("path is not absolute")
	case filepath.Clean(path) != path:
		return fmt.Errorf("path is not in its shortest form: write %s", filepath.Clean(path))
	}
	return nil
}

// Describe says why a database can't be opened, in words; nil if it can.
func Describe(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return errors.New("there is no such file")
	case err != nil:
		return errors.New("it can't be looked at")
	case info.Mode()&fs.ModeSymlink != 0:
		return errors.New("it is a symbolic link: name the file itself")
	case !info.Mode().IsRegular():
		return errors.New("it is no regular file")
	}
	return nil
}

// askTimeout bounds the wait for an answer.
const askTimeout = 20 * time.Second

// Client asks for files. It may be used by one goroutine at a time.
type Client struct {
	socket int
}

// NewClient uses a socket whose other end is served.
func NewClient(socket int) (*Client, error) {
	timeout := unix.NsecToTimeval(int64(askTimeout))
	if err := unix.SetsockoptTimeval(socket, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		return nil, err
	}
	return &Client{socket: socket}, nil
}

// ErrGone is returned when nobody serves any more. What a file is can't be told then.
var ErrGone = errors.New("agentd does not open files any more")

// Open opens a file; the flags are those of open(2), of which access mode, O_CREAT and
// O_EXCL count. The error is a unix.Errno or ErrGone.
func (c *Client) Open(file File, flags int) (int, error) {
	var f byte
	if flags&unix.O_ACCMODE != unix.O_RDONLY {
		f |= flagWrite
	}
	if flags&unix.O_CREAT != 0 {
		f |= flagCreate
	}
	if flags&unix.O_EXCL != 0 {
		f |= flagExclusive
	}
	return c.ask(opOpen, file, f)
}

// Stat returns a descriptor of a file that is good for fstat.
func (c *Client) Stat(file File) (int, error) { return c.ask(opStat, file, 0) }

// Unlink removes a file.
func (c *Client) Unlink(file File) error {
	_, err := c.ask(opUnlink, file, 0)
	return err
}

// Dir opens the directory.
func (c *Client) Dir() (int, error) { return c.ask(opDir, Database, 0) }

func (c *Client) ask(op byte, file File, flags byte) (int, error) {
	if err := unix.Sendmsg(c.socket, []byte{op, byte(file), flags}, nil, nil, unix.MSG_NOSIGNAL); err != nil {
		return -1, ErrGone
	}
	var reply [8]byte
	n, rights, err := recv(c.socket, reply[:])
	if err != nil || n != 4 {
		return -1, ErrGone
	}
	if code := binary.LittleEndian.Uint32(reply[:]); code != 0 {
		return -1, unix.Errno(code)
	}
	if op == opUnlink {
		return -1, nil
	}
	if rights < 0 {
		return -1, ErrGone
	}
	return rights, nil
}

// recv takes a message and the descriptor that came with it, -1 if there is none.
func recv(socket int, p []byte) (n, fd int, err error) {
	oob := make([]byte, unix.CmsgSpace(4))
	for {
		var on int
		n, on, _, _, err = unix.Recvmsg(socket, p, oob, unix.MSG_CMSG_CLOEXEC)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return 0, -1, err
		}
		oob = oob[:on]
		break
	}
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(messages) == 0 {
		return n, -1, nil
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return n, -1, nil
	}
	return n, fds[0], nil
}
