package freeport

import (
	"net"
	"testing"
)

// TestRange: the ports are none of those that the system gives to others.
func TestRange(t *testing.T) {
	for name, free := range map[string]func() (int, error){"TCP": TCP, "UDP": UDP} {
		for range 20 {
			port, err := free()
			if err != nil {
				t.Fatal(err)
			}
			if port < lowest || port >= lowest+count {
				t.Errorf("%s: %d is not of the range", name, port)
			}
		}
	}
}

// TestTaken: a port that is in use is passed over.
func TestTaken(t *testing.T) {
	address, err := Address()
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() //nolint:errcheck // it was for the port alone
	asked := 0
	port, err := find(func(string) error {
		if asked++; asked < 3 {
			_, err := net.Listen("tcp", address)
			return err
		}
		return nil
	})
	if err != nil || asked != 3 || port == 0 {
		t.Errorf("%d after %d tries, %v", port, asked, err)
	}
}
