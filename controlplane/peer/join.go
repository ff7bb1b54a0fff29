package peer

import (
	"io"
	"net"
)

// Join copies between a forwarded connection and a client's, whose first bytes may have been
// read into early, until either ends; then it closes both.
func Join(forwarded, client net.Conn, early io.Reader) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := buffers.Get().(*[]byte)
		defer buffers.Put(b)
		_, _ = io.CopyBuffer(onlyWriter{forwarded}, onlyReader{early}, *b)
		_ = forwarded.Close()
		_ = client.Close()
	}()
	b := buffers.Get().(*[]byte)
	_, _ = io.CopyBuffer(onlyWriter{client}, onlyReader{forwarded}, *b)
	buffers.Put(b)
	_ = client.Close()
	_ = forwarded.Close()
	<-done
}
