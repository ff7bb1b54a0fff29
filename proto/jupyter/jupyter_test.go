package jupyter

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"os/exec"
	"strings"
	"testing"

	gproto "google.golang.org/protobuf/proto"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func sample(buffers ...string) *posternv1.KernelMessage {
	m := &posternv1.KernelMessage{
		Channel:      IOPub,
		Header:       []byte(`{"msg_id": "a_1", "session": "s", "username": "u", "date": "2026-01-02T03:04:05Z", "msg_type": "stream", "version": "5.3"}`),
		ParentHeader: []byte(`{"msg_id": "p", "session": "c"}`), Metadata: []byte(`{}`), Content: []byte(`{"name": "stdout", "text": "grüße\n"}`),
	}
	for _, b := range buffers {
		m.Buffers = append(m.Buffers, []byte(b))
	}
	return m
}

// session runs a program with jupyter_client's own coder, as "Session" with key
// "k", and returns what it prints. Debian's Python is there wherever the tests run
// (packaging/dev/deps.sh).
func session(t *testing.T, program, in string) string {
	t.Helper()
	c := exec.Command("/usr/bin/python3", "-c", "import sys,json,base64\nfrom jupyter_client.session import Session\nS=Session(key=b'k',session='c')\n"+program)
	c.Stdin = strings.NewReader(in)
	var stderr bytes.Buffer
	c.Stderr = &stderr
	out, err := c.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, stderr.String())
	}
	return strings.TrimSpace(string(out))
}

func TestSignatureIsJupytersOwn(t *testing.T) {
	s, err := NewSigner(Scheme, "k")
	if err != nil {
		t.Fatal(err)
	}
	m := sample("one", "")
	frames, err := json.Marshal(s.Frames([][]byte{[]byte("id")}, m))
	if err != nil {
		t.Fatal(err)
	}
	got := session(t, `
frames=[base64.b64decode(f) for f in json.load(sys.stdin)]
ids,rest=S.feed_identities(frames)
m=S.deserialize(rest)
print(ids, m['msg_type'], m['content']['text'].strip(), m['parent_header']['msg_id'], [bytes(b) for b in m['buffers']])
`, string(frames))
	if want := "[b'id'] stream grüße p [b'one', b'']"; got != want {
		t.Errorf("jupyter_client read %q, want %q", got, want)
	}
	got = session(t, `
m=S.msg('execute_request',{'code':'é'})
f=[b'x']+S.serialize(m)+[b'buf']
print(json.dumps([base64.b64encode(bytes(p)).decode() for p in f]))
`, "")
	var theirs [][]byte
	if err := json.Unmarshal([]byte(got), &theirs); err != nil {
		t.Fatal(err)
	}
	ids, read, err := s.Message(theirs)
	if err != nil || len(ids) != 1 || string(ids[0]) != "x" || len(read.Buffers) != 1 {
		t.Fatalf("message of jupyter_client: %q, %v, %v", ids, read, err)
	}
	if h, err := ParseHeader(read.Header); err != nil || h.Type != "execute_request" || h.Session != "c" || h.ID == "" {
		t.Errorf("header is %+v, %v", h, err)
	}
	theirs[5] = bytes.Replace(theirs[5], []byte("{"), []byte("{ "), 1)
	if _, _, err := s.Message(theirs); !errors.Is(err, ErrSignature) {
		t.Errorf("changed content: %v, want ErrSignature", err)
	}
	other, _ := NewSigner(Scheme, "other")
	if _, _, err := other.Message(s.Frames(nil, m)); !errors.Is(err, ErrSignature) {
		t.Errorf("another key: %v, want ErrSignature", err)
	}
	open, _ := NewSigner(Scheme, "")
	if _, back, err := open.Message(open.Frames(nil, m)); err != nil || !bytes.Equal(back.Content, m.Content) {
		t.Errorf("without a key: %v, %v", back, err)
	}
	if _, err := NewSigner("hmac-md5", "k"); err == nil {
		t.Error("hmac-md5 was taken")
	}
}

func TestWireRefuses(t *testing.T) {
	s, _ := NewSigner(Scheme, "")
	f := func(parts ...string) (out [][]byte) {
		for _, p := range parts {
			out = append(out, []byte(p))
		}
		return out
	}
	many := f("<IDS|MSG>", "", "{}", "{}", "{}", "{}")
	for range MaxBuffers + 1 {
		many = append(many, nil)
	}
	for name, c := range map[string]struct {
		frames [][]byte
		want   error
	}{
		"nothing":          {nil, ErrMalformed},
		"no delimiter":     {f("a", "b", "c"), ErrMalformed},
		"short":            {f("<IDS|MSG>", "", "{}", "{}", "{}"), ErrMalformed},
		"many identities":  {append(bytes.Split(bytes.Repeat([]byte("i,"), 40), []byte(",")), f("<IDS|MSG>", "", "{}", "{}", "{}", "{}")...), ErrMalformed},
		"many buffers":     {many, ErrTooLarge},
		"too large a part": {append(f("<IDS|MSG>", "", "{}", "{}", "{}", "{}"), make([]byte, MaxMessage+1)), ErrTooLarge},
	} {
		if _, _, err := s.Message(c.frames); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

func TestWebSocketForms(t *testing.T) {
	for name, m := range map[string]*posternv1.KernelMessage{"plain": sample(), "buffers": sample("one", "", "three")} {
		v1, err := EncodeV1(m)
		if err != nil {
			t.Fatal(err)
		}
		if back, err := DecodeV1(v1); err != nil || !gproto.Equal(back, m) {
			t.Errorf("%s, v1: %v, %v", name, back, err)
		}
		data, isBinary, err := EncodeLegacy(m)
		if err != nil || isBinary != (len(m.Buffers) > 0) {
			t.Fatalf("%s: binary %v, %v", name, isBinary, err)
		}
		if back, err := DecodeLegacy(data, isBinary); err != nil || !gproto.Equal(back, m) {
			t.Errorf("%s, legacy: %v, %v", name, back, err)
		}
	}
	// As jupyter_server's deserialize_msg_from_ws_v1 reads it.
	v1, _ := EncodeV1(sample("B"))
	if n := binary.LittleEndian.Uint64(v1); n != 7 {
		t.Errorf("%d offsets, want 7", n)
	}
	last := binary.LittleEndian.Uint64(v1[8*7:])
	buffer := binary.LittleEndian.Uint64(v1[8*6:])
	if string(v1[buffer:last]) != "B" || int(last) != len(v1) {
		t.Errorf("the buffer is %q", v1[buffer:last])
	}
	// As notebook's deserialize_binary_message reads it.
	data, _, _ := EncodeLegacy(sample("B"))
	if n := binary.BigEndian.Uint32(data); n != 2 {
		t.Errorf("%d parts, want 2", n)
	}
	var l struct {
		ID      string `json:"msg_id"`
		Type    string `json:"msg_type"`
		Channel string `json:"channel"`
	}
	if err := json.Unmarshal(data[binary.BigEndian.Uint32(data[4:]):binary.BigEndian.Uint32(data[8:])], &l); err != nil || l.ID != "a_1" || l.Type != "stream" || l.Channel != IOPub {
		t.Errorf("legacy JSON has %+v, %v", l, err)
	}
	bad := sample()
	bad.Content = []byte("{\"text\": \"a\xffb\"}")
	if data, _, err := EncodeLegacy(bad); err != nil || !bytes.Contains(data, []byte("a\ufffdb")) {
		t.Errorf("text that is no UTF-8: %q, %v", data, err)
	}
	bad.Content = []byte(`{"a":}`)
	if _, _, err := EncodeLegacy(bad); !errors.Is(err, ErrMalformed) {
		t.Errorf("content that is no JSON: %v", err)
	}
}

func TestWebSocketRefuses(t *testing.T) {
	for name, data := range map[string][]byte{
		"nothing": nil, "cut": {0, 0, 0}, "no offsets": {0, 0, 0, 0}, "beyond": {0, 0, 0, 9, 1, 2},
		"offsets not in order": append([]byte{0, 0, 0, 2, 0, 0, 0, 13, 0, 0, 0, 12}, "{}{}"...),
	} {
		if _, err := DecodeLegacy(data, true); !errors.Is(err, ErrMalformed) {
			t.Errorf("legacy, %s: %v", name, err)
		}
		if _, err := DecodeV1(data); !errors.Is(err, ErrMalformed) {
			t.Errorf("v1, %s: %v", name, err)
		}
	}
	good, _ := EncodeV1(sample())
	for i := range good {
		if _, err := DecodeV1(good[:i]); err == nil {
			t.Fatalf("v1 cut to %d bytes was read", i)
		}
	}
	if _, err := DecodeV1(append(good, 'x')); !errors.Is(err, ErrMalformed) {
		t.Errorf("v1 with more behind: %v", err)
	}
	if _, err := DecodeLegacy([]byte(`[1]`), false); !errors.Is(err, ErrMalformed) {
		t.Error("a list was read")
	}
}

func TestCheck(t *testing.T) {
	ok := func() *posternv1.KernelMessage {
		m, err := New(Shell, "execute_request", "s", map[string]any{"code": "1"})
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	if h, err := Check(ok()); err != nil || h.Type != "execute_request" || h.Session != "s" || len(h.ID) != 36 || h.Version != ProtocolVersion {
		t.Errorf("a good message: %+v, %v", h, err)
	}
	m := ok()
	m.ParentHeader, m.Metadata, m.Content = nil, []byte("null"), nil
	if _, err := Check(m); err != nil || string(m.Metadata) != "{}" || string(m.Content) != "{}" {
		t.Errorf("null parts: %v, %v", m, err)
	}
	for name, c := range map[string]struct {
		change func(*posternv1.KernelMessage)
		want   error
	}{
		"iopub":            {func(m *posternv1.KernelMessage) { m.Channel = IOPub }, ErrMalformed},
		"hb":               {func(m *posternv1.KernelMessage) { m.Channel = "hb" }, ErrMalformed},
		"no id":            {func(m *posternv1.KernelMessage) { m.Header = []byte(`{"msg_type":"x"}`) }, ErrMalformed},
		"no type":          {func(m *posternv1.KernelMessage) { m.Header = []byte(`{"msg_id":"x"}`) }, ErrMalformed},
		"header of a list": {func(m *posternv1.KernelMessage) { m.Header = []byte(`[]`) }, ErrMalformed},
		"large header":     {func(m *posternv1.KernelMessage) { m.Header = make([]byte, MaxHeader+1) }, ErrTooLarge},
		"content no dict":  {func(m *posternv1.KernelMessage) { m.Content = []byte(`1`) }, ErrMalformed},
		"content cut":      {func(m *posternv1.KernelMessage) { m.Content = []byte(`{"a":`) }, ErrMalformed},
		"parent no dict":   {func(m *posternv1.KernelMessage) { m.ParentHeader = []byte(`"x"`) }, ErrMalformed},
		"large":            {func(m *posternv1.KernelMessage) { m.Buffers = [][]byte{make([]byte, MaxMessage)} }, ErrTooLarge},
	} {
		m := ok()
		c.change(m)
		if _, err := Check(m); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

func TestConnection(t *testing.T) {
	in := Connection{Transport: "ipc", IP: "/run/k/z", ShellPort: 1, IOPubPort: 2, StdinPort: 3, ControlPort: 4, HeartbeatPort: 5, SignatureScheme: Scheme, Key: "k"}
	text, err := in.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := ParseConnection(text); err != nil || got != in {
		t.Errorf("it came back as %+v, %v", got, err)
	}
	if got, want := in.Endpoint(in.IOPubPort), "ipc:///run/k/z-2"; got != want {
		t.Errorf("endpoint %q, want %q", got, want)
	}
	in.Transport, in.IP = "tcp", "::1"
	if got, want := in.Endpoint(7), "tcp://[::1]:7"; got != want {
		t.Errorf("endpoint %q, want %q", got, want)
	}
	for name, text := range map[string]string{
		"no JSON": "x", "no ip": `{"shell_port":1}`, "no ports": `{"ip":"127.0.0.1"}`, "transport": `{"transport":"udp","ip":"x"}`,
		"scheme": `{"ip":"x","shell_port":1,"iopub_port":1,"stdin_port":1,"control_port":1,"hb_port":1,"key":"k","signature_scheme":"hmac-md5"}`,
		"large":  strings.Repeat(" ", maxConnection+1),
	} {
		if _, err := ParseConnection([]byte(text)); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
}

func FuzzWebSocket(f *testing.F) {
	for _, m := range []*posternv1.KernelMessage{sample(), sample("one", "")} {
		v1, _ := EncodeV1(m)
		data, isBinary, _ := EncodeLegacy(m)
		f.Add(v1, true)
		f.Add(data, isBinary)
	}
	f.Add([]byte(`{"header":null,"channel":"shell"}`), false)
	f.Fuzz(func(t *testing.T, data []byte, isBinary bool) {
		if m, err := DecodeV1(data); err == nil {
			again, err := EncodeV1(m)
			if err != nil {
				t.Fatal(err)
			}
			back, err := DecodeV1(again)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range []*posternv1.KernelMessage{m, back} { // null and nothing became {}
				m.Header, m.ParentHeader, m.Metadata, m.Content = dict(m.Header), dict(m.ParentHeader), dict(m.Metadata), dict(m.Content)
			}
			if !gproto.Equal(back, m) {
				t.Fatalf("v1 came back as %v, was %v", back, m)
			}
			_, _ = Check(m)
		}
		if m, err := DecodeLegacy(data, isBinary); err == nil {
			_, _ = Check(m)
			again, isBinary, err := EncodeLegacy(m)
			if err != nil {
				return // its header may be of another kind
			}
			if back, err := DecodeLegacy(again, isBinary); err != nil || back.Channel != strings.ToValidUTF8(m.Channel, "\ufffd") {
				t.Fatalf("legacy came back as %v, %v", back, err)
			}
		}
	})
}

func FuzzZeroMQ(f *testing.F) {
	s, _ := NewSigner(Scheme, "k")
	f.Add(bytes.Join(s.Frames([][]byte{[]byte("id")}, sample("b")), []byte{0}), false)
	f.Add(bytes.Join(s.Frames(nil, sample()), []byte{0}), true)
	open, _ := NewSigner(Scheme, "")
	f.Fuzz(func(t *testing.T, data []byte, signed bool) {
		signer := open
		if signed {
			signer = s
		}
		ids, m, err := signer.Message(bytes.Split(data, []byte{0}))
		if err != nil {
			return
		}
		m.Header, m.ParentHeader, m.Metadata, m.Content = dict(m.Header), dict(m.ParentHeader), dict(m.Metadata), dict(m.Content)
		ids2, back, err := signer.Message(signer.Frames(ids, m))
		if err != nil || len(ids2) != len(ids) || !gproto.Equal(m, back) {
			t.Fatalf("came back as %v, %v", back, err)
		}
		_, _ = ParseHeader(m.Header)
		_, _ = Check(m)
	})
}

func FuzzConnection(f *testing.F) {
	f.Add([]byte(`{"ip":"x","shell_port":1,"iopub_port":1,"stdin_port":1,"control_port":1,"hb_port":1,"key":"k"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := ParseConnection(data)
		if err != nil {
			return
		}
		text, err := c.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if back, err := ParseConnection(text); err != nil || back != c {
			t.Fatalf("came back as %+v, %v; was %+v", back, err, c)
		}
	})
}

// TestDateAsNumber is what jupyter_server's gateway client sends.
func TestDateAsNumber(t *testing.T) {
	for text, want := range map[string]string{
		`{"msg_id":"a","msg_type":"b","session":"c","date":1763798525.4}`:                      "",
		`{"msg_id":"a","msg_type":"b","session":"c","date":null}`:                              "",
		`{"msg_id":"a","msg_type":"b","session":"c","date":"2026-11-22T08:00:00Z"}`:            "2026-11-22T08:00:00Z",
		`{"msg_id":"a","msg_type":"b","session":"c","username":"u","version":"5.3","date":{}}`: "",
	} {
		h, err := ParseHeader([]byte(text))
		if err != nil || h.ID != "a" || h.Type != "b" || h.Session != "c" || h.Date != want {
			t.Errorf("%s: got %+v, %v", text, h, err)
		}
	}
}
