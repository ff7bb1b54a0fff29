package upgrade

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

var kind = Kind{Path: "/stream", Protocol: "test/1", MaxRequest: 100}

type server struct{ url string }

// Do implements Doer.
func (s server) Do(r *http.Request) (*http.Response, error) {
	r.URL.Host, r.Host = strings.TrimPrefix(s.url, "http://"), ""
	return http.DefaultTransport.RoundTrip(r)
}

func serve(t *testing.T, f http.HandlerFunc) server {
	s := httptest.NewServer(f)
	t.Cleanup(func() {
		s.Close()
		http.DefaultTransport.(*http.Transport).CloseIdleConnections()
	})
	return server{s.URL}
}

func TestBothDirections(t *testing.T) {
	agent := serve(t, func(w http.ResponseWriter, r *http.Request) {
		var m posternv1.WireRequest
		if err := kind.ReadRequest(w, r, &m); err != nil {
			proto.WriteHTTPError(w, err)
			return
		}
		conn, err := kind.Accept(w)
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		_, _ = io.WriteString(conn, m.SessionId+" ")
		_, _ = io.Copy(conn, io.LimitReader(conn, 4))
	})
	stream, err := kind.Dial(t.Context(), agent, &posternv1.WireRequest{SessionId: "one"})
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	if _, err := io.WriteString(stream, "ping"); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(stream); string(got) != "one ping" || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
}

// A client that does not wait for the answer loses nothing of what it sent.
func TestEarlyBytesAreKept(t *testing.T) {
	agent := serve(t, func(w http.ResponseWriter, r *http.Request) {
		var m posternv1.WireRequest
		if err := kind.ReadRequest(w, r, &m); err != nil {
			proto.WriteHTTPError(w, err)
			return
		}
		conn, err := kind.Accept(w)
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		_, _ = io.Copy(conn, io.LimitReader(conn, 5))
	})
	conn, err := net.Dial("tcp", strings.TrimPrefix(agent.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(time.Minute))
	if _, err := io.WriteString(conn, "POST /stream HTTP/1.1\r\nHost: x\r\nUpgrade: test/1\r\nConnection: Upgrade\r\nContent-Length: 0\r\n\r\nearly"); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(conn)
	if _, rest, _ := strings.Cut(string(got), "\r\n\r\n"); rest != "early" || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestRefusals(t *testing.T) {
	agent := serve(t, func(w http.ResponseWriter, r *http.Request) {
		err := kind.ReadRequest(w, r, &posternv1.WireRequest{})
		if err == nil {
			err = proto.Errorf(proto.CodePolicyDenied, "not you")
		}
		proto.WriteHTTPError(w, err)
	})
	other := kind
	other.Protocol = "other/1"
	long := kind
	long.MaxRequest = 1000
	for _, c := range []struct {
		name    string
		kind    Kind
		session string
		code    posternv1.ErrorCode
		text    string
	}{
		{"the host says no", kind, "one", proto.CodePolicyDenied, "not you"},
		{"too large to send", kind, strings.Repeat("x", 101), proto.CodeBodyTooLarge, "more than 100"},
		{"too large to take", long, strings.Repeat("x", 101), proto.CodeBodyTooLarge, "more than 100"},
		{"another protocol", other, "one", proto.CodeInvalid, "test/1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			stream, err := c.kind.Dial(t.Context(), agent, &posternv1.WireRequest{SessionId: c.session})
			if err == nil {
				_ = stream.Close()
			}
			if proto.CodeOf(err) != c.code || !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %v, want %v with %q", err, c.code, c.text)
			}
		})
	}
	w := httptest.NewRecorder()
	r := httptest.NewRequest(http.MethodPost, "/stream", strings.NewReader("\xff\xff"))
	r.Header.Set("Upgrade", "Test/1")
	if err := kind.ReadRequest(w, r, &posternv1.WireRequest{}); err == nil || !strings.Contains(err.Error(), "not a WireRequest") {
		t.Errorf("what is no message: %v", err)
	}
}
