package tunnel_test

import (
	"context"
	"io"
	"testing"

	"github.com/postern-dev/postern/tunnel"
	"github.com/postern-dev/postern/tunnel/tunneltest"
)

// BenchmarkBulk moves bytes from the dialer to the acceptor.
func BenchmarkBulk(b *testing.B) {
	for _, class := range []tunnel.Class{tunnel.Bulk, tunnel.Solo} {
		for _, size := range []int{1 << 10, 64 << 10} {
			b.Run(class.String()+"/"+map[int]string{1 << 10: "1KiB", 64 << 10: "64KiB"}[size], func(b *testing.B) {
				d, a := tunneltest.Pair(b)
				done := make(chan struct{})
				go func() {
					defer close(done)
					c, err := a.Listener().Accept()
					if err != nil {
						return
					}
					buf := make([]byte, 64<<10)
					for {
						if _, err := c.Read(buf); err != nil {
							_ = c.Close()
							return
						}
					}
				}()
				c, err := d.Open(context.Background(), class)
				if err != nil {
					b.Fatal(err)
				}
				buf := make([]byte, size)
				b.SetBytes(int64(size))
				for b.Loop() {
					if _, err := c.Write(buf); err != nil {
						b.Fatal(err)
					}
				}
				_ = c.Close()
				<-done
			})
		}
	}
}

// BenchmarkOpenEcho opens a stream, exchanges 64 bytes and closes it.
func BenchmarkOpenEcho(b *testing.B) {
	for _, class := range []tunnel.Class{tunnel.Control, tunnel.Bulk} {
		b.Run(class.String(), func(b *testing.B) {
			d, a := tunneltest.Pair(b)
			echoOn(b, a)
			buf := make([]byte, 64)
			for b.Loop() {
				c, err := d.Open(context.Background(), class)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := c.Write(buf); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(c, buf); err != nil {
					b.Fatal(err)
				}
				_ = c.Close()
			}
		})
	}
}
