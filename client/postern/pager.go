package main

import (
	"bytes"
	"errors"
	"io"
	"os/exec"
	"strings"
	"syscall"

	"golang.org/x/term"
)

// pager shows a result that is higher than the terminal through the user's PAGER.
// What fits is shown at once.
type pager struct {
	shell   *shell
	command string
	height  int
	held    bytes.Buffer
	lines   int
	cmd     *exec.Cmd
	stdin   io.WriteCloser
	// left tells that the user left the pager before the end.
	left bool
}

// maxPagerHeld bounds what is held back until there are lines enough, in bytes.
const maxPagerHeld = 1 << 20

// newPager is nil where there is none to use: PAGER is empty or not set.
func (s *shell) newPager() *pager {
	command := strings.TrimSpace(s.app.getenv("PAGER"))
	_, height, err := term.GetSize(int(s.app.stdout.Fd()))
	if command == "" || command == "cat" || err != nil || height < 3 {
		return nil
	}
	return &pager{shell: s, command: command, height: height}
}

// Write implements io.Writer.
func (p *pager) Write(b []byte) (int, error) {
	if p.cmd == nil {
		p.held.Write(b)
		p.lines += bytes.Count(b, []byte{'\n'})
		if p.lines < p.height && p.held.Len() < maxPagerHeld {
			return len(b), nil
		}
		if err := p.start(); err != nil {
			return 0, err
		}
		_, err := p.stdin.Write(p.held.Bytes())
		p.held = bytes.Buffer{}
		return p.wrote(len(b), err)
	}
	n, err := p.stdin.Write(b)
	return p.wrote(n, err)
}

// wrote takes the end of the pager for the user's word that it is enough.
func (p *pager) wrote(n int, err error) (int, error) {
	if err != nil && (errors.Is(err, syscall.EPIPE) || strings.Contains(err.Error(), "closed")) {
		p.left = true
	}
	return n, err
}

func (p *pager) start() (err error) {
	p.cmd = exec.Command("/bin/sh", "-c", p.command)
	p.cmd.Stdout, p.cmd.Stderr = p.shell.app.stdout, p.shell.app.stderr
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		return err
	}
	return p.cmd.Start()
}

// close waits for the pager's end, or shows what needed none.
func (p *pager) close() error {
	if p.cmd == nil {
		_, err := p.shell.app.stdout.Write(p.held.Bytes())
		return err
	}
	p.stdin.Close()  //nolint:errcheck // the pager may have gone
	_ = p.cmd.Wait() // its exit code says nothing of the result
	return nil
}
