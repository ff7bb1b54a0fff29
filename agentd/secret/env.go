package secret

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// Environment holds what CaptureEnv took out of the process's environment.
type Environment struct {
	values map[string]Secret
}

func (e *Environment) get(name string) (Secret, error) {
	if e != nil {
		if value, ok := e.values[name]; ok {
			return value, nil
		}
	}
	return Secret{}, fmt.Errorf("environment variable %s was not set when agentd started: set it and restart, or use file or credential", name)
}

// CaptureEnv takes the named variables out of the environment: it keeps their
// values, unsets them, and overwrites the values in the block that the kernel
// shows as /proc/PID/environ. Unsetting alone would leave them there. Call it
// at the start of main, before other goroutines run. Variables that are unset
// or empty are left out. Until the call the value was visible to root and to
// processes of the same user: file and credential are the better choices.
func CaptureEnv(names ...string) (*Environment, error) {
	e := &Environment{values: make(map[string]Secret)}
	for _, name := range names {
		value := os.Getenv(name)
		if value == "" {
			continue
		}
		// The runtime's strings are the kernel's block itself: copy first.
		e.values[name] = New(strings.Clone(value))
		if err := os.Unsetenv(name); err != nil {
			return nil, err
		}
	}
	if len(e.values) == 0 {
		return e, nil
	}
	if err := wipe(e.values); err != nil {
		return nil, fmt.Errorf("wipe secrets from the environment: %w", err)
	}
	return e, nil
}

// wipe writes zeros over the values of the named variables in the initial
// environment block; the names stay.
func wipe(names map[string]Secret) error {
	start, end, err := environmentBlock()
	if err != nil {
		return err
	}
	memory, err := os.OpenFile("/proc/self/mem", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { _ = memory.Close() }()
	block := make([]byte, end-start)
	defer clear(block)
	if _, err := memory.ReadAt(block, start); err != nil {
		return err
	}
	for at := 0; at < len(block); {
		entry, _, _ := bytes.Cut(block[at:], []byte{0})
		name, value, ok := bytes.Cut(entry, []byte{'='})
		if _, wanted := names[string(name)]; ok && wanted && len(value) > 0 {
			if _, err := memory.WriteAt(make([]byte, len(value)), start+int64(at+len(name)+1)); err != nil {
				return err
			}
		}
		at += len(entry) + 1
	}
	return nil
}

// environmentBlock reads env_start and env_end, fields 50 and 51 of
// /proc/self/stat (proc_pid_stat(5)).
func environmentBlock() (start, end int64, err error) {
	text, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		return 0, 0, err
	}
	// Field 2 is the program's name in parentheses and may hold anything.
	i := bytes.LastIndexByte(text, ')')
	fields := strings.Fields(string(text[i+1:]))
	if i < 0 || len(fields) < 49 {
		return 0, 0, errors.New("/proc/self/stat has too few fields")
	}
	if start, err = strconv.ParseInt(fields[47], 10, 64); err != nil {
		return 0, 0, err
	}
	if end, err = strconv.ParseInt(fields[48], 10, 64); err != nil {
		return 0, 0, err
	}
	if start == 0 || end < start || end-start > 64<<20 {
		return 0, 0, fmt.Errorf("/proc/self/stat: environment from %d to %d", start, end)
	}
	return start, end, nil
}
