package adversary

import (
	"bytes"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/apache/arrow-go/v18/arrow/ipc"
	"google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/agentd/sqlsession"
	posternproto "github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// The expectations of a statement.
const (
	// refused: POLICY_DENIED before it reached the database.
	refused = "refused"
	// fails: an error of any kind; for what PostgreSQL itself refuses.
	fails = "fails"
	// harmless: it may run or be refused, and does no harm.
	harmless = "harmless"
	// runs: it must work. A guard that refuses everything is no use.
	runs = "runs"
)

// attack is one statement of a corpus.
type attack struct {
	line   int
	expect string
	why    string
	sql    string
}

// corpus reads a file of testdata. Each statement is preceded by a line
//
//	--# EXPECTATION why
//
// and goes on to the next such line, less one line break.
//
// Marks such as @SENTINEL@ are left for world.fill.
func corpus(t *testing.T, path string) []attack {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var all []attack
	for i, line := range strings.SplitAfter(string(text), "\n") {
		if head, ok := strings.CutPrefix(line, "--# "); ok {
			expect, why, _ := strings.Cut(strings.TrimSpace(head), " ")
			switch expect {
			case refused, fails, harmless, runs:
			default:
				t.Fatalf("%s:%d: unknown expectation %q", path, i+1, expect)
			}
			all = append(all, attack{line: i + 1, expect: expect, why: why})
			continue
		}
		if len(all) == 0 {
			if strings.TrimSpace(line) != "" && !strings.HasPrefix(line, "--") {
				t.Fatalf("%s:%d: a statement without expectation", path, i+1)
			}
			continue
		}
		all[len(all)-1].sql += line
	}
	for i := range all {
		sql, _, _ := strings.Cut(all[i].sql, "\n\n-- ") // the next section's comment
		all[i].sql = strings.TrimSuffix(sql, "\n")
		if all[i].why == "" || all[i].sql == "" {
			t.Fatalf("%s:%d: no reason or no statement", path, all[i].line)
		}
	}
	return all
}

// answer is all that comes out of a statement.
type answer struct {
	err    error
	code   posternproto.Code
	stream []byte
	kept   *posternv1.KeptRows
	out    *posternv1.QueryOutcome
	rows   []string // decoded: the columns' names first
	log    string
}

// warm is done once the parser has answered.
var warm sync.Once

// waitForParser runs a statement until the parser that all tests share has started,
// which takes a busy machine longer than a statement may take.
func waitForParser(t *testing.T, m *sqlsession.Manager, source string) {
	t.Helper()
	// Long texts have a parser of their own.
	for _, sql := range []string{"SELECT 1", "SELECT 1" + strings.Repeat(", 1", 10_000)} {
		for deadline := time.Now().Add(2 * time.Minute); ; {
			_, err := m.Run(t.Context(), sqlsession.Request{QueryID: queryID(), Source: source, Owner: "tok_warm", SQL: sql}, io.Discard)
			if posternproto.CodeOf(err) != posternproto.CodeUnavailable && posternproto.CodeOf(err) != posternproto.CodeTimeout {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal(err)
			}
		}
	}
}

// endless are in statements that only their time limit ends.
var endless = []string{"generate_series(1, 100000000) i", "generate_series(1, 100000) a", "SELECT i + 1 FROM r) SELECT", "app.readings b, app.readings c"}

// ask runs a statement and keeps all that comes out.
func ask(t *testing.T, m *sqlsession.Manager, log *lockedBuffer, source, sql string, readWrite bool) answer {
	t.Helper()
	warm.Do(func() { waitForParser(t, m, source) })
	log.take()
	var a answer
	var stream bytes.Buffer
	timeout := 30 * time.Second
	if slices.ContainsFunc(endless, func(word string) bool { return strings.Contains(sql, word) }) {
		timeout = 2 * time.Second
	}
	request := sqlsession.Request{
		QueryID: queryID(), Source: source, Owner: "tok_adversary", SQL: sql, ReadWrite: readWrite,
		Timeout: timeout, KeepFirst: 100, KeepLast: 100, Kept: func(k *posternv1.KeptRows) { a.kept = k },
	}
	for range 3 {
		stream.Reset()
		a.out, a.err = m.Run(t.Context(), request, &stream)
		// A parser that died of the last statement is on its way back.
		if a.code = posternproto.CodeOf(a.err); a.code != posternproto.CodeUnavailable {
			break
		}
	}
	a.stream = stream.Bytes()
	a.rows = decode(t, a.stream)
	if a.kept != nil {
		a.rows = append(a.rows, decode(t, a.kept.Arrow)...)
	}
	a.log = log.take()
	return a
}

// decode renders an Arrow stream as lines, schema first.
func decode(t *testing.T, stream []byte) []string {
	t.Helper()
	if len(stream) == 0 {
		return nil
	}
	r, err := ipc.NewReader(bytes.NewReader(stream))
	if err != nil {
		t.Fatalf("decode %d bytes: %v", len(stream), err)
	}
	defer r.Release()
	lines := []string{r.Schema().String()}
	for r.Next() {
		record := r.RecordBatch()
		for i := range int(record.NumRows()) {
			var line strings.Builder
			for j := range int(record.NumCols()) {
				line.WriteString(record.Column(j).ValueStr(i) + "|")
			}
			lines = append(lines, line.String())
		}
	}
	if r.Err() != nil {
		t.Fatalf("decode: %v", r.Err())
	}
	return lines
}

// plain is the answer as text, for the search for canaries and the comparison of
// two worlds: everything but what differs from run to run.
func (a answer) plain() string {
	out := proto.Clone(a.out).(*posternv1.QueryOutcome)
	// How many bytes the same rows take depends on when they came: on their batches.
	out.QueryId, out.Duration, out.Bytes = "", nil, 0
	var text strings.Builder
	text.WriteString(out.String())
	if a.err != nil {
		text.WriteString("\n" + a.err.Error())
	}
	text.WriteString("\n" + strings.Join(a.rows, "\n"))
	return text.String()
}

// judge holds an answer against the expectation.
func (a attack) judge(got answer) string {
	switch a.expect {
	case refused:
		if got.code != posternproto.CodePolicyDenied {
			return "not refused by policy: " + got.verdict()
		}
	case fails:
		if got.err == nil {
			return "it ran"
		}
	case runs:
		if got.err != nil {
			return "it does not run: " + got.err.Error()
		}
	}
	if got.err != nil && strings.Contains(got.err.Error(), "\n") {
		return "the error has more than one line"
	}
	return ""
}

func (a answer) verdict() string {
	if a.err == nil {
		return "it ran"
	}
	return a.err.Error()
}
