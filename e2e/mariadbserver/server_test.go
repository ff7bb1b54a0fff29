package mariadbserver

import (
	"testing"
)

func TestServer(t *testing.T) {
	s := Start(t, Options{TLS: true})
	ctx := t.Context()
	if err := s.SQL(ctx, "CREATE DATABASE shop", "CREATE TABLE shop.t (a INT)", "INSERT INTO shop.t VALUES (7)"); err != nil {
		t.Fatal(err)
	}
	if err := s.CreateUser(ctx, "reader", "secret", "SELECT ON shop.*"); err != nil {
		t.Fatal(err)
	}
	if err := s.Kill(); err != nil || s.PID() != 0 {
		t.Fatalf("kill: %v, pid %d", err, s.PID())
	}
	if err := s.Restart(ctx); err != nil {
		t.Fatal(err)
	}
	if err := s.SQLIn(ctx, "shop", "UPDATE t SET a = 8"); err != nil {
		t.Fatal(err)
	}
}
