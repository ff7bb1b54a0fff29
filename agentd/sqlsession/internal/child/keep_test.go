package child

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/jackc/pgx/v5/pgproto3"
)

// BenchmarkKeep is what it costs to keep rows of a big result.
func BenchmarkKeep(b *testing.B) {
	const rows = 100_000
	r := rand.New(rand.NewPCG(1, 2))
	server := prepared(allOIDs...)
	for range rows {
		server = append(server, encode(&pgproto3.DataRow{Values: randomRow(r)})...)
	}
	server = append(server, finale...)
	for _, keep := range []int{0, 100, 1000} {
		b.Run(fmt.Sprint(keep), func(b *testing.B) {
			request := running
			request.KeepFirst, request.KeepLast = keep, keep
			b.SetBytes(int64(len(server)))
			for b.Loop() {
				if got := replay(b, server, request); got.done.Rows != rows {
					b.Fatalf("got %+v", got.done)
				}
			}
		})
	}
}
