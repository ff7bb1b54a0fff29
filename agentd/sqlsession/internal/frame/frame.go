package frame

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Type is a frame's first byte.
type Type byte

// The types of frames.
const (
	Connect      Type = 'C' // ConnectRequest
	Run          Type = 'R' // RunRequest
	Cancel       Type = 'X' // one byte: Reason
	Check        Type = 'K' // empty
	Introspect   Type = 'I' // IntrospectRequest
	Connected    Type = 'c' // ConnectedReply
	Failed       Type = 'e' // FailedReply
	Begun        Type = 'b' // empty: the statement goes to the database now
	Data         Type = 'd' // bytes of an Arrow IPC stream
	Progress     Type = 'p' // eight bytes: the rows sent so far, big endian
	Done         Type = 'z' // DoneReply
	Idle         Type = 'i' // empty
	Checked      Type = 'k' // CheckedReply
	Page         Type = 'g' // a posternv1.CatalogPage
	Introspected Type = 'j' // IntrospectedReply
	Kept         Type = 's' // three numbers, see PutKept, and an Arrow IPC stream: first and last rows
	Plan         Type = 'l' // JSON: the plan to keep with the history
	Hold         Type = 'H' // HoldRequest: the process is to outlive agentd from now on
	Release      Type = 'L' // empty: no longer
	Resumed      Type = 'h' // ResumedReply: the first frame to the agentd that took it up
)

// MaxPlan is the largest payload of a Plan frame in bytes.
const MaxPlan = 512 << 10

// HeaderSize is the length of a frame's header in bytes.
const HeaderSize = 5

// MaxData is the largest payload of a Data frame in bytes.
const MaxData = 256 << 10

// MaxKept is the largest payload of a Kept frame in bytes: with what goes around
// it on the way to the control plane it stays under 1 MiB.
const MaxKept = 960 << 10

// MaxPage is the largest payload of a Page frame in bytes: a table with 1,600
// columns, all with comments, and hundreds of keys fits.
const MaxPage = 8 << 20

// limits bound payloads in bytes. A statement of 4 MiB may grow sixfold as
// JSON.
var limits = map[Type]int{
	Connect:      256 << 10,
	Run:          32 << 20,
	Cancel:       1,
	Check:        0,
	Connected:    4 << 10,
	Failed:       64 << 10,
	Begun:        0,
	Data:         MaxData,
	Progress:     8,
	Done:         256 << 10,
	Idle:         0,
	Checked:      64 << 10,
	Introspect:   16 << 20,
	Page:         MaxPage,
	Introspected: 64 << 10,
	Kept:         MaxKept,
	Plan:         MaxPlan,
	Hold:         4 << 10,
	Release:      0,
	Resumed:      4 << 10,
}

// ErrMalformed is returned for a frame that breaks the protocol.
var ErrMalformed = errors.New("malformed frame")

// Reason is why a statement is cancelled.
type Reason byte

// The reasons of Cancel frames.
const (
	Cancelled Reason = 'c'
	TimedOut  Reason = 't'
	Draining  Reason = 'd' // agentd or the data source goes away
)

// ConnectRequest holds the only credentials that a process ever gets.
type ConnectRequest struct {
	Engine          string
	DSN             string
	Password        string
	User            string // "" means the DSN's
	ApplicationName string
	TimeoutMillis   int64
	// ReadWrite tells whether the source may ever be written to.
	ReadWrite bool `json:",omitempty"`
	// Settings are those of a session of PostgreSQL's own protocol, in place of those
	// that our own statements need; nil otherwise.
	Settings map[string]string `json:",omitempty"`
}

// ConnectedReply says what the process is connected to.
type ConnectedReply struct {
	Version string
	TLS     bool
}

// Parameter is a named value; nil is NULL. Type is the name of its type; empty:
// the database infers it.
type Parameter struct {
	Name  string
	Value *string
	Type  string `json:",omitempty"`
}

// RunRequest is one statement. All limits are set.
type RunRequest struct {
	SQL           string
	Parameters    []Parameter
	MaxRows       uint64
	MaxBytes      uint64
	TimeoutMillis int64
	ReadWrite     bool
	// KeepFirst and KeepLast are how many of the first and last rows go into
	// the Kept frame; both 0: there is none.
	KeepFirst, KeepLast int
	// Explain is plan or analyze: the plan is asked for in place of the rows.
	Explain string `json:",omitempty"`
	// Indexes are CREATE INDEX statements as if which the plan is.
	Indexes []string `json:",omitempty"`
	// Guard is what the policy says to the statement itself.
	Guard Guard
	// Session says that the process is one session's from its first statement to
	// its end: transactions, settings and temporary objects stay.
	Session bool `json:",omitempty"`
	// Expire rolls back a transaction that has been idle for too long, in place of
	// a statement.
	Expire bool `json:",omitempty"`
}

// Guard is the part of a source's policy that the process enforces on each
// statement. Its words are those of package policy.
type Guard struct {
	// Mode is metadata, read-only or read-write; Plans off, structure, full or
	// analyze.
	Mode, Plans string
	// Functions are globs of functions that may be called although the mode
	// would refuse them.
	Functions []string `json:",omitempty"`
	// WriteSchemas and WriteStatements narrow read-write; empty: they don't.
	WriteSchemas, WriteStatements []string `json:",omitempty"`
	// Masks are the rules for values, in the order in which they count.
	Masks         []Mask   `json:",omitempty"`
	MaskFilters   string   `json:",omitempty"` // allow, equality or refuse
	SafeFunctions []string `json:",omitempty"`
	// Hide are globs of what introspection leaves out (see package policy), for engines
	// whose own questions of the catalog it narrows; others do not get it.
	Hide []string `json:",omitempty"`
	// MaskKey is the key of hashes.
	MaskKey []byte `json:",omitempty"`
}

// Mask is one rule: it has either Columns (globs of TABLE.COLUMN or
// SCHEMA.TABLE.COLUMN) or a Pattern (RE2, of what is masked inside of texts).
type Mask struct {
	Columns []string `json:",omitempty"`
	Pattern string   `json:",omitempty"`
	With    string   // redact, hash, partial, null or noise
	Keep    int      // the last characters that partial leaves
	Noise   float64  // the largest part of itself by which noise moves a number
}

// Error is a *proto.Error on its way between processes.
type Error struct {
	Code     int32
	Message  string
	SQL      bool
	SQLState string
	Position int32
	Hint     string
	Detail   string
}

// FromError makes an Error of a *proto.Error; nil of nil.
func FromError(e *proto.Error) *Error {
	if e == nil {
		return nil
	}
	f := &Error{Code: int32(e.Code), Message: Clip(e.Error(), 8<<10)}
	if e.SQL != nil {
		f.SQL, f.SQLState, f.Position = true, Clip(e.SQL.Sqlstate, 16), e.SQL.Position
		f.Hint, f.Detail = Clip(e.SQL.Hint, 4<<10), Clip(e.SQL.Detail, 4<<10)
	}
	return f
}

// Proto is the reverse of FromError.
func (e *Error) Proto() *proto.Error {
	if e == nil {
		return nil
	}
	p := &proto.Error{Code: proto.Code(e.Code), Message: e.Message}
	if e.SQL {
		p.SQL = &posternv1.SQLErrorDetail{Sqlstate: e.SQLState, Position: e.Position, Hint: e.Hint, Detail: e.Detail}
	}
	return p
}

// FailedReply says that nothing was done. Lost means that the connection to
// the database turned out dead before the statement was sent: another process
// may try.
type FailedReply struct {
	Error *Error
	Lost  bool
}

// Notice is what the database said aside.
type Notice struct {
	Severity, SQLState, Message string
}

// DoneReply is how a statement ended; the Data frames before it hold Rows rows.
type DoneReply struct {
	// Transaction is a session's: I none, T open, E failed; else empty.
	Transaction string `json:",omitempty"`
	Rows        uint64
	Tag         string
	Error       *Error
	Notices     []Notice
	// Parameters are told of a statement that was described and not run.
	Parameters []ParameterInfo `json:",omitempty"`
}

// ParameterInfo is a placeholder of a statement and its type, as SQL writes it.
type ParameterInfo struct {
	Name, Type string
}

// IntrospectRequest asks for the catalog, less what Hide says.
type IntrospectRequest struct {
	Hide          []string
	TimeoutMillis int64
	// Coarse rounds estimates to one digit and hides small ones.
	Coarse bool
	// Known are fingerprints by schema: one that is the same is not sent.
	Known map[string][]byte
}

// IntrospectedReply is how it ended.
type IntrospectedReply struct {
	Error *Error
}

// CheckResult is one line of a check.
type CheckResult struct {
	Name, Result, Message, Remedy string
}

// CheckedReply is the answer to Check.
type CheckedReply struct {
	Checks []CheckResult
}

// Clip cuts text to at most n bytes at a character's edge.
func Clip(text string, n int) string {
	if len(text) <= n {
		return text
	}
	for n > 0 && text[n]&0xc0 == 0x80 {
		n--
	}
	return text[:n]
}

// PutHeader writes a frame's header to b, which has HeaderSize bytes.
func PutHeader(b []byte, t Type, size int) {
	b[0] = byte(t)
	binary.BigEndian.PutUint32(b[1:], uint32(size))
}

// ProgressRows is the number in a Progress frame's payload.
func ProgressRows(payload []byte) uint64 {
	if len(payload) != 8 {
		return 0
	}
	return binary.BigEndian.Uint64(payload)
}

// KeptHeader is what stands before the stream in a Kept frame's payload, in bytes.
const KeptHeader = 12

// PutKept writes how many first and last rows a Kept frame has, and how many
// values were cut.
func PutKept(b []byte, first, last, cut int) {
	for i, n := range []int{first, last, cut} {
		binary.BigEndian.PutUint32(b[4*i:], uint32(n))
	}
}

// KeptRows is the reverse of PutKept.
func KeptRows(payload []byte) (first, last, cut uint32, stream []byte, err error) {
	if len(payload) < KeptHeader {
		return 0, 0, 0, nil, fmt.Errorf("%w: %q with %d bytes", ErrMalformed, Kept, len(payload))
	}
	return binary.BigEndian.Uint32(payload), binary.BigEndian.Uint32(payload[4:]), binary.BigEndian.Uint32(payload[8:]), payload[KeptHeader:], nil
}

// Encode returns a whole frame; payload is a struct for JSON, a []byte, or nil.
func Encode(t Type, payload any) ([]byte, error) {
	var body []byte
	switch p := payload.(type) {
	case nil:
	case []byte:
		body = p
	default:
		var err error
		if body, err = json.Marshal(p); err != nil {
			return nil, err
		}
	}
	if len(body) > limits[t] {
		return nil, fmt.Errorf("%w: %q with %d bytes", ErrMalformed, t, len(body))
	}
	b := make([]byte, HeaderSize+len(body))
	PutHeader(b, t, len(body))
	copy(b[HeaderSize:], body)
	return b, nil
}

// Reader reads frames. Payloads of Data frames are handed out piecemeal.
type Reader struct {
	src  io.Reader
	buf  []byte
	r, w int
	// left is how much of the payload of the frame at hand was not read yet.
	left int
}

// NewReader makes a Reader with a buffer of its own, which is the whole of its
// memory but for the frames that ReadJSON decodes.
func NewReader(src io.Reader) *Reader {
	return &Reader{src: src, buf: make([]byte, MaxData+HeaderSize)}
}

// Next returns the type of the next frame; what is left of the one before is
// passed over.
func (d *Reader) Next() (Type, error) {
	for d.left > 0 {
		if _, err := d.Chunk(); err != nil {
			return 0, err
		}
	}
	for d.w-d.r < HeaderSize {
		if err := d.fill(); err != nil {
			if err == io.EOF && d.w > d.r {
				err = io.ErrUnexpectedEOF
			}
			return 0, err
		}
	}
	t := Type(d.buf[d.r])
	size := binary.BigEndian.Uint32(d.buf[d.r+1:])
	limit, ok := limits[t]
	if !ok {
		return 0, fmt.Errorf("%w: unknown type %#x", ErrMalformed, byte(t))
	}
	if int64(size) > int64(limit) {
		return 0, fmt.Errorf("%w: %q with %d bytes", ErrMalformed, byte(t), size)
	}
	d.r += HeaderSize
	d.left = int(size)
	return t, nil
}

// Left is how many bytes of the payload were not read yet.
func (d *Reader) Left() int { return d.left }

// Chunk returns some of what is left of the payload, at least one byte, valid
// until the next call; nil when nothing is left.
func (d *Reader) Chunk() ([]byte, error) {
	if d.left == 0 {
		return nil, nil
	}
	if d.w == d.r {
		if err := d.fill(); err != nil {
			return nil, unexpected(err)
		}
	}
	n := min(d.left, d.w-d.r)
	chunk := d.buf[d.r : d.r+n]
	d.r += n
	d.left -= n
	return chunk, nil
}

// Bytes returns a copy of what is left of the payload.
func (d *Reader) Bytes() ([]byte, error) {
	payload := make([]byte, 0, d.left)
	for d.left > 0 {
		chunk, err := d.Chunk()
		if err != nil {
			return nil, err
		}
		payload = append(payload, chunk...)
	}
	return payload, nil
}

// JSON decodes the payload into v.
func (d *Reader) JSON(v any) error {
	payload := make([]byte, 0, min(d.left, 64<<10))
	for d.left > 0 {
		chunk, err := d.Chunk()
		if err != nil {
			return err
		}
		payload = append(payload, chunk...)
	}
	// The payload may hold a password: its copy does not outlive this call.
	defer clear(payload)
	if err := json.Unmarshal(payload, v); err != nil {
		return fmt.Errorf("%w: payload is not what its type says", ErrMalformed)
	}
	return nil
}

// fill reads at least one byte more.
func (d *Reader) fill() error {
	if d.r > 0 && d.r == d.w {
		d.r, d.w = 0, 0
	}
	if d.w == len(d.buf) {
		copy(d.buf, d.buf[d.r:d.w])
		d.w -= d.r
		d.r = 0
	}
	n, err := d.src.Read(d.buf[d.w:])
	d.w += n
	if n > 0 {
		return nil
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}

func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
