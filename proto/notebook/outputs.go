package notebook

import (
	"encoding/json"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/postern-dev/postern/proto/jupyter"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// MaxOutput bounds what is kept of one cell's outputs, in bytes; what is beyond is
// replaced by a line that says so.
const MaxOutput = 32 << 20

// Output is one output of a code cell. Its JSON is that of nbformat 4: keys in
// alphabetical order, texts as lists of lines.
type Output struct {
	// Kind is stream, display_data, execute_result or error.
	Kind string
	// Name is stdout or stderr, Text what was written (stream).
	Name, Text string
	// Count is the execution count (execute_result).
	Count int
	// Data and Metadata are a MIME bundle: type to JSON value.
	Data, Metadata map[string]json.RawMessage
	// Class, Value and Traceback are an exception (error).
	Class, Value string
	Traceback    []string

	display string // the display id, for update_display_data
	stream  *strings.Builder
}

// MarshalJSON implements json.Marshaler.
func (o Output) MarshalJSON() ([]byte, error) {
	fields := map[string]any{"output_type": o.Kind}
	switch o.Kind {
	case "stream":
		fields["name"], fields["text"] = o.Name, lines(o.text())
	case "error":
		trace := o.Traceback
		if trace == nil {
			trace = []string{}
		}
		fields["ename"], fields["evalue"], fields["traceback"] = o.Class, o.Value, trace
	default:
		data, err := splitBundle(o.Data)
		if err != nil {
			return nil, err
		}
		meta := o.Metadata
		if meta == nil {
			meta = map[string]json.RawMessage{}
		}
		fields["data"], fields["metadata"] = data, meta
		if o.Kind == "execute_result" {
			fields["execution_count"] = o.Count
		}
	}
	var b strings.Builder
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	err := e.Encode(fields)
	return []byte(b.String()), err
}

func (o Output) text() string {
	if o.stream != nil {
		return o.stream.String()
	}
	return o.Text
}

// splitBundle holds texts as lists of lines, as Jupyter's files do.
func splitBundle(bundle map[string]json.RawMessage) (map[string]any, error) {
	out := make(map[string]any, len(bundle))
	for kind, raw := range bundle {
		out[kind] = raw
		if !strings.HasPrefix(kind, "text/") && kind != "application/javascript" && kind != "image/svg+xml" {
			continue
		}
		if len(raw) > 0 && raw[0] == '"' {
			var text string
			if err := json.Unmarshal(raw, &text); err != nil {
				return nil, err
			}
			out[kind] = lines(text)
		}
	}
	return out, nil
}

// lines splits a text after its line ends, where Python's splitlines does.
func lines(text string) []string {
	out := []string{}
	from := 0
	for i := 0; i < len(text); {
		r, n := utf8.DecodeRuneInString(text[i:])
		i += n
		switch r {
		case '\r':
			if i < len(text) && text[i] == '\n' {
				i++
			}
		case '\n', '\v', '\f', 0x1c, 0x1d, 0x1e, 0x85, 0x2028, 0x2029:
		default:
			continue
		}
		out = append(out, text[from:i])
		from = i
	}
	if from < len(text) {
		out = append(out, text[from:])
	}
	return out
}

// Outputs gathers what a kernel sends for one cell; the zero value is ready. What it
// keeps is bounded by MaxOutput.
type Outputs struct {
	most      int // 0: MaxOutput
	list      []Output
	bytes     int
	dropped   int
	clearNext bool
	count     int
}

// Take takes a message of the iopub channel that answers the cell's request. It
// reports whether what List returns has changed. A message that it does not know is
// ignored, a malformed one is an error.
func (o *Outputs) Take(m *posternv1.KernelMessage) (changed bool, err error) {
	header, err := jupyter.ParseHeader(m.GetHeader())
	if err != nil {
		return false, err
	}
	var content struct {
		Name      string                     `json:"name"`
		Text      string                     `json:"text"`
		Data      map[string]json.RawMessage `json:"data"`
		Metadata  map[string]json.RawMessage `json:"metadata"`
		Transient struct {
			Display string `json:"display_id"`
		} `json:"transient"`
		Count     int      `json:"execution_count"`
		Class     string   `json:"ename"`
		Value     string   `json:"evalue"`
		Traceback []string `json:"traceback"`
		Wait      bool     `json:"wait"`
	}
	switch header.Type {
	case "stream", "display_data", "update_display_data", "execute_result", "error", "clear_output", "execute_input":
	default:
		return false, nil
	}
	if err := json.Unmarshal(m.GetContent(), &content); err != nil {
		return false, fmt.Errorf("the kernel's %s message: %w", header.Type, err)
	}
	switch header.Type {
	case "execute_input":
		o.count = content.Count
		return false, nil
	case "clear_output":
		if content.Wait {
			o.clearNext = true
			return false, nil
		}
		o.clear()
		return true, nil
	case "update_display_data":
		return o.update(content.Transient.Display, content.Data, content.Metadata), nil
	}
	if o.clearNext {
		o.clear()
	}
	size := len(m.GetContent())
	if o.bytes+size > o.limit() {
		o.dropped += size
		return true, nil
	}
	o.bytes += size
	if header.Type == "stream" {
		o.append(content.Name, content.Text)
		return true, nil
	}
	o.list = append(o.list, Output{
		Kind: header.Type, Count: content.Count, Data: content.Data, Metadata: content.Metadata,
		Class: content.Class, Value: content.Value, Traceback: content.Traceback, display: content.Transient.Display,
	})
	return true, nil
}

func (o *Outputs) limit() int {
	if o.most > 0 {
		return o.most
	}
	return MaxOutput
}

// Piece is what one message of the iopub channel says of a cell's outputs.
type Piece struct {
	// Output in the form of nbformat, JSON; nil: none.
	Output []byte
	// Clear: what was there goes, at once or with the next output.
	Clear, ClearWithNext bool
	// Display is the display id; with Update the output takes the place of what was
	// displayed under it.
	Display string
	Update  bool
}

// PieceOf reads a message; ok is false for one that says nothing of outputs.
func PieceOf(m *posternv1.KernelMessage) (p Piece, ok bool) {
	header, err := jupyter.ParseHeader(m.GetHeader())
	if err != nil {
		return p, false
	}
	one := &Outputs{}
	switch header.Type {
	case "clear_output":
		if _, err := one.Take(m); err != nil {
			return p, false
		}
		return Piece{Clear: !one.clearNext, ClearWithNext: one.clearNext}, true
	case "update_display_data":
		p.Update = true
		again := &posternv1.KernelMessage{Content: m.Content, Channel: m.Channel}
		if again.Header, err = json.Marshal(map[string]string{"msg_type": "display_data", "msg_id": header.ID}); err != nil {
			return p, false
		}
		m = again
	}
	if changed, err := one.Take(m); err != nil || !changed || len(one.list) != 1 {
		return p, false
	}
	p.Display = one.list[0].display
	p.Output, err = json.Marshal(one.list[0])
	return p, err == nil
}

// append joins texts of one stream that follow each other.
func (o *Outputs) append(name, text string) {
	if n := len(o.list); n > 0 && o.list[n-1].Kind == "stream" && o.list[n-1].Name == name {
		o.list[n-1].stream.WriteString(text)
		return
	}
	b := &strings.Builder{}
	b.WriteString(text)
	o.list = append(o.list, Output{Kind: "stream", Name: name, stream: b})
}

func (o *Outputs) clear() {
	o.list, o.bytes, o.dropped, o.clearNext = nil, 0, 0, false
}

// update replaces what was displayed under an id.
func (o *Outputs) update(id string, data, metadata map[string]json.RawMessage) bool {
	changed := false
	for i := range o.list {
		if id != "" && o.list[i].display == id {
			o.list[i].Data, o.list[i].Metadata, changed = data, metadata, true
		}
	}
	return changed
}

// Count is the execution count that the kernel gave the cell; 0 before it did.
func (o *Outputs) Count() int { return o.count }

// List is what there is so far; it is the caller's.
func (o *Outputs) List() []Output {
	list := make([]Output, 0, len(o.list)+1)
	for _, out := range o.list {
		if out.stream != nil {
			out.Text, out.stream = out.stream.String(), nil
		}
		list = append(list, out)
	}
	if o.dropped > 0 {
		list = append(list, Output{Kind: "stream", Name: "stderr", Text: fmt.Sprintf(
			"postern: %d bytes of outputs after this are left out: a cell keeps %d MiB\n", o.dropped, o.limit()>>20)})
	}
	return list
}
