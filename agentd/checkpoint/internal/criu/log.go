package criu

import (
	"bufio"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
)

// Cause says what stood in CRIU's way, as far as its log tells.
type Cause int

// The causes.
const (
	CauseUnknown Cause = iota
	// CauseTimeout: the deadline was over and CRIU was ended.
	CauseTimeout
	// CauseKilled: CRIU or its helper was ended by somebody else.
	CauseKilled
	// CauseExternalSocket: a unix socket is connected to a process outside the tree.
	CauseExternalSocket
	// CauseTCP: a TCP socket in a state that cannot be dumped.
	CauseTCP
	// CauseTTY: a terminal of the outside.
	CauseTTY
	// CauseDevice: a device or a kind of file that has no dump.
	CauseDevice
	// CauseFileSystem: a mount that is neither known nor external.
	CauseFileSystem
	// CauseFileChanged: an open file has another size or mode than the image says.
	CauseFileChanged
	// CauseFileMissing: a file that the image names is not there.
	CauseFileMissing
	// CauseDeletedFile: a deleted file is still open and cannot travel.
	CauseDeletedFile
	// CauseLock: a file lock.
	CauseLock
	// CauseNoSpace: no room for the images.
	CauseNoSpace
	// CauseNoMemory: no memory, or the cgroup's limit.
	CauseNoMemory
	// CauseRights: this process lacks a capability.
	CauseRights
	// CausePIDTaken: a process id of the image is in use.
	CausePIDTaken
	// CauseImages: an image is missing or damaged.
	CauseImages
	// CauseTraced: a debugger holds the process.
	CauseTraced
	// CauseCopy: the private directory could not be copied.
	CauseCopy
	// CauseCPU: the image needs what this CPU has not.
	CauseCPU
)

var causeTexts = map[Cause]string{
	CauseUnknown:        "CRIU failed",
	CauseTimeout:        "it took too long and was ended",
	CauseKilled:         "CRIU was killed",
	CauseExternalSocket: "a unix socket is connected to a process outside the kernel: close it",
	CauseTCP:            "a TCP connection to the outside is open: close it",
	CauseTTY:            "a terminal from outside is open: close it",
	CauseDevice:         "a device or a kind of file that cannot be saved is open: close it",
	CauseFileSystem:     "a mounted file system cannot be saved",
	CauseFileChanged:    "an open file has changed since: put it back, or restore another checkpoint",
	CauseFileMissing:    "a file that was open is gone: put it back, or restore another checkpoint",
	CauseDeletedFile:    "a deleted file is still open and cannot be saved: close it",
	CauseLock:           "a file lock cannot be saved: release it",
	CauseNoSpace:        "no space is left for the images",
	CauseNoMemory:       "not enough memory",
	CauseRights:         "agentd lacks a capability that CRIU needs: see agentd doctor",
	CausePIDTaken:       "a process id is taken",
	CauseImages:         "the images are damaged or incomplete",
	CauseTraced:         "a debugger holds one of the kernel's processes: detach it",
	CauseCopy:           "the kernel's private directory could not be copied",
	CauseCPU:            "this CPU lacks what the checkpoint needs",
}

// String is a short sentence with what to do.
func (c Cause) String() string { return causeTexts[c] }

// causes maps texts of CRIU 3.17 to 4.2 to causes, the more telling first.
var causes = []struct {
	cause Cause
	text  *regexp.Regexp
}{
	{CauseNoSpace, regexp.MustCompile(`No space left on device|Disk quota exceeded|ENOSPC`)},
	{CauseNoMemory, regexp.MustCompile(`Cannot allocate memory|ENOMEM|Can't allocate`)},
	{CauseTCP, regexp.MustCompile(`Connected TCP socket|tcp: |TCP|in-flight|inflight connection`)},
	{CauseExternalSocket, regexp.MustCompile(`External socket|half of stream unix|[Uu]nix socket .*not found|unix.*[Pp]eer|Can't dump socket`)},
	{CauseTTY, regexp.MustCompile(`tty|pty|Found dangling`)},
	{CauseTraced, regexp.MustCompile(`already being traced|Unable to (seize|interrupt)|can't be ptrace|ptrace.*Operation not permitted`)},
	{CauseLock, regexp.MustCompile(`file lock|Some file locks`)},
	{CauseFileSystem, regexp.MustCompile(`failed to dump fs|doesn't have a proper root mount|Can't lookup mount|unreachable sharing|FS mnt .* unsupported`)},
	{CauseFileChanged, regexp.MustCompile(`has bad (size|mode)|bad size|bad mode`)},
	{CauseDeletedFile, regexp.MustCompile(`[Gg]host file .*bigger|Can't dump ghost|Can't get stat on|link-remap|Can't create link remap|invisible file`)},
	{CauseDevice, regexp.MustCompile(`[Cc]an't dump .*(chr|char|block) ?dev|Can't dump file .*\[?[0-9]* *(chr|blk)|anon_inode|Unsupported|not supported|io_uring|perf|DRM|drm|nvidia|kfd`)},
	{CauseFileMissing, regexp.MustCompile(`Can't open file .*No such file|No such file or directory`)},
	{CausePIDTaken, regexp.MustCompile(`Can't fork for .*File exists|Pid .* do not match|can't be restored.*pid`)},
	{CauseCPU, regexp.MustCompile(`cpu: |CPU features|FPU`)},
	{CauseRights, regexp.MustCompile(`Operation not permitted|Permission denied|Can't get rlimit`)},
	{CauseImages, regexp.MustCompile(`Magic doesn't match|[Ii]mage.*(corrupt|truncated|not found)|Can't open .*\.img|Unexpected EOF|Incompatible image|Unknown image`)},
}

// noise are errors that CRIU reports and that do not stop it.
var noise = regexp.MustCompile(`Can't setup RLIMIT_NOFILE|Address already assigned|Dirty tracking is OFF|Dumping FAILED|One of more action scripts failed|Dump files .* failed with|Restoring FAILED|cr_dump_tasks|Error \(criu/(cr-service|page-pipe-debug)|CRIU_LOG_|nftables|` +
	`Can't make a request to|exited, status|killed by signal|Can't restore .*task`)

const (
	maxLines   = 4
	maxLineLen = 300
	// maxLog bounds what is read of a log, in bytes.
	maxLog = 64 << 20
)

var errorLine = regexp.MustCompile(`Error \((?:[^)]*)\): (.*)`)

// firstErrors returns the first errors of a log that are not noise; if all are, the
// noise. No log: none.
func firstErrors(path string) []string {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close() //nolint:errcheck // it is only read
	return scanErrors(io.LimitReader(f, maxLog))
}

func scanErrors(r io.Reader) []string {
	var real, rest []string
	lines := bufio.NewReaderSize(r, 64<<10)
	for {
		line, err := lines.ReadSlice('\n')
		if err == bufio.ErrBufferFull { //nolint:errorlint // ReadSlice's own, never wrapped
			line = slices.Clone(line)
			err = skipLine(lines)
		}
		if m := errorLine.FindSubmatch(line); m != nil {
			text := clean(string(m[1]))
			switch {
			case text == "":
			case noise.Match(m[0]):
				if len(rest) < 1 {
					rest = append(rest, text)
				}
			case len(real) < maxLines:
				real = append(real, text)
			}
		}
		if err != nil {
			break
		}
	}
	if len(real) == 0 {
		return rest
	}
	return real
}

func skipLine(r *bufio.Reader) error {
	for {
		_, err := r.ReadSlice('\n')
		if err != bufio.ErrBufferFull { //nolint:errorlint // ReadSlice's own, never wrapped
			return err
		}
	}
}

// clean makes a log's text one printable line.
func clean(s string) string {
	s = strings.ToValidUTF8(oneLine(s), "?")
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return '?'
		}
		return r
	}, s)
	if len(s) > maxLineLen {
		s = strings.ToValidUTF8(s[:maxLineLen], "") + "..."
	}
	return s
}

// causeOf is the cause of the first line that tells one.
func causeOf(lines []string) Cause {
	for _, line := range lines {
		for _, c := range causes {
			if c.text.MatchString(line) {
				return c.cause
			}
		}
	}
	return CauseUnknown
}
