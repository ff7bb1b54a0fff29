package secret

import (
	"bytes"
	"fmt"
	"os"
	"testing"
)

// TestMain serves as the process whose environment is wiped.
func TestMain(m *testing.M) {
	if os.Getenv("POSTERN_TEST_WIPE") == "1" {
		os.Exit(wipeInChild())
	}
	os.Exit(m.Run())
}

func wipeInChild() int {
	before, _ := os.ReadFile("/proc/self/environ")
	if !bytes.Contains(before, []byte("PW_ONE=marked-secret-1")) {
		fmt.Println("the environment does not show the secret at first")
		return 1
	}
	env, err := CaptureEnv("PW_ONE", "PW_TWO", "PW_UNSET", "PW_EMPTY")
	if err != nil {
		fmt.Println(err)
		return 1
	}
	after, _ := os.ReadFile("/proc/self/environ")
	if bytes.Contains(after, []byte("marked-secret")) {
		fmt.Printf("the environment still shows a secret: %q\n", after)
		return 1
	}
	if !bytes.Contains(after, []byte("OTHER=stays")) || os.Getenv("OTHER") != "stays" {
		fmt.Printf("another variable was harmed: %q\n", after)
		return 1
	}
	if os.Getenv("PW_ONE") != "" {
		fmt.Println("PW_ONE is still set")
		return 1
	}
	for name, want := range map[string]string{"PW_ONE": "marked-secret-1", "PW_TWO": "marked=secret=2"} {
		got, err := Ref{Env: name}.Load(t0, env)
		if err != nil || got.Reveal() != want {
			fmt.Printf("%s: got %q, %v, want %q\n", name, got.Reveal(), err, want)
			return 1
		}
	}
	for _, name := range []string{"PW_UNSET", "PW_EMPTY"} {
		if _, err := (Ref{Env: name}).Load(t0, env); err == nil {
			fmt.Printf("%s: want an error\n", name)
			return 1
		}
	}
	return 0
}
