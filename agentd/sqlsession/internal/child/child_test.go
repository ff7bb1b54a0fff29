package child

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/apache/arrow-go/v18/arrow/ipc"
	"github.com/jackc/pgx/v5/pgproto3"
	pgquery "github.com/pganalyze/pg_query_go/v6"
	"go.uber.org/goleak"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// script is a connection whose peer says what a test wrote down.
type script struct {
	io.Reader
	mu    sync.Mutex
	wrote bytes.Buffer
}

func (s *script) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.wrote.Write(p)
}

func (s *script) Close() error                     { return nil }
func (s *script) LocalAddr() net.Addr              { return &net.UnixAddr{} }
func (s *script) RemoteAddr() net.Addr             { return &net.UnixAddr{} }
func (s *script) SetDeadline(time.Time) error      { return nil }
func (s *script) SetReadDeadline(time.Time) error  { return nil }
func (s *script) SetWriteDeadline(time.Time) error { return nil }

// result is what came out of a statement whose server side is given.
type result struct {
	done   frame.DoneReply
	lost   bool
	stream []byte
}

// replay runs SELECT against a scripted server.
func replay(t testing.TB, server []byte, r frame.RunRequest) result {
	t.Helper()
	out := &script{}
	s := &session{wire: newWire(&script{Reader: bytes.NewReader(server)}, map[string]string{}), sink: newSink(out), network: "test", parser: known{}}
	st := newStatement(func(context.Context) error { return nil })
	done, lost := s.run(&r, st)
	st.finish()
	s.sink.flush()
	s.sink.close()
	res := result{done: done, lost: lost}
	d := frame.NewReader(&out.wrote)
	for {
		kind, err := d.Next()
		if err == io.EOF {
			return res
		}
		if err != nil {
			t.Fatal(err)
		}
		for kind == frame.Data && d.Left() > 0 {
			chunk, err := d.Chunk()
			if err != nil {
				t.Fatal(err)
			}
			res.stream = append(res.stream, chunk...)
		}
	}
}

func count(t testing.TB, stream []byte) (rows uint64) {
	t.Helper()
	if len(stream) == 0 {
		return 0
	}
	r, err := ipc.NewReader(bytes.NewReader(stream))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Release()
	for r.Next() {
		rows += uint64(r.RecordBatch().NumRows())
	}
	if r.Err() != nil {
		t.Fatal(r.Err())
	}
	return rows
}

// encode joins messages of a server.
func encode(messages ...pgproto3.BackendMessage) []byte {
	var b []byte
	for _, m := range messages {
		b, _ = m.Encode(b)
	}
	return b
}

// prepared is a server's part up to the rows.
func prepared(oids ...uint32) []byte {
	fields := make([]pgproto3.FieldDescription, len(oids))
	for i, oid := range oids {
		fields[i] = pgproto3.FieldDescription{Name: fmt.Appendf(nil, "c%d", i), DataTypeOID: oid, TypeModifier: -1}
	}
	return encode(
		&pgproto3.CommandComplete{CommandTag: []byte("BEGIN")}, &pgproto3.ReadyForQuery{TxStatus: 'T'},
		&pgproto3.ParseComplete{}, &pgproto3.ParameterDescription{}, &pgproto3.RowDescription{Fields: fields}, &pgproto3.ReadyForQuery{TxStatus: 'T'},
		&pgproto3.ParseComplete{}, &pgproto3.ReadyForQuery{TxStatus: 'T'},
		&pgproto3.BindComplete{},
	)
}

var (
	allOIDs = []uint32{20, 25, 16, 2950, 1184, 21, 23, 1082, 17}
	running = frame.RunRequest{SQL: "SELECT", MaxRows: 1 << 40, MaxBytes: 1 << 40, TimeoutMillis: 60_000}
	finale  = encode(&pgproto3.CommandComplete{CommandTag: []byte("SELECT 9")}, &pgproto3.ReadyForQuery{TxStatus: 'T'})
)

// randomRow makes a row for allOIDs; about one value in three is NULL.
func randomRow(r *rand.Rand) [][]byte {
	sizes := []int{8, r.IntN(40), 1, 16, 8, 2, 4, 4, r.IntN(9)}
	values := make([][]byte, len(sizes))
	for i, n := range sizes {
		if r.IntN(3) == 0 {
			continue
		}
		values[i] = make([]byte, n)
		for j := range values[i] {
			values[i][j] = byte('a' + r.IntN(20))
		}
	}
	return values
}

func TestNullsEverywhere(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, n := range []int{0, 1, 7, 8, 9, 1000, 5000} {
		server := prepared(allOIDs...)
		want := make([][][]byte, n)
		for i := range want {
			want[i] = randomRow(r)
			server = append(server, encode(&pgproto3.DataRow{Values: want[i]})...)
		}
		got := replay(t, append(server, finale...), running)
		if got.lost || got.done.Error != nil || got.done.Rows != uint64(n) {
			t.Fatalf("%d rows: got %+v", n, got.done)
		}
		reader, err := ipc.NewReader(bytes.NewReader(got.stream))
		if err != nil {
			t.Fatal(err)
		}
		row := 0
		for reader.Next() {
			batch := reader.RecordBatch()
			for i := range int(batch.NumRows()) {
				for j := range allOIDs {
					if isNull := want[row][j] == nil; batch.Column(j).IsNull(i) != isNull {
						t.Fatalf("row %d, column %d: got NULL %v, want %v", row, j, !isNull, isNull)
					}
				}
				if v := want[row][1]; v != nil && batch.Column(1).ValueStr(i) != string(v) {
					t.Fatalf("row %d: got %q, want %q", row, batch.Column(1).ValueStr(i), v)
				}
				if v := want[row][0]; v != nil && batch.Column(0).ValueStr(i) != fmt.Sprint(int64(binary.BigEndian.Uint64(v))) {
					t.Fatalf("row %d: got %s, want %d", row, batch.Column(0).ValueStr(i), binary.BigEndian.Uint64(v))
				}
				row++
			}
		}
		reader.Release()
		if row != n {
			t.Fatalf("got %d rows, want %d", row, n)
		}
	}
}

func TestBrokenServers(t *testing.T) {
	row := encode(&pgproto3.DataRow{Values: [][]byte{make([]byte, 8), []byte("x")}})
	two := prepared(20, 25)
	tests := []struct {
		name   string
		server []byte
		says   string
		lost   bool
	}{
		{"nothing", nil, "was lost", true},
		{"cut before the rows", two[:len(two)-30], "was lost", true},
		{"cut in the rows", append(bytes.Clone(two), row[:9]...), "was lost", false},
		{"too few columns", append(bytes.Clone(two), encode(&pgproto3.DataRow{Values: [][]byte{nil}})...), "wrong number of columns", false},
		{"short number", append(bytes.Clone(two), encode(&pgproto3.DataRow{Values: [][]byte{{1}, nil}})...), "does not keep to PostgreSQL's protocol", false},
		{"negative size", append(bytes.Clone(two), 'D', 0, 0, 0, 1), "does not keep to", false},
		{"huge size", append(bytes.Clone(two), 'Z', 0xff, 0, 0, 0), "does not keep to", false},
		{"unknown message", append(bytes.Clone(two), '?', 0, 0, 0, 4), "does not keep to", false},
		{"value beyond its row", append(bytes.Clone(two), 'D', 0, 0, 0, 10, 0, 2, 0x7f, 0, 0, 0), "cut off", false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got := replay(t, test.server, running)
			if got.done.Error == nil || !bytes.Contains([]byte(got.done.Error.Message), []byte(test.says)) || got.lost != test.lost {
				t.Fatalf("got %+v, lost %v, want %q, lost %v", got.done.Error, got.lost, test.says, test.lost)
			}
		})
	}
}

// FuzzServer feeds what a server may say while rows are expected.
func FuzzServer(f *testing.F) {
	r := rand.New(rand.NewPCG(3, 4))
	row := encode(&pgproto3.DataRow{Values: randomRow(r)})
	f.Add(bytes.Repeat(row, 3))
	f.Add(append(bytes.Clone(row), finale...))
	f.Add(encode(&pgproto3.NoticeResponse{Message: "n"}, &pgproto3.ParameterStatus{Name: "a", Value: "b"}, &pgproto3.ErrorResponse{Severity: "ERROR", Code: "57014"}, &pgproto3.ReadyForQuery{TxStatus: 'E'}))
	f.Add(encode(&pgproto3.CopyOutResponse{}, &pgproto3.CopyInResponse{}, &pgproto3.CopyData{Data: []byte("x")}, &pgproto3.EmptyQueryResponse{}))
	f.Add([]byte("D\x00\x10\x00\x00\x00\x09"))
	f.Fuzz(func(t *testing.T, server []byte) {
		request := running
		request.MaxRows, request.MaxBytes = 100, 100_000
		got := replay(t, append(prepared(allOIDs...), server...), request)
		if rows := count(t, got.stream); rows != got.done.Rows || rows > request.MaxRows {
			t.Fatalf("got %d rows in the stream, %d in the outcome", rows, got.done.Rows)
		}
		if uint64(len(got.stream)) > request.MaxBytes {
			t.Fatalf("got %d bytes, want at most %d", len(got.stream), request.MaxBytes)
		}
	})
}

// FuzzPrepare feeds what a server may say from the start.
func FuzzPrepare(f *testing.F) {
	f.Add(append(prepared(20, 25), finale...))
	f.Add(append(prepared(99999), finale...))
	f.Add(encode(&pgproto3.ErrorResponse{Severity: "FATAL", Code: "57P01"}))
	f.Fuzz(func(t *testing.T, server []byte) {
		got := replay(t, server, running)
		if rows := count(t, got.stream); rows != got.done.Rows {
			t.Fatalf("got %d rows in the stream, %d in the outcome", rows, got.done.Rows)
		}
	})
}

// known is a parser that knows one statement.
type known struct{}

// Parse implements pgtree.Parser.
func (known) Parse(_ context.Context, text string) (*pgtree.Tree, error) {
	one := &pgquery.Node{Node: &pgquery.Node_SelectStmt{SelectStmt: &pgquery.SelectStmt{}}}
	return &pgtree.Tree{Stmts: []*pgquery.RawStmt{{Stmt: one}}}, nil
}

func TestConnectErrorsAreOneLine(t *testing.T) {
	err := fmt.Errorf("outer: %w", errors.Join(errors.New("first\nline"), errors.New("second")))
	if got := connectError(err, "h:1").Error(); got != "what answers at h:1 is no PostgreSQL server that we understand: first line" {
		t.Errorf("got %q", got)
	}
}
