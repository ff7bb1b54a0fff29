package notebook

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sort"
	"strings"
)

// MaxFile bounds a notebook file, in bytes.
const MaxFile = 256 << 20

// Cell is one cell of a document.
type Cell struct {
	// ID is the cell's id (nbformat 4.5); "" in older files.
	ID string
	// Kind is code, markdown or raw.
	Kind   string
	Source string
	// ExecutionCount and Outputs are what the file holds of a code cell: raw JSON,
	// nil where the file has none.
	ExecutionCount, Outputs json.RawMessage

	indent  string // of the cell's members
	outputs span
	count   span
	object  span
	empty   bool // the cell's object has no members
}

// span is a part of the file, [from, to).
type span struct{ from, to int }

func (s span) known() bool { return s.to > 0 }

// Document is a notebook file.
type Document struct {
	// Cells in the order of the file, of every kind.
	Cells []Cell
	// Spec and Language are the kernelspec's name and the language that the file
	// asks for; "" if it does not say.
	Spec, Language string

	data   []byte
	indent string // one step
}

// Parse reads a document. An error is one line that says what is wrong and where.
func Parse(data []byte) (*Document, error) {
	if len(data) > MaxFile {
		return nil, fmt.Errorf("the notebook has %d bytes, more than %d", len(data), MaxFile)
	}
	text := bytes.TrimPrefix(data, []byte("\xef\xbb\xbf"))
	if !json.Valid(text) {
		return nil, whereInvalid(text)
	}
	var head struct {
		Format   int               `json:"nbformat"`
		Cells    []json.RawMessage `json:"cells"`
		Sheets   json.RawMessage   `json:"worksheets"`
		Metadata struct {
			Kernelspec struct {
				Name     string `json:"name"`
				Language string `json:"language"`
			} `json:"kernelspec"`
			Language struct {
				Name string `json:"name"`
			} `json:"language_info"`
		} `json:"metadata"`
	}
	if err := json.Unmarshal(text, &head); err != nil {
		return nil, fmt.Errorf("not a notebook: %s", strings.TrimPrefix(err.Error(), "json: "))
	}
	switch {
	case head.Sheets != nil || head.Format != 0 && head.Format < 4:
		return nil, fmt.Errorf("the notebook is in format %d: save it in format 4 (jupyter nbconvert --to notebook)", max(head.Format, 3))
	case head.Format != 4:
		return nil, fmt.Errorf("the notebook is in format %d, and this program knows format 4", head.Format)
	}
	d := &Document{data: data, Spec: head.Metadata.Kernelspec.Name, Language: head.Metadata.Kernelspec.Language}
	if d.Language == "" {
		d.Language = head.Metadata.Language.Name
	}
	s := scanner{text: data, at: len(data) - len(text)}
	d.indent = indentation(data)
	err := s.object(func(key string, _ int) error {
		if key != "cells" {
			s.skip()
			return nil
		}
		return s.array(func() error {
			cell, err := s.cell()
			if err != nil {
				return fmt.Errorf("cell %d of the notebook: %w", len(d.Cells)+1, err)
			}
			d.Cells = append(d.Cells, cell)
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	return d, nil
}

// Of is a document of code cells that is no file: it has no Bytes, and With makes none.
func Of(spec string, sources []string) *Document {
	d := &Document{Spec: spec}
	for _, source := range sources {
		d.Cells = append(d.Cells, Cell{Kind: "code", Source: source})
	}
	return d
}

// Bytes are the file as it was read; the caller must not change them.
func (d *Document) Bytes() []byte { return d.data }

// Code are the indexes of the code cells, in order.
func (d *Document) Code() []int {
	var code []int
	for i, c := range d.Cells {
		if c.Kind == "code" {
			code = append(code, i)
		}
	}
	return code
}

// Result is what a run left of one code cell.
type Result struct {
	// Count is the execution count; 0: the cell did not run.
	Count int
	// Outputs in the form of nbformat.
	Outputs []Output
}

// With is the file with the results written into the code cells that results names
// by index; every other byte is as it was. An index that is no code cell is ignored.
func (d *Document) With(results map[int]Result) ([]byte, error) {
	type edit struct {
		span
		text []byte
	}
	var edits []edit
	for i, r := range results {
		if i < 0 || i >= len(d.Cells) || d.Cells[i].Kind != "code" {
			continue
		}
		c := &d.Cells[i]
		outputs, err := d.outputs(c, r.Outputs)
		if err != nil {
			return nil, fmt.Errorf("outputs of cell %d: %w", i+1, err)
		}
		count := []byte("null")
		if r.Count > 0 {
			count = fmt.Appendf(nil, "%d", r.Count)
		}
		var missing []byte // members that the cell lacks, each with a comma after it
		member := func(at span, key string, value []byte) {
			if at.known() {
				edits = append(edits, edit{at, value})
				return
			}
			missing = fmt.Appendf(missing, "%s\"%s\": %s,", c.indent, key, value)
		}
		member(c.count, "execution_count", count)
		member(c.outputs, "outputs", outputs)
		if missing != nil {
			if c.empty {
				missing = missing[:len(missing)-1]
			}
			at := c.object.from + 1
			edits = append(edits, edit{span{at, at}, missing})
		}
	}
	sort.Slice(edits, func(i, k int) bool { return edits[i].from < edits[k].from })
	out := make([]byte, 0, len(d.data)+4096)
	at := 0
	for _, e := range edits {
		out = append(append(out, d.data[at:e.from]...), e.text...)
		at = e.to
	}
	return append(out, d.data[at:]...), nil
}

// outputs encodes outputs at their place in the file.
func (d *Document) outputs(c *Cell, outputs []Output) ([]byte, error) {
	if len(outputs) == 0 {
		return []byte("[]"), nil
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if strings.HasPrefix(c.indent, "\n") {
		e.SetIndent(c.indent[1:], d.indent)
	}
	if err := e.Encode(outputs); err != nil {
		return nil, err
	}
	return unescapeSeparators(bytes.TrimSuffix(b.Bytes(), []byte("\n"))), nil
}

// unescapeSeparators undoes the one escape that encoding/json insists on and that
// Jupyter's own writer does not make: U+2028 and U+2029.
func unescapeSeparators(text []byte) []byte {
	if !bytes.Contains(text, []byte(`\u202`)) {
		return text
	}
	out := make([]byte, 0, len(text))
	for i := 0; i < len(text); i++ {
		if text[i] != '\\' {
			out = append(out, text[i])
			continue
		}
		switch rest := text[i:]; {
		case bytes.HasPrefix(rest, []byte(`\u2028`)):
			out, i = append(out, "\u2028"...), i+5
		case bytes.HasPrefix(rest, []byte(`\u2029`)):
			out, i = append(out, "\u2029"...), i+5
		default: // a backslash and what it escapes
			out, i = append(out, text[i], text[i+1]), i+1
		}
	}
	return out
}

// indentation is one step of a file's indentation: what stands before its first
// member, or one space, which is what Jupyter writes.
func indentation(data []byte) string {
	open := bytes.IndexByte(data, '{')
	if open < 0 {
		return " "
	}
	rest := data[open+1:]
	space := rest[:len(rest)-len(bytes.TrimLeft(rest, " \t\r\n"))]
	if i := bytes.LastIndexByte(space, '\n'); i >= 0 && i+1 < len(space) {
		return string(space[i+1:])
	}
	return " "
}

// whereInvalid says where a text stops being JSON.
func whereInvalid(text []byte) error {
	if len(bytes.TrimSpace(text)) == 0 {
		return errors.New("the notebook is empty")
	}
	var v any
	err := json.Unmarshal(text, &v)
	var syntax *json.SyntaxError
	if !errors.As(err, &syntax) {
		return fmt.Errorf("not a notebook: %w", err)
	}
	before := text[:min(int(syntax.Offset), len(text))]
	line := bytes.Count(before, []byte("\n")) + 1
	if bytes.Contains(text, []byte("\n<<<<<<< ")) {
		return fmt.Errorf("not a notebook: it has conflict markers of a version control system (line %d: %s)", line, syntax)
	}
	return fmt.Errorf("not a notebook: line %d: %s", line, syntax)
}

// scanner finds where the parts of a valid JSON text are.
type scanner struct {
	text []byte
	at   int
}

func (s *scanner) space() {
	for s.at < len(s.text) {
		switch s.text[s.at] {
		case ' ', '\t', '\n', '\r':
			s.at++
		default:
			return
		}
	}
}

// next is the next byte that is no space; 0 at the end.
func (s *scanner) next() byte {
	s.space()
	if s.at >= len(s.text) {
		return 0
	}
	return s.text[s.at]
}

// str reads a string and returns it decoded.
func (s *scanner) str() string {
	s.space()
	from := s.at
	s.skip()
	var v string
	// The whole text is valid JSON, and this is a string of it.
	_ = json.Unmarshal(s.text[from:s.at], &v)
	return v
}

// skip passes one value of any kind and returns where it was.
func (s *scanner) skip() span {
	s.space()
	from, depth := s.at, 0
	for s.at < len(s.text) {
		switch c := s.text[s.at]; c {
		case '"':
			for s.at++; s.at < len(s.text) && s.text[s.at] != '"'; s.at++ {
				if s.text[s.at] == '\\' {
					s.at++
				}
			}
			s.at++
		case '{', '[':
			depth++
			s.at++
			continue
		case '}', ']':
			depth--
			s.at++
		case ',', ':', ' ', '\t', '\n', '\r':
			s.at++
			continue
		default:
			for s.at < len(s.text) && !bytes.ContainsRune([]byte(",:]} \t\r\n"), rune(s.text[s.at])) {
				s.at++
			}
		}
		if depth <= 0 {
			break
		}
	}
	return span{from, s.at}
}

// object calls member at the value of each member, which it must pass.
func (s *scanner) object(member func(key string, at int) error) error {
	if s.next() != '{' {
		return io.ErrUnexpectedEOF
	}
	s.at++
	for {
		switch s.next() {
		case '}':
			s.at++
			return nil
		case ',':
			s.at++
			continue
		case '"':
		default:
			return io.ErrUnexpectedEOF
		}
		at := s.at
		key := s.str()
		s.next()
		s.at++ // the colon
		s.space()
		if err := member(key, at); err != nil {
			return err
		}
	}
}

// array calls element at each element, which it must pass.
func (s *scanner) array(element func() error) error {
	if s.next() != '[' {
		return errors.New("cells is no list")
	}
	s.at++
	for {
		switch s.next() {
		case ']':
			s.at++
			return nil
		case ',':
			s.at++
		case 0:
			return io.ErrUnexpectedEOF
		default:
			if err := element(); err != nil {
				return err
			}
		}
	}
}

// cell reads one cell.
func (s *scanner) cell() (Cell, error) {
	if s.next() != '{' {
		return Cell{}, errors.New("it is no object")
	}
	c := Cell{object: span{from: s.at}, empty: true}
	err := s.object(func(key string, at int) error {
		if c.empty {
			c.empty = false
			c.indent = string(s.text[c.object.from+1 : at])
		}
		value := s.skip()
		raw := s.text[value.from:value.to]
		switch key {
		case "id":
			return json.Unmarshal(raw, &c.ID)
		case "cell_type":
			return json.Unmarshal(raw, &c.Kind)
		case "source":
			text, err := multiline(raw)
			c.Source = text
			return err
		case "outputs":
			c.outputs, c.Outputs = value, raw
		case "execution_count":
			c.count, c.ExecutionCount = value, raw
		}
		return nil
	})
	c.object.to = s.at
	switch {
	case err != nil:
		return c, err
	case c.Kind == "":
		return c, errors.New("it has no cell_type")
	}
	return c, nil
}

// multiline is a text that a file holds as a string or as a list of lines.
func multiline(raw json.RawMessage) (string, error) {
	if len(raw) > 0 && raw[0] == '"' {
		var text string
		err := json.Unmarshal(raw, &text)
		return text, err
	}
	var lines []string
	if err := json.Unmarshal(raw, &lines); err != nil {
		return "", errors.New("its source is neither a text nor a list of texts")
	}
	return strings.Join(lines, ""), nil
}
