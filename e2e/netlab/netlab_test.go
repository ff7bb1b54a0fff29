package netlab

import (
	"bufio"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
)

// echo answers every connection with what it says.
func echo(t *testing.T, ns, address string) {
	t.Helper()
	l, err := Listen(ns, address)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	t.Cleanup(func() { l.Close(); <-ended })
	go func() {
		defer close(ended)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				conn.SetDeadline(time.Now().Add(30 * time.Second))
				io.Copy(conn, conn)
			}()
		}
	}()
}

// reach dials and has a word echoed; patience is for what a firewall drops.
func reach(ns, address string, patience time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn, err := Dial(ctx, ns, address)
	if err != nil {
		return err
	}
	defer conn.Close()
	return ask(conn, conn, patience)
}

func ask(conn net.Conn, r io.Reader, patience time.Duration) error {
	conn.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(conn, "hello"); err != nil {
		return err
	}
	answer := make([]byte, 5)
	if _, err := io.ReadFull(r, answer); err != nil {
		return err
	}
	if string(answer) != "hello" {
		return fmt.Errorf("got %q, want hello", answer)
	}
	return nil
}

// connect asks the proxy for a way to address and returns its status.
func connect(t *testing.T, l *Lab, address, auth string) (int, net.Conn) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	conn, err := Dial(ctx, l.Customer, ProxyAddress)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(time.Minute))
	fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n", address, address)
	if auth != "" {
		fmt.Fprintf(conn, "Proxy-Authorization: Basic %s\r\n", base64.StdEncoding.EncodeToString([]byte(auth)))
	}
	io.WriteString(conn, "\r\n")
	resp, err := http.ReadResponse(bufio.NewReaderSize(conn, 16), &http.Request{Method: http.MethodConnect})
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, conn
}

const blocked = 300 * time.Millisecond // how long a dropped connection is waited for

func TestDirectEgress(t *testing.T) {
	l := Up(t, Options{})
	echo(t, l.Cloud, CloudIP+":8443")
	echo(t, l.Customer, CustomerIP+":8443")
	if err := reach(l.Customer, CloudIP+":8443", 5*time.Second); err != nil {
		t.Errorf("customer to cloud: %v", err)
	}
	err := reach(l.Cloud, CustomerIP+":8443", blocked)
	if !errors.Is(err, context.DeadlineExceeded) && !os.IsTimeout(err) {
		t.Errorf("cloud to customer: got %v, want silence", err)
	}
}

func TestProxyEgress(t *testing.T) {
	l := Up(t, Options{Egress: Proxy, Auth: "scott:tiger", Ports: []int{8443}})
	echo(t, l.Cloud, CloudIP+":8443")
	echo(t, l.Customer, CustomerIP+":8443")
	for name, try := range map[string][2]string{
		"customer to cloud":                 {l.Customer, CloudIP + ":8443"},
		"cloud to customer":                 {l.Cloud, CustomerIP + ":8443"},
		"cloud to the proxy":                {l.Cloud, outsideIP + ":3128"},
		"cloud to the proxy's inside":       {l.Cloud, ProxyAddress},
		"customer to the firewall's inside": {l.Customer, insideIP + ":22"},
	} {
		if err := reach(try[0], try[1], blocked); err == nil || !os.IsTimeout(err) && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: got %v, want silence", name, err)
		}
	}
	if status, _ := connect(t, l, CloudIP+":8443", ""); status != http.StatusProxyAuthRequired {
		t.Errorf("CONNECT without credentials: got %d, want 407", status)
	}
	if status, _ := connect(t, l, CloudIP+":8443", "scott:lion"); status != http.StatusProxyAuthRequired && status != http.StatusUnauthorized {
		t.Errorf("CONNECT with a wrong password: got %d, want 401 or 407", status)
	}
	if status, _ := connect(t, l, CloudIP+":22", "scott:tiger"); status != http.StatusForbidden {
		t.Errorf("CONNECT to a port that is not allowed: got %d, want 403", status)
	}
	status, conn := connect(t, l, CloudIP+":8443", "scott:tiger")
	if status != http.StatusOK {
		t.Fatalf("CONNECT: got %d, want 200\n%s", status, l.ProxyLog())
	}
	if err := ask(conn, conn, 5*time.Second); err != nil {
		t.Errorf("through the proxy: %v", err)
	}
}

func TestClosed(t *testing.T) {
	l := Up(t, Options{Egress: Closed})
	echo(t, l.Cloud, CloudIP+":8443")
	if err := reach(l.Customer, CloudIP+":8443", blocked); err == nil {
		t.Error("customer to cloud passes")
	}
}

func TestCutIsSilentAndHeals(t *testing.T) {
	l := Up(t, Options{})
	echo(t, l.Cloud, CloudIP+":8443")
	conn, err := Dial(t.Context(), l.Customer, CloudIP+":8443")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := ask(conn, conn, 5*time.Second); err != nil {
		t.Fatal(err)
	}
	if err := l.Cut(); err != nil {
		t.Fatal(err)
	}
	if err := ask(conn, conn, blocked); !os.IsTimeout(err) {
		t.Errorf("over a cut link: got %v, want silence", err)
	}
	if err := reach(l.Customer, CloudIP+":8443", blocked); err == nil {
		t.Error("a new connection over a cut link passes")
	}
	if err := l.Heal(); err != nil {
		t.Fatal(err)
	}
	// The old connection goes on where it was: its word was only late.
	answer := make([]byte, 5)
	conn.SetDeadline(time.Now().Add(time.Minute))
	if _, err := io.ReadFull(conn, answer); err != nil || string(answer) != "hello" {
		t.Errorf("after healing: got %q, %v", answer, err)
	}
	if err := reach(l.Customer, CloudIP+":8443", 5*time.Second); err != nil {
		t.Errorf("a new connection after healing: %v", err)
	}
}

func TestListeningTCP(t *testing.T) {
	l := Up(t, Options{})
	if got, err := ListeningTCP(l.Customer); err != nil || len(got) != 0 {
		t.Errorf("nobody listens: got %v, %v", got, err)
	}
	echo(t, l.Customer, "127.0.0.1:5432")
	echo(t, l.Customer, CustomerIP+":80")
	got, err := ListeningTCP(l.Customer)
	slices.Sort(got)
	if want := []string{CustomerIP + ":80", "127.0.0.1:5432"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v, want %v", got, err, want)
	}
	if got, err := ListeningTCP(l.Cloud); err != nil || len(got) != 0 {
		t.Errorf("another namespace: got %v, %v", got, err)
	}
}

func TestListeningReadsTheKernelsTable(t *testing.T) {
	const table = `  sl  local_address                         remote_address                        st tx_queue
   0: 00000000000000000000000001000000:1F90 00000000000000000000000000000000:0000 0A 00000000:00000000
   1: 0100007F:1538 0100007F:9C40 01 00000000:00000000
`
	got, err := listening(table)
	if want := []string{"[::1]:8080"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v, want %v", got, err, want)
	}
	if _, err := listening("heading\n 0: nonsense x 0A\n"); err == nil {
		t.Error("nonsense was understood")
	}
}

func TestNothingIsLeft(t *testing.T) {
	RequireRoot(t)
	var l *Lab
	t.Run("a test", func(t *testing.T) { l = Up(t, Options{Egress: Proxy}) })
	for _, ns := range l.all() {
		if _, err := os.Stat(nsPath(ns)); err == nil {
			t.Errorf("%s is left", ns)
		}
	}
	if l.proxy.cmd.ProcessState == nil {
		t.Error("the proxy still runs")
	}
}

func TestWhatAKilledProcessLeftIsRemoved(t *testing.T) {
	RequireRoot(t)
	gone := exec.Command("true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	left := fmt.Sprintf("%s%d-1-cloud", prefix, gone.Process.Pid)
	kept := fmt.Sprintf("%s%d-999-cloud", prefix, os.Getpid())
	for _, ns := range []string{left, kept} {
		if err := run("", "ip", "netns", "add", ns); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { remove(ns) })
	}
	if err := sweep(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(nsPath(left)); err == nil {
		t.Error("a dead process's namespace is left")
	}
	if _, err := os.Stat(nsPath(kept)); err != nil {
		t.Error("a live process's namespace was removed")
	}
}

// skipper is a test that notes how it was skipped.
type skipper struct {
	TB
	why string
}

func (s *skipper) Skipf(format string, args ...any) { s.why = fmt.Sprintf(format, args...) }

func TestSkipMessage(t *testing.T) {
	s := &skipper{TB: t}
	RequireRoot(s)
	if root := os.Getuid() == 0; root != (s.why == "") || !root && !strings.HasPrefix(s.why, "needs root") {
		t.Errorf("root %v: got %q", root, s.why)
	}
}
