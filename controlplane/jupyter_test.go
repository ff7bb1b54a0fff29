package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/coder/websocket"

	"github.com/postern-dev/postern/e2e/simulatedkernels"
	"github.com/postern-dev/postern/proto/jupyter"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
	"github.com/postern-dev/postern/tunnel"
)

// rest asks the Jupyter API and returns status, headers and body.
func rest(t *testing.T, s *testServer, token, method, path, body string) (*http.Response, string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, s.url+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if token != "" {
		r.Header.Set("Authorization", "token "+token)
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(text)
}

func wantStatus(t *testing.T, resp *http.Response, text string, want int) {
	t.Helper()
	if resp.StatusCode != want {
		t.Fatalf("%s: got status %d, want %d: %s", resp.Request.URL.Path, resp.StatusCode, want, text)
	}
}

// lab is an agent with simulated kernels and one kernel of a token's.
type lab struct {
	*testServer
	agent         *simulatedAgent
	tunnel        *tunnel.Tunnel
	host          *simulatedkernels.Host
	token, token2 string
	kernel        string
}

func newLab(t *testing.T) *lab {
	t.Helper()
	s := startServer(t)
	a, host := kernelHost(t, s, "edge")
	tn := a.attach(t)
	l := &lab{testServer: s, agent: a, tunnel: tn, host: host, token: s.newToken(t, s.token, "ana", "analyst"), token2: s.newToken(t, s.token, "bob", "analyst")}
	resp, text := rest(t, s, l.token, "POST", "/jupyter/edge/api/kernels", `{"name":"python3","env":{"KERNEL_USERNAME":"ana"}}`)
	wantStatus(t, resp, text, http.StatusCreated)
	var model struct{ ID string }
	if err := json.Unmarshal([]byte(text), &model); err != nil {
		t.Fatal(err)
	}
	if want := "/jupyter/edge/api/kernels/" + model.ID; resp.Header.Get("Location") != want {
		t.Fatalf("Location: got %q, want %q", resp.Header.Get("Location"), want)
	}
	l.kernel = model.ID
	return l
}

// client is a Jupyter client's WebSocket.
type client struct {
	t       *testing.T
	ws      *websocket.Conn
	v1      bool
	session string
}

func (l *lab) dial(t *testing.T, session string, v1 bool) *client {
	t.Helper()
	options := &websocket.DialOptions{HTTPHeader: http.Header{"Authorization": {"token " + l.token}}}
	if v1 {
		options.Subprotocols = []string{jupyter.SubprotocolV1}
	}
	path := "/jupyter/edge/api/kernels/" + l.kernel + "/channels"
	if session != "" {
		path += "?session_id=" + url.QueryEscape(session)
	}
	ws, _, err := websocket.Dial(t.Context(), l.url+path, options)
	if err != nil {
		t.Fatal(err)
	}
	ws.SetReadLimit(-1)
	t.Cleanup(func() { ws.CloseNow() })
	if (ws.Subprotocol() == jupyter.SubprotocolV1) != v1 {
		t.Fatalf("subprotocol %q", ws.Subprotocol())
	}
	return &client{t: t, ws: ws, v1: v1, session: firstNonEmpty(session, jupyter.NewID())}
}

func firstNonEmpty(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

func (c *client) send(m *posternv1.KernelMessage) {
	c.t.Helper()
	kind, data := websocket.MessageBinary, []byte(nil)
	var err error
	if c.v1 {
		data, err = jupyter.EncodeV1(m)
	} else {
		var binary bool
		if data, binary, err = jupyter.EncodeLegacy(m); !binary {
			kind = websocket.MessageText
		}
	}
	if err == nil {
		err = c.ws.Write(c.t.Context(), kind, data)
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

func (c *client) ask(channel, kind string, content any) string {
	c.t.Helper()
	m, err := jupyter.New(channel, kind, c.session, content)
	if err != nil {
		c.t.Fatal(err)
	}
	c.send(m)
	h, _ := jupyter.ParseHeader(m.Header)
	return h.ID
}

func (c *client) execute(code string) string {
	c.t.Helper()
	return c.ask(jupyter.Shell, "execute_request", map[string]any{"code": code, "allow_stdin": true, "stop_on_error": false})
}

func (c *client) read(ctx context.Context) (*posternv1.KernelMessage, jupyter.Header, jupyter.Header, error) {
	kind, data, err := c.ws.Read(ctx)
	if err != nil {
		return nil, jupyter.Header{}, jupyter.Header{}, err
	}
	var m *posternv1.KernelMessage
	if c.v1 {
		m, err = jupyter.DecodeV1(data)
	} else {
		m, err = jupyter.DecodeLegacy(data, kind == websocket.MessageBinary)
	}
	if err != nil {
		c.t.Fatal(err)
	}
	h, err := jupyter.ParseHeader(m.Header)
	if err != nil {
		c.t.Fatal(err)
	}
	p, err := jupyter.ParseHeader(m.ParentHeader)
	if err != nil {
		c.t.Fatal(err)
	}
	return m, h, p, nil
}

// until reads messages up to one that fits.
func (c *client) until(fits func(m *posternv1.KernelMessage, h, parent jupyter.Header) bool) []*posternv1.KernelMessage {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), 2*time.Minute)
	defer cancel()
	var all []*posternv1.KernelMessage
	for {
		m, h, p, err := c.read(ctx)
		if err != nil {
			c.t.Fatalf("after %d messages: %v", len(all), err)
		}
		all = append(all, m)
		if fits(m, h, p) {
			return all
		}
	}
}

func idle(id string) func(*posternv1.KernelMessage, jupyter.Header, jupyter.Header) bool {
	return func(m *posternv1.KernelMessage, h, parent jupyter.Header) bool {
		return h.Type == "status" && parent.ID == id && bytes.Contains(m.Content, []byte(`"idle"`))
	}
}

// printed is what was printed in messages, in order.
func printed(all []*posternv1.KernelMessage) string {
	var out strings.Builder
	for _, m := range all {
		h, _ := jupyter.ParseHeader(m.Header)
		if h.Type == "stream" {
			var content struct{ Text string }
			json.Unmarshal(m.Content, &content)
			out.WriteString(content.Text)
		}
	}
	return out.String()
}

func TestJupyterCallersAreKnown(t *testing.T) {
	l := newLab(t)
	viewer := l.newToken(t, l.testServer.token, "eve", "viewer")
	kernel := "/api/kernels/" + l.kernel
	for _, test := range []struct {
		name, path, header string
		want               int
	}{
		{"bearer", "/jupyter/edge" + kernel, "Bearer " + l.token, 200},
		{"token", "/jupyter/edge" + kernel, "Token " + l.token, 200},
		{"query", "/jupyter/edge" + kernel + "?token=" + l.token, "", 200},
		{"path", "/jupyter/edge/t/" + l.token + kernel, "", 200},
		{"the header counts", "/jupyter/edge/t/" + l.token + kernel + "?token=" + l.token, "token nonsense", 403},
		{"none", "/jupyter/edge" + kernel, "", 403},
		{"basic", "/jupyter/edge" + kernel, "Basic " + l.token, 403},
		{"wrong", "/jupyter/edge" + kernel, "token pat_wrong", 403},
		{"wrong in the path", "/jupyter/edge/t/nonsense" + kernel, "", 403},
		{"role", "/jupyter/edge" + kernel, "token " + viewer, 403},
		{"another's kernel", "/jupyter/edge" + kernel, "token " + l.token2, 404},
		{"another agent", "/jupyter/nowhere" + kernel, "token " + l.token, 404},
		{"no agent", "/jupyter/", "token " + l.token, 404},
		{"files", "/jupyter/edge/api/contents", "token " + l.token, 404},
		{"terminals", "/jupyter/edge/api/terminals", "token " + l.token, 404},
	} {
		for _, suffix := range []string{"", "/channels"} {
			path, query, _ := strings.Cut(test.path, "?")
			if suffix != "" && !strings.HasSuffix(path, kernel) {
				continue
			}
			t.Run(test.name+suffix, func(t *testing.T) {
				url := l.url + path + suffix
				if query != "" {
					url += "?" + query
				}
				header := http.Header{}
				if test.header != "" {
					header.Set("Authorization", test.header)
				}
				status := 0
				if suffix == "" {
					r, _ := http.NewRequestWithContext(t.Context(), "GET", url, nil)
					r.Header = header
					resp, err := http.DefaultClient.Do(r)
					if err != nil {
						t.Fatal(err)
					}
					text, _ := io.ReadAll(resp.Body)
					resp.Body.Close()
					status = resp.StatusCode
					var said struct{ Message string }
					if status >= 400 && (json.Unmarshal(text, &said) != nil || said.Message == "" || strings.Contains(said.Message, "\n")) {
						t.Errorf("got %s", text)
					}
				} else {
					ws, resp, err := websocket.Dial(t.Context(), url, &websocket.DialOptions{HTTPHeader: header})
					if err == nil {
						ws.CloseNow()
						status = 200
					} else if resp != nil {
						status = resp.StatusCode
					}
				}
				if status != test.want {
					t.Errorf("got %d, want %d", status, test.want)
				}
			})
		}
	}
	for origin, want := range map[string]bool{"": true, l.url: true, "http://evil.example.com": false, "null": false} {
		header := http.Header{"Authorization": {"token " + l.token}}
		if origin != "" {
			header.Set("Origin", origin)
		}
		ws, _, err := websocket.Dial(t.Context(), l.url+"/jupyter/edge"+kernel+"/channels", &websocket.DialOptions{HTTPHeader: header})
		if (err == nil) != want {
			t.Errorf("from origin %q: %v", origin, err)
		}
		if err == nil {
			ws.CloseNow()
		}
	}
}

func TestJupyterREST(t *testing.T) {
	l := newLab(t)
	s, base := l.testServer, "/jupyter/edge/api"
	kernel := base + "/kernels/" + l.kernel
	get := func(path string, want int, parts ...string) string {
		t.Helper()
		resp, text := rest(t, s, l.token, "GET", path, "")
		wantStatus(t, resp, text, want)
		for _, part := range parts {
			if !strings.Contains(text, part) {
				t.Errorf("%s: %q not in %s", path, part, text)
			}
		}
		return text
	}
	do := func(method, path, body string, want int) string {
		t.Helper()
		resp, text := rest(t, s, l.token, method, path, body)
		wantStatus(t, resp, text, want)
		return text
	}
	get(base, 200, `"version"`)
	get(base+"/", 200, `"version"`)
	get(base+"/status", 200, `"kernels":1`)
	get(base+"/me", 200, `"username":"ana"`)
	get(base+"/kernelspecs", 200, `"default":"python3"`, `"display_name":"Simulated 3"`, `"logo-64x64":"/jupyter/edge/kernelspecs/python3/logo-64x64.png"`, `"debugger":true`)
	get(base+"/kernelspecs/python3", 200, `"language":"python"`)
	get(base+"/kernelspecs/julia", 404)
	get("/jupyter/edge/kernelspecs/python3/logo-64x64.png", 200, "PNG")
	get("/jupyter/edge/kernelspecs/python3/kernel.json", 404)
	get(base+"/kernels", 200, l.kernel)
	get(kernel, 200, `"name":"python3"`, `"execution_state":"idle"`, `"connections":0`, `Z"`)
	if env := l.host.Environment(l.kernel); env["KERNEL_USERNAME"] != "ana" {
		t.Errorf("environment %v", env)
	}
	do("POST", kernel+"/interrupt", "{}", 204)
	do("POST", kernel+"/restart", "{}", 200)
	do("POST", base+"/kernels", `{"name":"julia"}`, 400)
	do("POST", base+"/kernels", `{"name":`, 400)
	do("POST", base+"/kernels", `{"env":{"A":1}}`, 400)
	do("PUT", kernel, "", 404)

	made := do("POST", base+"/sessions", `{"path":"a.ipynb","type":"notebook","name":"a","kernel":{"name":"python3"}}`, 201)
	var session struct {
		ID     string
		Kernel struct{ ID string }
	}
	if err := json.Unmarshal([]byte(made), &session); err != nil || session.Kernel.ID == "" {
		t.Fatalf("%v: %s", err, made)
	}
	if again := do("POST", base+"/sessions", `{"path":"a.ipynb","type":"notebook","kernel":{"name":"python3"}}`, 201); !strings.Contains(again, session.ID) || !strings.Contains(again, session.Kernel.ID) {
		t.Errorf("the same path once more: %s", again)
	}
	get(base+"/sessions", 200, session.ID, `"notebook":{"name":"a","path":"a.ipynb"}`)
	do("PATCH", base+"/sessions/"+session.ID, `{"path":"b.ipynb"}`, 200)
	get(base+"/sessions/"+session.ID, 200, "b.ipynb", session.Kernel.ID)
	moved := do("PATCH", base+"/sessions/"+session.ID, `{"kernel":{"name":"python3"}}`, 200)
	if strings.Contains(moved, session.Kernel.ID) {
		t.Errorf("with another kernel: %s", moved)
	}
	get(base+"/kernels/"+session.Kernel.ID, 404)
	do("PATCH", base+"/sessions/"+session.ID, `{"kernel":{"id":"`+l.kernel+`"}}`, 200)
	do("DELETE", base+"/sessions/"+session.ID, "", 204)
	get(base+"/sessions/"+session.ID, 404)
	get(kernel, 404) // went with its session
	get(base+"/sessions", 200, "[]")

	resp, text := rest(t, s, l.token, "POST", base+"/kernels", "")
	wantStatus(t, resp, text, 201)
	var model struct{ ID string }
	if err := json.Unmarshal([]byte(text), &model); err != nil {
		t.Fatal(err)
	}
	kernel = base + "/kernels/" + model.ID
	s.hub.Disconnect(l.agent.id, nil)
	for deadline := time.Now().Add(time.Minute); s.hub.Online() > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the agent stays online")
		}
	}
	for _, path := range []string{kernel, kernel + "/channels", base + "/kernels", base + "/kernelspecs", base + "/sessions", base + "/status"} {
		resp, text := rest(t, s, l.token, "GET", path, "")
		wantStatus(t, resp, text, 503)
		if resp.Header.Get("Retry-After") == "" {
			t.Errorf("%s: no Retry-After", path)
		}
	}
	do("DELETE", kernel, "", 503)
	l.agent.attach(t)
	do("DELETE", kernel, "", 204)
	do("DELETE", kernel, "", 404)
}

func TestJupyterChannels(t *testing.T) {
	l := newLab(t)
	for _, v1 := range []bool{false, true} {
		t.Run(fmt.Sprintf("v1=%v", v1), func(t *testing.T) {
			c := l.dial(t, fmt.Sprint("client ", v1), v1)
			info := c.ask(jupyter.Control, "kernel_info_request", nil)
			all := c.until(idle(info))
			var order []string
			for _, m := range all {
				h, _ := jupyter.ParseHeader(m.Header)
				order = append(order, m.Channel+" "+h.Type)
			}
			if got := strings.Join(order, ", "); got != "iopub status, control kernel_info_reply, iopub status" {
				t.Errorf("got %s", got)
			}
			all = c.until(idle(c.execute("print hello\nbuffers\nvalue 42")))
			if printed(all) != "hello\n" {
				t.Errorf("printed %q", printed(all))
			}
			found := false
			for _, m := range all {
				found = found || len(m.Buffers) == 2 && bytes.Equal(m.Buffers[0], []byte{0, 1, 2}) && bytes.Equal(m.Buffers[1], []byte{0xff})
			}
			if !found {
				t.Error("the buffers did not arrive")
			}
			id := c.execute("input")
			asked := c.until(func(m *posternv1.KernelMessage, h, _ jupyter.Header) bool { return h.Type == "input_request" })
			if m := asked[len(asked)-1]; m.Channel != jupyter.Stdin {
				t.Errorf("asked on %s", m.Channel)
			}
			c.ask(jupyter.Stdin, "input_reply", map[string]string{"value": "Ana"})
			if got := printed(c.until(idle(id))); got != "got Ana\n" {
				t.Errorf("printed %q", got)
			}
			id = c.execute("sleep")
			c.until(func(_ *posternv1.KernelMessage, h, _ jupyter.Header) bool { return h.Type == "execute_input" })
			resp, text := rest(t, l.testServer, l.token, "POST", "/jupyter/edge/api/kernels/"+l.kernel+"/interrupt", "")
			wantStatus(t, resp, text, 204)
			c.until(idle(id))
		})
	}
	entries := audited(t, l.testServer, "kernel.execute")
	if len(entries) != 6 || entries[0].Statement != "print hello\nbuffers\nvalue 42" || entries[0].Actor != "token ana" || entries[0].Target != l.kernel || entries[0].SessionID == "" {
		t.Errorf("%d audit entries: %+v", len(entries), entries)
	}
	if n := len(audited(t, l.testServer, "kernel.attach")); n != 2 {
		t.Errorf("%d entries of attaching, want 2", n)
	}
}

func TestJupyterTwoClientsOnOneKernel(t *testing.T) {
	l := newLab(t)
	a, b := l.dial(t, "a", false), l.dial(t, "b", true)
	id := a.execute("print shared")
	ofA, ofB := a.until(idle(id)), b.until(idle(id))
	if printed(ofA) != "shared\n" || printed(ofB) != "shared\n" {
		t.Errorf("printed %q and %q", printed(ofA), printed(ofB))
	}
	replies := func(all []*posternv1.KernelMessage) (n int) {
		for _, m := range all {
			if m.Channel == jupyter.Shell {
				n++
			}
		}
		return n
	}
	if replies(ofA) != 1 || replies(ofB) != 0 {
		t.Errorf("replies: %d for who asked, %d for the other", replies(ofA), replies(ofB))
	}
}

// lines wants every line of a flood once, in order.
func lines(t *testing.T, text string, n int) {
	t.Helper()
	got := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	for i, line := range got {
		if i >= n || !strings.HasPrefix(line, fmt.Sprintf("%08d", i)) {
			t.Fatalf("line %d of %d is %.20q", i, len(got), line)
		}
	}
	if len(got) != n {
		t.Fatalf("%d lines, want %d", len(got), n)
	}
}

func TestJupyterNothingIsLostWithTheAgent(t *testing.T) {
	l := newLab(t)
	c := l.dial(t, "", true)
	const n = 5000
	id := c.execute(fmt.Sprintf("flood %d 200", n))
	var all []*posternv1.KernelMessage
	for i := range 5 {
		all = append(all, c.until(func(m *posternv1.KernelMessage, h, _ jupyter.Header) bool {
			return strings.Contains(string(m.Content), fmt.Sprintf("%08d", 500*(i+1)))
		})...)
		if i == 3 { // the whole tunnel, with time in between
			l.hub.Disconnect(l.agent.id, nil)
			c.execute("print while away")
			l.agent.attach(t)
		} else {
			l.host.Drop()
		}
	}
	all = append(all, c.until(idle(id))...)
	lines(t, printed(all), n)
	c.until(func(m *posternv1.KernelMessage, _, _ jupyter.Header) bool {
		return strings.Contains(string(m.Content), "while away")
	})
	if ran := l.host.Ran(l.kernel); len(ran) != 2 {
		t.Errorf("the kernel ran %q", ran)
	}
}

func TestJupyterClientComesBack(t *testing.T) {
	l := newLab(t)
	c := l.dial(t, "lab-1", false)
	c.until(idle(c.ask(jupyter.Shell, "kernel_info_request", nil)))
	c.execute("print first")
	seen := printed(c.until(func(_ *posternv1.KernelMessage, h, _ jupyter.Header) bool { return h.Type == "execute_reply" }))
	other := l.dial(t, "", false)
	if err := c.ws.Close(websocket.StatusNormalClosure, ""); err != nil {
		t.Fatal(err)
	}
	const n = 2000
	id := other.execute(fmt.Sprintf("flood %d 100", n)) // while it is away
	other.until(idle(id))
	c = l.dial(t, "lab-1", false)
	all := c.until(idle(id))
	rest, ok := strings.CutPrefix(seen+printed(all), "first\n")
	if !ok {
		t.Fatalf("got %.40q first", seen)
	}
	lines(t, rest, n)

	// In the middle of output and without a word: what it has read is not sent again,
	// as far as its pongs tell.
	id = other.execute(fmt.Sprintf("flood %d 100", n))
	all = c.until(func(m *posternv1.KernelMessage, _, _ jupyter.Header) bool {
		return strings.Contains(string(m.Content), "00000700")
	})
	c.ws.CloseNow()
	other.until(idle(id))
	c = l.dial(t, "lab-1", false)
	text := printed(all)
	for _, line := range strings.Split(strings.TrimSuffix(printed(c.until(idle(id))), "\n"), "\n") {
		if !strings.Contains(text, line[:8]) {
			text += line + "\n"
		}
	}
	lines(t, text, n)

	// A newer connection takes the older's place.
	newer := l.dial(t, "lab-1", false)
	if _, _, _, err := c.read(t.Context()); err == nil {
		t.Error("the older connection goes on")
	}
	newer.until(idle(newer.execute("print on")))
}

// TestJupyterNamelessClientComesBack is a gateway client, which gives no session_id,
// whose connection broke.
func TestJupyterNamelessClientComesBack(t *testing.T) {
	l := newLab(t)
	other := l.dial(t, "other", false)
	c := l.dial(t, "", false)
	const n = 3000
	id := c.execute(fmt.Sprintf("flood %d 100", n))
	text := printed(c.until(func(m *posternv1.KernelMessage, _, _ jupyter.Header) bool {
		return strings.Contains(string(m.Content), "00000900")
	}))
	c.ws.CloseNow()
	other.until(idle(id))
	c = l.dial(t, "", false)
	replied := false
	all := c.until(func(m *posternv1.KernelMessage, h, p jupyter.Header) bool {
		replied = replied || m.Channel == jupyter.Shell && p.ID == id
		return idle(id)(m, h, p)
	})
	for _, line := range strings.Split(strings.TrimSuffix(printed(all), "\n"), "\n") {
		if !strings.Contains(text, line[:8]) { // see TestJupyterClientComesBack
			text += line + "\n"
		}
	}
	lines(t, text, n)
	if !replied {
		t.Error("the reply did not come")
	}
	// One that has said goodbye is another client the next time.
	if err := c.ws.Close(websocket.StatusNormalClosure, ""); err != nil {
		t.Fatal(err)
	}
	other.until(idle(other.execute("print meanwhile")))
	c = l.dial(t, "", false)
	if got := printed(c.until(idle(c.execute("print fresh")))); got != "fresh\n" {
		t.Errorf("printed %q", got)
	}
}

func TestJupyterConnectionsEnd(t *testing.T) {
	l := newLab(t)
	ends := func(name string, want websocket.StatusCode, f func(c *client)) {
		t.Run(name, func(t *testing.T) {
			c := l.dial(t, "", false)
			c.until(idle(c.ask(jupyter.Shell, "kernel_info_request", nil)))
			f(c)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			for {
				if _, _, _, err := c.read(ctx); err != nil {
					if got := websocket.CloseStatus(err); got != want {
						t.Errorf("got %v (%v), want %v", got, err, want)
					}
					break
				}
			}
		})
	}
	ends("no JSON", websocket.StatusInvalidFramePayloadData, func(c *client) { c.ws.Write(t.Context(), websocket.MessageText, []byte("{")) })
	ends("no channel of ours", websocket.StatusInvalidFramePayloadData, func(c *client) {
		m, _ := jupyter.New("iopub", "status", "x", nil)
		c.send(m)
	})
	ends("too large", websocket.StatusMessageTooBig, func(c *client) {
		c.ws.Write(t.Context(), websocket.MessageText, make([]byte, jupyter.MaxMessage+2))
	})
	ends("the kernel is stopped", websocket.StatusNormalClosure, func(*client) {
		resp, text := rest(t, l.testServer, l.token, "DELETE", "/jupyter/edge/api/kernels/"+l.kernel, "")
		wantStatus(t, resp, text, 204)
	})
	resp, text := rest(t, l.testServer, l.token, "POST", "/jupyter/edge/api/kernels", "")
	wantStatus(t, resp, text, 201)
	var model struct{ ID string }
	if err := json.Unmarshal([]byte(text), &model); err != nil {
		t.Fatal(err)
	}
	l.kernel = model.ID
	ends("the token is revoked", websocket.StatusPolicyViolation, func(*client) {
		_, err := posternv1connect.NewTokenServiceClient(as(l.testServer.token), l.url).RevokeToken(t.Context(), connect.NewRequest(&posternv1.RevokeTokenRequest{Token: "ana"}))
		if err != nil {
			t.Fatal(err)
		}
	})
}
