package main

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/postern-dev/postern/client"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/jupyter"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// maxCode bounds the code of a cell from standard input, in bytes.
	maxCode = 16 << 20
	// interruptTime bounds the request that interrupts a cell.
	interruptTime = 10 * time.Second
	// startingTime bounds the wait for a kernel that starts; its host gives a start a minute.
	// startingLook is between two looks at it.
	startingTime = 2 * time.Minute
	startingLook = time.Second
)

func (a *app) kernelExecCommand() *cobra.Command {
	return &cobra.Command{
		Use: "exec KERNEL CODE|-", Short: "Run code in a kernel and print what it prints",
		Long: "Runs code in a kernel and prints its outputs as they come: standard output, results and the\n" +
			"text of displays on stdout, standard error and tracebacks on stderr. input() reads from\n" +
			"stdin, unless the code does. Ctrl-C interrupts the cell; once more leaves it alone and ends.\n\n" +
			"Exit code 1 if the cell failed. With -o json each message of the kernel is a line of JSON.",
		Example: "  postern kernel exec 01a20249-8294-70e3-b8c2-6b2fc9eebe2f 'print(6*7)'\n  postern kernel exec 01a20249-8294-70e3-b8c2-6b2fc9eebe2f - < cell.py",
		Args:    cobra.ExactArgs(2), ValidArgsFunction: a.completeKernels,
		RunE: func(cmd *cobra.Command, args []string) error {
			code := args[1]
			if code == "-" {
				text, err := io.ReadAll(io.LimitReader(a.stdin, maxCode+1))
				switch {
				case err != nil:
					return fmt.Errorf("read the code: %w", err)
				case len(text) > maxCode:
					return fmt.Errorf("read the code: it has more than %d bytes", maxCode)
				}
				code = string(text)
			}
			return a.with(func(c *client.Client) error { return a.execute(cmd.Context(), c, args[0], code, args[1] != "-") })
		},
	}
}

// cell is one execution under way.
type cell struct {
	a        *app
	channels *client.KernelChannels
	id       string        // of the request
	lines    *bufio.Reader // nil: no input
	replied  bool
	idle     bool
	failed   error
}

func (a *app) execute(ctx context.Context, c *client.Client, kernel, code string, input bool) error {
	found, err := c.Kernels.GetKernel(ctx, connect.NewRequest(&posternv1.AgentKernelRequest{KernelId: kernel}))
	if err != nil {
		return err
	}
	channels, err := c.KernelChannels(ctx, found.Msg.Agent, kernel, jupyter.NewID())
	if err != nil {
		return err
	}
	defer channels.Close()
	request, err := jupyter.New(jupyter.Shell, "execute_request", channels.Session(), map[string]any{
		"code": code, "silent": false, "store_history": true, "user_expressions": map[string]any{}, "allow_stdin": input, "stop_on_error": false,
	})
	if err != nil {
		return err
	}
	h, err := jupyter.ParseHeader(request.Header)
	if err != nil {
		return err
	}
	run := &cell{a: a, channels: channels, id: h.ID}
	if input {
		run.lines = bufio.NewReader(a.stdin)
	}
	if err := channels.Send(ctx, request); err != nil {
		return err
	}
	// Ctrl-C is for the cell: what it prints on the way out is still shown.
	work := context.WithoutCancel(ctx)
	stop := context.AfterFunc(ctx, func() {
		ctx, cancel := context.WithTimeout(work, interruptTime)
		defer cancel()
		if _, err := c.Kernels.InterruptKernel(ctx, connect.NewRequest(&posternv1.AgentKernelRequest{KernelId: kernel})); err != nil {
			a.info("the cell was not interrupted: %s (Ctrl-C again leaves it alone)", message(err))
		}
	})
	defer stop()
	if found.Msg.Kernel.GetState() == posternv1.KernelState_KERNEL_STATE_STARTING {
		var giveUp context.CancelCauseFunc
		work, giveUp = context.WithCancelCause(work)
		watching, enough := context.WithTimeout(work, startingTime)
		var wg sync.WaitGroup
		wg.Go(func() {
			defer enough()
			giveUpOn(watching, startingLook, giveUp, kernel, func(ctx context.Context) (*posternv1.AgentKernel, error) {
				now, err := c.Kernels.GetKernel(ctx, connect.NewRequest(&posternv1.AgentKernelRequest{KernelId: kernel}))
				if err != nil {
					return nil, err
				}
				return now.Msg, nil
			})
		})
		defer wg.Wait()
		defer giveUp(nil)
	}
	for {
		m, err := channels.Receive(work)
		if why := context.Cause(work); err != nil && why != nil {
			return why
		}
		if err != nil {
			return err
		}
		done, err := run.take(work, m)
		if done || err != nil {
			return err
		}
	}
}

// giveUpOn looks at a kernel that starts until it does not any more. When the context's time
// is over and it still does, who waits for it is told why to give up.
func giveUpOn(ctx context.Context, every time.Duration, giveUp context.CancelCauseFunc, id string, look func(context.Context) (*posternv1.AgentKernel, error)) {
	agent := ""
	for {
		k, err := look(ctx)
		if err == nil {
			agent = k.Agent
			if k.Kernel.GetState() != posternv1.KernelState_KERNEL_STATE_STARTING {
				return
			}
		}
		select {
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				giveUp(proto.Errorf(proto.CodeTimeout, "kernel %s is starting and does not get any further: look at agentd's log on %s, or stop the kernel", id, firstOf(agent, "its host")))
			}
			return
		case <-time.After(every):
		}
	}
}

// take shows a message; done says that the cell has ended.
func (r *cell) take(ctx context.Context, m *posternv1.KernelMessage) (done bool, err error) {
	h, err := jupyter.ParseHeader(m.Header)
	if err != nil {
		return false, nil //nolint:nilerr // nothing that could be shown
	}
	var content struct {
		State     string `json:"execution_state"`
		Name      string `json:"name"`
		Text      string `json:"text"`
		Status    string `json:"status"`
		EName     string `json:"ename"`
		EValue    string `json:"evalue"`
		Traceback []string
		Prompt    string
		Password  bool
		Data      map[string]json.RawMessage
	}
	parent, _ := jupyter.ParseHeader(m.ParentHeader)
	ours := parent.ID == r.id
	if !ours && h.Type != "status" {
		return false, nil // another client's
	}
	if err := json.Unmarshal(m.Content, &content); err != nil {
		return false, nil //nolint:nilerr // likewise
	}
	if content.State == "dead" && h.Type == "status" {
		return true, proto.Errorf(proto.CodeCancelled, "the kernel ended while the cell ran: see `postern kernel list`")
	}
	if !ours {
		return false, nil
	}
	if r.a.output == "json" && h.Type != "status" && h.Type != "execute_input" {
		if err := r.line(h.Type, m); err != nil {
			return false, err
		}
	}
	switch h.Type {
	case "stream":
		out := r.a.stdout
		if content.Name == "stderr" {
			out = r.a.stderr
		}
		err = r.print(out, content.Text)
	case "execute_result", "display_data", "update_display_data":
		err = r.display(content.Data)
	case "error":
		err = r.print(r.a.stderr, colours(r.a.stderr, strings.Join(content.Traceback, "\n")+"\n"))
	case "input_request":
		err = r.answer(ctx, content.Prompt, content.Password)
	case "execute_reply":
		r.replied = true
		switch content.Status {
		case "ok":
		case "error":
			r.failed = fmt.Errorf("the cell failed: %s", strings.TrimSuffix(content.EName+": "+content.EValue, ": "))
		default:
			r.failed = errors.New("the cell was not run: one before it failed")
		}
	}
	if err != nil {
		return false, err
	}
	r.idle = r.idle || h.Type == "status" && content.State == "idle"
	if r.idle && r.replied { // they come in any order
		return true, r.failed
	}
	return false, nil
}

// print writes text of the kernel's as it is: it is the caller's own program.
func (r *cell) print(out *os.File, text string) error {
	if r.a.output == "json" {
		return nil
	}
	_, err := out.WriteString(text)
	return err
}

// line prints a message as a line of JSON.
func (r *cell) line(kind string, m *posternv1.KernelMessage) error {
	text, err := json.Marshal(map[string]any{"type": kind, "content": json.RawMessage(m.Content), "metadata": json.RawMessage(m.Metadata)})
	if err != nil {
		return nil //nolint:nilerr // no JSON of a kernel's
	}
	_, err = r.a.stdout.Write(append(text, '\n'))
	return err
}

// display prints the text of a rich output, and names what else it has.
func (r *cell) display(data map[string]json.RawMessage) error {
	kinds := make([]string, 0, len(data))
	for kind := range data {
		kinds = append(kinds, kind)
	}
	slices.Sort(kinds)
	for _, kind := range kinds {
		if strings.HasPrefix(kind, "image/") && r.a.output != "json" {
			r.a.info("[%s, %s: not shown here]", safe(kind), sizeText(imageSize(kind, data[kind])))
		}
	}
	text := plainOf(data["text/plain"])
	if text == "" {
		return nil
	}
	return r.print(r.a.stdout, strings.TrimSuffix(text, "\n")+"\n")
}

// plainOf is the text of a MIME type: a string or a list of strings.
func plainOf(raw json.RawMessage) string {
	var text string
	if json.Unmarshal(raw, &text) == nil {
		return text
	}
	var parts []string
	if json.Unmarshal(raw, &parts) == nil {
		return strings.Join(parts, "")
	}
	return ""
}

func imageSize(kind string, raw json.RawMessage) uint64 {
	text := plainOf(raw)
	if kind == "image/svg+xml" {
		return uint64(len(text))
	}
	return uint64(base64.RawStdEncoding.DecodedLen(len(strings.TrimRight(text, "=\n"))))
}

var colour = regexp.MustCompile("\x1b\\[[0-9;]*m")

// colours is text with its colours, or without for what is no terminal.
func colours(out *os.File, text string) string {
	if isTerminal(out) {
		return text
	}
	return colour.ReplaceAllString(text, "")
}

// endOfInput is what Python's input() takes for the end of its input.
const endOfInput = "\x04"

// answer asks for a line and sends it to the kernel. The cell may end meanwhile, by an
// interrupt: then the line is lost.
func (r *cell) answer(ctx context.Context, prompt string, password bool) error {
	r.a.stderr.WriteString(prompt) //nolint:errcheck // nobody is left to tell
	go func() {
		value := endOfInput
		var err error
		if password && r.lines != nil && isTerminal(r.a.stdin) {
			var secret []byte
			if secret, err = term.ReadPassword(int(r.a.stdin.Fd())); err == nil {
				value = string(secret)
			}
			r.a.stderr.WriteString("\n") //nolint:errcheck // nobody is left to tell
		} else if r.lines != nil {
			var line string
			if line, err = r.lines.ReadString('\n'); line != "" || err == nil {
				value = strings.TrimRight(line, "\r\n")
			}
		}
		if err != nil && !errors.Is(err, io.EOF) {
			r.a.info("standard input: %v", err)
		}
		reply, err := jupyter.New(jupyter.Stdin, "input_reply", r.channels.Session(), map[string]string{"status": "ok", "value": value})
		if err == nil {
			r.channels.Send(ctx, reply) //nolint:errcheck // the cell learns that the connection is lost
		}
	}()
	return nil
}
