package simulatedkernels

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"sync"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/proto/jupyter"
	"github.com/postern-dev/postern/proto/kernelstream"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// kernel is one simulated kernel.
type kernel struct {
	id, spec, session string
	owner             *posternv1.Principal
	environment       map[string]string
	started           *timestamppb.Timestamp
	requests          chan request
	interrupts        chan struct{}
	answers           chan string
	done              chan struct{}

	mu         sync.Mutex
	changed    *sync.Cond // when the journal grows, a client leaves, or it ends
	journal    []entry
	sequence   uint64
	clients    map[string]*client
	taken      map[string]bool
	ran        []string
	busy       bool
	dead       string
	stopped    bool
	count      int
	generation uint64
}

type request struct {
	client string
	header jupyter.Header
	m      *posternv1.KernelMessage
}

type entry struct {
	sequence uint64
	to       string // a client; empty: all
	m        *posternv1.KernelMessage
}

type client struct {
	confirmed uint64
	stream    io.Closer // nil: away
	round     int
}

func newKernel(m *posternv1.StartKernelRequest) *kernel {
	k := &kernel{
		id: m.Id, spec: "python3", session: jupyter.NewID(), owner: clone(m.Principal), environment: m.Environment, started: now(),
		requests: make(chan request, 1024), interrupts: make(chan struct{}, 1), answers: make(chan string, 16), done: make(chan struct{}),
		clients: map[string]*client{}, taken: map[string]bool{}, generation: 1,
	}
	k.changed = sync.NewCond(&k.mu)
	return k
}

func (k *kernel) stop(reason string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.stopped {
		k.stopped, k.dead = true, reason
		close(k.done)
		k.changed.Broadcast()
	}
}

func (k *kernel) describe() *posternv1.Kernel {
	k.mu.Lock()
	defer k.mu.Unlock()
	state := posternv1.KernelState_KERNEL_STATE_IDLE
	switch {
	case k.dead != "":
		state = posternv1.KernelState_KERNEL_STATE_DEAD
	case k.busy:
		state = posternv1.KernelState_KERNEL_STATE_BUSY
	}
	attached := uint32(0)
	for _, c := range k.clients {
		if c.stream != nil {
			attached++
		}
	}
	return &posternv1.Kernel{
		Id: k.id, Spec: k.spec, Language: "python", State: state, Reason: k.dead, Started: k.started, LastActivity: now(),
		Connections: attached, Owner: clone(k.owner), Sequence: k.sequence, Generation: k.generation,
	}
}

// serve is a client's stream until it ends.
func (k *kernel) serve(conn io.ReadWriteCloser, r *posternv1.KernelChannelsRequest) {
	k.mu.Lock()
	c := k.clients[r.Client]
	from := k.sequence
	switch {
	case c != nil && r.Resume:
		from = c.confirmed
	case r.AfterSequence > 0:
		from = r.AfterSequence
	}
	if c == nil {
		c = &client{confirmed: from}
		k.clients[r.Client] = c
	}
	if c.stream != nil {
		c.stream.Close() //nolint:errcheck // the newer takes its place
	}
	c.stream = conn
	c.round++
	round := c.round
	k.mu.Unlock()

	w := kernelstream.NewWriter(conn)
	if w.Send(&posternv1.KernelFrame{Frame: &posternv1.KernelFrame_Attached{Attached: k.describe()}}) != nil {
		return
	}
	var wg sync.WaitGroup
	wg.Go(func() { k.deliver(c, round, r.Client, from, w); conn.Close() }) //nolint:errcheck // it is over
	k.receive(c, r.Client, kernelstream.NewReader(conn), w)
	k.mu.Lock()
	if c.round == round {
		c.stream = nil
	}
	c.round++ // ends deliver
	k.changed.Broadcast()
	k.mu.Unlock()
	wg.Wait()
}

func (k *kernel) receive(c *client, name string, frames *kernelstream.Reader, w *kernelstream.Writer) {
	taken := uint64(0)
	for {
		f, err := frames.Next()
		if err != nil {
			return
		}
		switch f := f.Frame.(type) {
		case *posternv1.KernelFrame_Confirm:
			k.mu.Lock()
			c.confirmed = max(c.confirmed, f.Confirm)
			k.mu.Unlock()
		case *posternv1.KernelFrame_Send:
			h, err := jupyter.Check(f.Send)
			if err != nil {
				return
			}
			k.mu.Lock()
			again := k.taken[h.ID]
			k.taken[h.ID] = true
			k.mu.Unlock()
			if !again {
				k.take(request{name, h, f.Send})
			}
			taken++
			if w.Send(&posternv1.KernelFrame{Frame: &posternv1.KernelFrame_Taken{Taken: taken}}) != nil {
				return
			}
		}
	}
}

func (k *kernel) take(r request) {
	if r.header.Type == "input_reply" {
		var content struct{ Value string }
		json.Unmarshal(r.m.Content, &content) //nolint:errcheck // a test's client
		k.answers <- content.Value
		return
	}
	select {
	case k.requests <- r:
	case <-k.done:
	}
}

// deliver sends the journal from a number on, as it grows.
func (k *kernel) deliver(c *client, round int, name string, from uint64, w *kernelstream.Writer) {
	k.mu.Lock()
	first := k.sequence
	k.mu.Unlock()
	for {
		k.mu.Lock()
		for k.sequence <= from && !k.stopped && c.round == round {
			k.changed.Wait()
		}
		if c.round != round {
			k.mu.Unlock()
			return
		}
		if k.sequence <= from {
			k.mu.Unlock()
			w.End(nil) //nolint:errcheck // the kernel is gone
			return
		}
		e := k.journal[from] // entry i has sequence i+1
		k.mu.Unlock()
		from++
		if e.to != "" && e.to != name {
			continue
		}
		if w.Send(&posternv1.KernelFrame{Frame: &posternv1.KernelFrame_Delivery{Delivery: &posternv1.KernelDelivery{
			Sequence: e.sequence, Message: e.m, Replayed: e.sequence <= first,
		}}}) != nil {
			return
		}
	}
}

// emit writes a message into the journal.
func (k *kernel) emit(to, channel, kind string, parent *posternv1.KernelMessage, content any, buffers ...[]byte) {
	m, err := jupyter.New(channel, kind, k.session, content)
	if err != nil {
		panic(err) // contents of ours
	}
	m.Buffers = buffers
	if parent != nil {
		m.ParentHeader = parent.Header
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.sequence++
	k.journal = append(k.journal, entry{k.sequence, to, m})
	k.changed.Broadcast()
}

type dict = map[string]any

func (k *kernel) run() {
	for {
		select {
		case <-k.done:
			return
		case r := <-k.requests:
			k.mu.Lock()
			k.busy = true
			k.mu.Unlock()
			k.emit("", jupyter.IOPub, "status", r.m, dict{"execution_state": "busy"})
			kind, content := k.answer(r)
			k.emit(r.client, r.m.Channel, kind, r.m, content)
			k.mu.Lock()
			k.busy = false
			k.mu.Unlock()
			k.emit("", jupyter.IOPub, "status", r.m, dict{"execution_state": "idle"})
		}
	}
}

func (k *kernel) answer(r request) (kind string, content dict) {
	switch r.header.Type {
	case "execute_request":
		return "execute_reply", k.execute(r)
	case "kernel_info_request":
		return "kernel_info_reply", dict{
			"status": "ok", "protocol_version": jupyter.ProtocolVersion, "implementation": "simulated", "implementation_version": "1", "banner": "Simulated",
			"language_info": dict{"name": "python", "version": "3", "mimetype": "text/x-python", "file_extension": ".py"}, "help_links": []any{},
		}
	default:
		return strings.TrimSuffix(r.header.Type, "_request") + "_reply", dict{"status": "ok"}
	}
}

func (k *kernel) execute(r request) dict {
	var asked struct {
		Code       string
		AllowStdin bool `json:"allow_stdin"`
	}
	json.Unmarshal(r.m.Content, &asked) //nolint:errcheck // a test's client
	k.mu.Lock()
	k.ran = append(k.ran, asked.Code)
	k.count++
	count := k.count
	k.mu.Unlock()
	k.emit("", jupyter.IOPub, "execute_input", r.m, dict{"code": asked.Code, "execution_count": count})
	fail := func(name, value string) dict {
		e := dict{"ename": name, "evalue": value, "traceback": []string{"Traceback", name + ": " + value}}
		k.emit("", jupyter.IOPub, "error", r.m, e)
		return dict{"status": "error", "execution_count": count, "ename": name, "evalue": value, "traceback": e["traceback"]}
	}
	for line := range strings.Lines(asked.Code) {
		word, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		switch word {
		case "print":
			k.emit("", jupyter.IOPub, "stream", r.m, dict{"name": "stdout", "text": rest + "\n"})
		case "stderr":
			k.emit("", jupyter.IOPub, "stream", r.m, dict{"name": "stderr", "text": rest + "\n"})
		case "value":
			k.emit("", jupyter.IOPub, "execute_result", r.m, dict{"execution_count": count, "data": dict{"text/plain": rest}, "metadata": dict{}})
		case "image":
			k.emit("", jupyter.IOPub, "display_data", r.m, dict{"data": dict{"image/png": "iVBORw0KGgo=", "text/plain": "<Figure size 640x480>"}, "metadata": dict{}})
		case "buffers":
			k.emit("", jupyter.IOPub, "display_data", r.m, dict{"data": dict{"text/plain": "buffers"}, "metadata": dict{}}, []byte{0, 1, 2}, []byte{0xff})
		case "flood":
			n, size := 0, 0
			fmt.Sscan(rest, &n, &size) //nolint:errcheck // a test's cell
			for i := range n {
				k.emit("", jupyter.IOPub, "stream", r.m, dict{"name": "stdout", "text": fmt.Sprintf("%08d%s\n", i, strings.Repeat("x", max(0, size-9)))})
				select {
				case <-k.interrupts:
					return fail("KeyboardInterrupt", "")
				default:
				}
			}
		case "input":
			k.emit(r.client, jupyter.Stdin, "input_request", r.m, dict{"prompt": "name? ", "password": rest == "password"})
			select {
			case text := <-k.answers:
				k.emit("", jupyter.IOPub, "stream", r.m, dict{"name": "stdout", "text": "got " + text + "\n"})
			case <-k.interrupts:
				return fail("KeyboardInterrupt", "")
			case <-k.done:
			}
		case "sleep":
			select {
			case <-k.interrupts:
				return fail("KeyboardInterrupt", "")
			case <-k.done:
			}
		case "error":
			return fail("Exception", rest)
		case "die":
			k.mu.Lock()
			k.dead = "it ended by itself: exit status 1"
			k.mu.Unlock()
			k.emit("", jupyter.IOPub, "status", nil, dict{"execution_state": "dead"})
		}
	}
	return dict{"status": "ok", "execution_count": count, "payload": []any{}, "user_expressions": dict{}}
}
