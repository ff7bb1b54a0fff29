package egress

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// Arguments that make the test binary something else.
const (
	hostileArg = "hostile" // an egress process that was taken over; more arguments: what it answers
	parentArg  = "parent"  // an agentd that is killed; another argument: a URL
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case Arg:
			os.Exit(Main())
		case hostileArg:
			os.Exit(hostile(os.Args[2]))
		case parentArg:
			os.Exit(parent(os.Args[2]))
		}
	}
	goleak.VerifyTestMain(m)
}

// hostile answers each connection with a kind of nonsense.
func hostile(kind string) int {
	control, err := inherited(controlFD)
	if err != nil {
		return 1
	}
	if _, err := readConfig(control); err != nil {
		return 1
	}
	for {
		conn, err := receive(control)
		if err != nil {
			return 0
		}
		go func() {
			defer conn.Close()
			if _, err := conn.Read(make([]byte, 4<<10)); err != nil {
				return
			}
			switch kind {
			case "header":
				for _, err = io.WriteString(conn, "HTTP/1.1 200 OK\r\n"); err == nil; _, err = io.WriteString(conn, "X: "+strings.Repeat("x", 4000)+"\r\n") {
				}
			case "line":
				for err == nil {
					_, err = io.WriteString(conn, strings.Repeat("H", 4000))
				}
			case "interim":
				for err == nil {
					_, err = io.WriteString(conn, "HTTP/1.1 103 Early Hints\r\nX: y\r\n\r\n")
				}
			case "failure":
				_, _ = io.WriteString(conn, "HTTP/1.1 502 x\r\n"+failureHeader+": "+strings.Repeat("a%0A%1B", 5000)+"\r\nContent-Length: 0\r\n\r\n")
			case "escape":
				_, _ = io.WriteString(conn, "HTTP/1.1 502 x\r\n"+failureHeader+": %zz\r\nContent-Length: 0\r\n\r\n")
			case "silent":
				_, _ = io.Copy(io.Discard, conn)
			case "nothing":
			}
		}()
	}
}

// parent makes a request, says which process made it, and waits for its end.
func parent(url string) int {
	c := New(Config{Name: "parent", UID: testUID})
	answer, err := (&http.Client{Transport: c}).Get(url)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	_ = answer.Body.Close()
	fmt.Println(c.pid())
	time.Sleep(time.Hour)
	return 0
}
