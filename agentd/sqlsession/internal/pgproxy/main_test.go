package pgproxy

import (
	"context"
	"fmt"
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/postern-dev/postern/e2e/leakwait"
	"github.com/postern-dev/postern/e2e/pgserver"
)

// pg is the package's server; the superuser runs everything: what is refused is
// refused by us.
var pg *pgserver.Server

func TestMain(m *testing.M) {
	var err error
	if pg, err = pgserver.Launch(context.Background(), pgserver.Options{Settings: map[string]string{"max_connections": "100"}}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	err = pg.SQL(context.Background(),
		"CREATE TABLE things (id int PRIMARY KEY, name text)",
		"INSERT INTO things SELECT i, 'thing ' || i FROM generate_series(1, 1000) i",
		"CREATE TABLE target (id int PRIMARY KEY)",
	)
	code := 1
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	} else {
		code = m.Run()
	}
	if err := pg.Stop(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	if code == 0 {
		leakwait.Wait()
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}
