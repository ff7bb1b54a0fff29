package egress

import (
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
)

// BenchmarkBody compares a body of 16 MiB through the process with one that comes directly.
func BenchmarkBody(b *testing.B) {
	const size = 16 << 20
	data := make([]byte, size)
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "16777216")
		_, _ = w.Write(data)
	}))
	defer s.Close()
	c := New(Config{Name: "bench", UID: testUID, CAs: [][]byte{s.Certificate().Raw}})
	defer c.Close()
	for name, transport := range map[string]http.RoundTripper{"direct": s.Client().Transport, "egress": c} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(size)
			for b.Loop() {
				answer, err := (&http.Client{Transport: transport}).Get(s.URL)
				if err != nil {
					b.Fatal(err)
				}
				n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, answer.Body, make([]byte, 256<<10))
				_ = answer.Body.Close()
				if err != nil || n != size {
					b.Fatal(n, err)
				}
			}
		})
	}
}
