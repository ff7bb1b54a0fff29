package proto

import (
	"context"
	"errors"
	"fmt"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	gproto "google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// TestCodesAreMapped walks every code of error.proto.
func TestCodesAreMapped(t *testing.T) {
	for number, name := range posternv1.ErrorCode_name {
		code := Code(number)
		m, ok := mappings[code]
		if code == posternv1.ErrorCode_ERROR_CODE_UNSPECIFIED {
			if ok {
				t.Errorf("%s must not be mapped", name)
			}
			continue
		}
		if !ok || m.http < 400 || m.connect == 0 || m.exit == 0 || m.public == "" || strings.Contains(m.public, "\n") {
			t.Errorf("%s has no whole mapping: %+v", name, m)
			continue
		}
		t.Run(name, func(t *testing.T) {
			err := fmt.Errorf("while testing: %w", &Error{Code: code, Message: "what, where", SQL: &posternv1.SQLErrorDetail{Sqlstate: "42601", Position: 7}})
			for way, back := range map[string]error{"connect": FromConnect(overConnect(err)), "http": overHTTP(err)} {
				if CodeOf(back) != code || back.Error() != "what, where" {
					t.Errorf("%s: got %v %q", way, CodeOf(back), back)
				}
				var e *Error
				if !errors.As(back, &e) || e.SQL.GetPosition() != 7 {
					t.Errorf("%s: the SQL detail was lost", way)
				}
			}
			if ExitCode(err) != m.exit {
				t.Errorf("exit code %d, want %d", ExitCode(err), m.exit)
			}
		})
	}
}

func overConnect(err error) error { return ConnectError(err) }

func overHTTP(err error) error {
	rec := httptest.NewRecorder()
	WriteHTTPError(rec, err)
	return ReadHTTPError(rec.Result())
}

func TestPrivateTextStays(t *testing.T) {
	err := errors.New("open /etc/postern/warehouse.pw: hunter2")
	for _, got := range []error{overConnect(err), overHTTP(err)} {
		if strings.Contains(got.Error(), "hunter2") {
			t.Errorf("sent %q", got)
		}
	}
	coded := &Error{Code: CodeSourceConfig, Message: "source warehouse is misconfigured", Err: err}
	if d := Detail(coded); strings.Contains(d.String(), "hunter2") {
		t.Errorf("sent %v", d)
	}
	if !errors.Is(coded, err) {
		t.Error("the cause is lost for the log")
	}
}

func TestCodeOf(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want Code
	}{
		{nil, 0},
		{context.Canceled, CodeCancelled},
		{fmt.Errorf("x: %w", context.DeadlineExceeded), CodeTimeout},
		{errors.New("x"), CodeInternal},
		{Errorf(CodeNotFound, "agent %s: %w", "a", errors.New("x")), CodeNotFound},
		{connect.NewError(connect.CodeInternal, errors.New("x")), CodeInternal},
	} {
		if got := CodeOf(tt.err); got != tt.want {
			t.Errorf("CodeOf(%v) = %v, want %v", tt.err, got, tt.want)
		}
	}
}

func TestForeignErrorPage(t *testing.T) {
	rec := httptest.NewRecorder()
	rec.Header().Set("Content-Type", "text/html")
	rec.WriteHeader(502)
	rec.WriteString("<html>Bad Gateway\n\n</html>")
	err := ReadHTTPError(rec.Result())
	if !strings.Contains(err.Error(), "502") || strings.Contains(err.Error(), "\n") || ExitCode(err) == 0 {
		t.Errorf("got %q", err)
	}
}

func TestOutcome(t *testing.T) {
	o := &posternv1.QueryOutcome{
		QueryId: "q", Rows: 1 << 60, Duration: durationpb.New(time.Second),
		Error: &posternv1.ErrorDetail{Code: CodeSQL, Message: "relation \"é😀\n\x7f\" does not exist", Sql: &posternv1.SQLErrorDetail{Sqlstate: "42P01"}},
	}
	text := EncodeOutcome(o)
	for _, r := range text {
		if r < ' ' || r > '~' {
			t.Fatalf("%q has %q", text, r)
		}
	}
	back, err := DecodeOutcome(text)
	if err != nil {
		t.Fatal(err)
	}
	if !gproto.Equal(o, back) {
		t.Errorf("got %v, want %v", back, o)
	}
	for range 1000 {
		o.Notices = append(o.Notices, &posternv1.Notice{Message: strings.Repeat("n", 200)})
	}
	o.Error.Message = strings.Repeat("é", 100000)
	text = EncodeOutcome(o)
	if len(text) > maxOutcome {
		t.Errorf("%d bytes, more than %d", len(text), maxOutcome)
	}
	if back, err = DecodeOutcome(text); err != nil || back.Rows != 1<<60 || back.Error.Code != CodeSQL || len(back.Notices) == 0 {
		t.Errorf("got %v, %v", back, err)
	}
	for _, bad := range []string{"", "{", "[]", strings.Repeat(" ", 1<<20)} {
		if _, err := DecodeOutcome(bad); err == nil {
			t.Errorf("accepted %.20q", bad)
		}
	}
}

func FuzzDecodeOutcome(f *testing.F) {
	f.Add(`{"rows":"5"}`)
	f.Fuzz(func(t *testing.T, text string) {
		if o, err := DecodeOutcome(text); err == nil {
			if _, err := DecodeOutcome(EncodeOutcome(o)); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func TestNewIDSortsByTime(t *testing.T) {
	a := NewID(AgentPrefix)
	time.Sleep(2 * time.Millisecond) // the clock itself is what is tested
	b := NewID(AgentPrefix)
	if len(a) != 30 || a >= b {
		t.Errorf("%s, %s", a, b)
	}
}

func TestNegotiate(t *testing.T) {
	v := func(major, minor uint32) *posternv1.ProtocolVersion {
		return &posternv1.ProtocolVersion{Major: major, Minor: minor, Software: "test"}
	}
	for _, tt := range []struct {
		ours, peer *posternv1.ProtocolVersion
		minor      uint32
		older      string
	}{
		{v(1, 3), v(1, 3), 3, ""},
		{v(1, 3), v(1, 2), 2, ""},
		{v(1, 3), v(1, 4), 3, ""},
		{v(1, 3), v(1, 1), 0, "upgrade the peer"},
		{v(1, 3), v(1, 5), 0, "upgrade this side"},
		{v(1, 0), v(2, 0), 0, "upgrade this side"},
		{v(1, 0), nil, 0, "upgrade the peer"},
	} {
		got, err := negotiate(tt.ours, tt.peer)
		if tt.older != "" {
			if CodeOf(err) != CodeVersionMismatch || !strings.Contains(err.Error(), tt.older) {
				t.Errorf("%v and %v: got %v, want %q", tt.ours, tt.peer, err, tt.older)
			}
			continue
		}
		if err != nil || got.Minor != tt.minor {
			t.Errorf("%v and %v: got %v, %v", tt.ours, tt.peer, got, err)
		}
	}
}

// TestGeneratedCodeIsFresh runs the generators and compares.
func TestGeneratedCodeIsFresh(t *testing.T) {
	out := t.TempDir()
	cmd := exec.Command("go", "run", "./proto/internal/protogen", "-out", out)
	cmd.Dir = ".."
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	var fresh []string
	err := filepath.WalkDir(out, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			fresh = append(fresh, path)
		}
		return err
	})
	if err != nil || len(fresh) < 7 {
		t.Fatalf("%d files, %v", len(fresh), err)
	}
	for _, path := range fresh {
		rel, _ := filepath.Rel(out, path)
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(rel)
		if err != nil || string(got) != string(want) {
			t.Errorf("proto/%s is stale: run make proto (%v)", rel, err)
		}
	}
}
