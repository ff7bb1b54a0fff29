package host

import (
	"net/http"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

func (b *bench) introspect(t *testing.T, r *posternv1.IntrospectRequest) (pages int, err error) {
	t.Helper()
	stream, err := posternv1connect.NewHostServiceClient(http.DefaultClient, b.url).Introspect(t.Context(), connect.NewRequest(r))
	if err != nil {
		return 0, proto.FromConnect(err)
	}
	defer stream.Close() //nolint:errcheck // read to its end
	for stream.Receive() {
		pages++
	}
	if err := stream.Err(); err != nil {
		return pages, proto.FromConnect(err)
	}
	return pages, nil
}

func TestIntrospect(t *testing.T) {
	b := newBench(t, nil)
	pages, err := b.introspect(t, &posternv1.IntrospectRequest{Source: "open", Principal: principal})
	if pages != 2 || err != nil {
		t.Errorf("%d pages, %v", pages, err)
	}
	if got := b.audit.actions(); got != "source.introspect.begin, source.introspect done" {
		t.Errorf("recorded %s", got)
	}
	if last := b.audit.entries[1]; last.Rows != 1 || last.Bytes == 0 || last.Actor != "token ci" || last.Source != "open" {
		t.Errorf("recorded %+v", last)
	}
	for _, c := range []struct {
		source string
		code   proto.Code
	}{{"closed", proto.CodePolicyDenied}, {"nobody", proto.CodeNotFound}} {
		if _, err := b.introspect(t, &posternv1.IntrospectRequest{Source: c.source}); proto.CodeOf(err) != c.code {
			t.Errorf("%s: %v", c.source, err)
		}
	}
	_, err = b.introspect(t, &posternv1.IntrospectRequest{Source: "open", Known: []*posternv1.CatalogSchema{{Name: strings.Repeat("x", 1<<20)}}})
	if proto.CodeOf(err) != proto.CodeSourceUnreachable {
		t.Errorf("got %v", err)
	}
	if got := b.audit.actions(); !strings.HasSuffix(got, "source.introspect denied, source.introspect.begin, source.introspect failed") {
		t.Errorf("recorded %s", got)
	}
	before := len(b.audit.entries)
	b.audit.set(proto.Errorf(proto.CodeStorageFull, "the disk is full"))
	if pages, err := b.introspect(t, &posternv1.IntrospectRequest{Source: "open"}); pages != 0 || proto.CodeOf(err) != proto.CodeStorageFull {
		t.Errorf("without a log: %d pages, %v", pages, err)
	}
	if len(b.audit.entries) != before {
		t.Error("something was recorded")
	}
}
