package sqlsession_test

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/e2e/pgserver"
)

// TestLogin runs statements as users that are made for the sessions.
func TestLogin(t *testing.T) {
	createRole(t, "made_1", "one")
	createRole(t, "made_2", "two")
	var (
		asked, released atomic.Int32
		expiring        = make(chan struct{})
	)
	s := source("db")
	s.DSN = server.DSN("nobody", pgserver.Superuser)
	s.Login = func(context.Context) (sqlsession.Login, error) {
		n := asked.Add(1)
		l := sqlsession.Login{User: fmt.Sprintf("made_%d", n), Password: map[int32]string{1: "one", 2: "two"}[n], Release: func() { released.Add(1) }}
		if n == 1 {
			l.Expiring = expiring
		}
		return l, nil
	}
	m := sqlsession.New(sqlsession.Config{Warm: -1, IdleTimeout: 20 * time.Second, Logger: quietLog(t), Parser: parser})
	m.SetSources([]sqlsession.Source{s})
	who := func(want string) {
		t.Helper()
		if got, _ := query(t, m, request("SELECT current_user")); got.rows[0][0] != want {
			t.Fatalf("ran as %v, want %s", got.rows, want)
		}
	}
	who("made_1")
	who("made_1")
	close(expiring)
	who("made_2")
	// Idle sessions are looked after every 5 s.
	within(t, 2*time.Minute, "the release of the first", func() bool { return released.Load() == 1 })
	if err := m.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if released.Load() != 2 || asked.Load() != 2 {
		t.Errorf("%d users were asked for, %d released", asked.Load(), released.Load())
	}
}
