package bucket

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"gocloud.dev/blob/memblob"

	"github.com/postern-dev/postern/proto"
)

func TestValidName(t *testing.T) {
	for name, want := range map[string]bool{
		"a": true, "a b": true, "ü": true, ".hidden": true, "...": true, "__init__": true, "a__0x": true, strings.Repeat("n", 255): true,
		"": false, ".": false, "..": false, "a/b": false, "a\nb": false, "a\x00": false, "\x7f": false, "a\xff": false,
		"__0x2f__": false, "x__0x2e__": false, strings.Repeat("n", 256): false,
	} {
		if got := ValidName(name); got != want {
			t.Errorf("%.20q: %v", name, got)
		}
	}
}

// remotes are the same bucket by itself and by agentd's socket.
func remotes(t *testing.T, s *Store) map[string]Remote {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: Handler(func(_ context.Context, name string) (*Store, func(), error) {
		if name != "test" {
			return nil, nil, proto.Errorf(proto.CodePolicyDenied, "no such bucket")
		}
		return s, func() {}, nil
	})}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = server.Serve(l)
	}()
	client := Dial(socket, "test")
	t.Cleanup(func() {
		client.Close()
		server.Close()
		<-served
	})
	other := Dial(socket, "other")
	defer other.Close()
	if _, err := other.Head(t.Context(), "a"); !Denied(err) {
		t.Errorf("another bucket: %v", err)
	}
	return map[string]Remote{"store": s, "client": client}
}

// suite is what every Remote does, on an empty bucket. put makes an object past it.
func suite(t *testing.T, r Remote, put func(key, content string)) {
	ctx := t.Context()
	write := func(key, content string) Object {
		t.Helper()
		o, err := r.Write(ctx, key, strings.NewReader(content), int64(len(content)))
		if err != nil {
			t.Fatal(err)
		}
		if o.Key != key || o.Size != int64(len(content)) || o.ETag == "" || o.Modified.IsZero() {
			t.Errorf("written: %+v", o)
		}
		return o
	}
	if _, err := r.Head(ctx, "none"); !NotFound(err) {
		t.Errorf("head of nothing: %v", err)
	}
	if err := r.Delete(ctx, "none"); err != nil {
		t.Errorf("delete of nothing: %v", err)
	}
	first := write("d/a b+ü%20", "0123456789")
	var out bytes.Buffer
	if err := r.Read(ctx, first.Key, first.ETag, 3, 4, &out); err != nil || out.String() != "3456" {
		t.Errorf("read: %q, %v", out.String(), err)
	}
	if err := r.Read(ctx, first.Key, first.ETag, 8, 5, &out); err == nil {
		t.Error("a read beyond the end")
	}
	second := write("d/a b+ü%20", "another one")
	if err := r.Read(ctx, first.Key, first.ETag, 0, 4, &out); !Changed(err) {
		t.Errorf("read of a version that is gone: %v", err)
	}
	if o, err := r.Copy(ctx, "copy", second.Key); err != nil || o.Size != second.Size {
		t.Errorf("copy: %+v, %v", o, err)
	}
	if _, err := r.Copy(ctx, "copy", "none"); !NotFound(err) {
		t.Errorf("copy of nothing: %v", err)
	}
	big := strings.Repeat("0123456789abcdef", (2*partSize+5<<20)/16)
	o := write("d/big", big)
	out.Reset()
	if err := r.Read(ctx, o.Key, o.ETag, 0, o.Size, &out); err != nil || out.String() != big {
		t.Errorf("a large object: %d bytes, %v", out.Len(), err)
	}
	write("d/sub/", "")
	for i := range 5 {
		write(fmt.Sprintf("d/n/%d", i), "x")
	}
	for key := range map[string]bool{"d//x": true, "d/..": true, "d/../x": true, "d/./x": true, "d/" + strings.Repeat("l", 300): true} {
		put(key, "hostile")
		if _, err := r.Write(ctx, key, strings.NewReader(""), 0); proto.CodeOf(err) != proto.CodeInvalid {
			t.Errorf("write of %.20q: %v", key, err)
		}
	}
	var names []string
	hidden := 0
	for token, n := "", 0; ; n++ {
		p, err := r.List(ctx, "d/", token, 2)
		if err != nil || len(p.Entries) > 2 || n > 20 {
			t.Fatalf("list: %+v, %v", p, err)
		}
		for _, e := range p.Entries {
			name := e.Name
			if e.Directory {
				name += "/"
			} else if e.Object.Key != "d/"+e.Name || e.Object.Modified.IsZero() {
				t.Errorf("listed: %+v", e)
			}
			names = append(names, name)
		}
		hidden += p.Hidden
		if token = p.Next; token == "" {
			break
		}
	}
	if got := strings.Join(names, "|"); got != "a b+ü%20|big|n/|sub/" || hidden < 3 {
		t.Errorf("listed %s, %d hidden", got, hidden)
	}
	if p, err := r.List(ctx, "d/sub/", "", 1); err != nil || len(p.Entries) > 0 || !p.Marker {
		t.Errorf("a directory's own object: %+v, %v", p, err)
	}
	if p, err := r.List(ctx, "nowhere/", "", 1); err != nil || len(p.Entries)+p.Hidden > 0 || p.Marker {
		t.Errorf("nothing: %+v, %v", p, err)
	}
	if err := r.Delete(ctx, "d/big"); err != nil {
		t.Error(err)
	}
	if _, err := r.Head(ctx, "d/big"); !NotFound(err) {
		t.Errorf("after delete: %v", err)
	}
}

func TestMemory(t *testing.T) {
	for _, kind := range []string{"store", "client"} {
		t.Run(kind, func(t *testing.T) {
			b := memblob.OpenBucket(nil)
			s := newStore(b, Config{Name: "test"})
			t.Cleanup(func() { s.Close() })
			suite(t, remotes(t, s)[kind], func(key, content string) {
				if err := b.WriteAll(t.Context(), key, []byte(content), nil); err != nil {
					t.Fatal(err)
				}
			})
		})
	}
}

func TestReadOnly(t *testing.T) {
	s := newStore(memblob.OpenBucket(nil), Config{Name: "test", ReadOnly: true})
	defer s.Close()
	_, werr := s.Write(t.Context(), "k", strings.NewReader("x"), 1)
	_, cerr := s.Copy(t.Context(), "k", "l")
	for _, err := range []error{werr, cerr, s.Delete(t.Context(), "k")} {
		if !Denied(err) {
			t.Errorf("a change of a read-only bucket: %v", err)
		}
	}
}
