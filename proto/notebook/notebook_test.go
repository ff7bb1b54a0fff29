package notebook

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/proto/jupyter"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// simulatedKernel has one variable, a text: a cell "add X" appends X to it and prints
// it, "fail" fails, "wait" waits to be interrupted.
type simulatedKernel struct {
	text    string
	kept    map[string]string
	count   int
	ran     []string
	waiting chan struct{}
}

func (k *simulatedKernel) Execute(ctx context.Context, code string, take func(*posternv1.KernelMessage)) (Reply, error) {
	k.count++
	k.ran = append(k.ran, code)
	send := func(kind string, content any) {
		m, err := jupyter.New("iopub", kind, "s", content)
		if err != nil {
			panic(err)
		}
		take(m)
	}
	send("execute_input", map[string]any{"execution_count": k.count, "code": code})
	word, rest, _ := strings.Cut(code, " ")
	switch word {
	case "add":
		k.text += rest
		send("stream", map[string]any{"name": "stdout", "text": k.text})
		send("stream", map[string]any{"name": "stdout", "text": "\n"})
	case "wait":
		close(k.waiting)
		<-ctx.Done()
		k.text += "half"
		return Reply{Status: "error", Count: k.count, Class: "KeyboardInterrupt"}, nil
	case "fail":
		k.text += "half"
		send("error", map[string]any{"ename": "Oops", "evalue": rest, "traceback": []string{"a", "b"}})
		return Reply{Status: "error", Count: k.count, Class: "Oops", Value: rest}, nil
	}
	return Reply{Status: "ok", Count: k.count}, nil
}

func (k *simulatedKernel) Checkpoint(_ context.Context, label string) (string, error) {
	if len(label) > 64 {
		return "", errors.New("a label too long")
	}
	id := fmt.Sprint("c", len(k.kept))
	k.kept[id] = k.text
	return id, nil
}

func (k *simulatedKernel) Rollback(_ context.Context, id string) error {
	text, ok := k.kept[id]
	if !ok {
		return errors.New("no such checkpoint")
	}
	k.text = text
	return nil
}

func (k *simulatedKernel) Restart(context.Context) error {
	k.text, k.count = "", 0
	return nil
}

func newKernel() *simulatedKernel {
	return &simulatedKernel{kept: map[string]string{}, waiting: make(chan struct{})}
}

func file(sources ...string) []byte {
	var b strings.Builder
	b.WriteString("{\n \"cells\": [")
	for i, s := range sources {
		if i > 0 {
			b.WriteString(",")
		}
		text, _ := json.Marshal(lines(s))
		fmt.Fprintf(&b, "\n  {\n   \"cell_type\": \"code\",\n   \"execution_count\": null,\n   \"id\": \"c%d\",\n   \"metadata\": {},\n   \"outputs\": [],\n   \"source\": %s\n  }", i, text)
	}
	b.WriteString("\n ],\n \"metadata\": {\"kernelspec\": {\"name\": \"python3\"}},\n \"nbformat\": 4,\n \"nbformat_minor\": 5\n}\n")
	return []byte(b.String())
}

func parse(t *testing.T, text []byte) *Document {
	t.Helper()
	d, err := Parse(text)
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return d
}

// Writing results changes nothing but them, whatever the file's style.
func TestWith(t *testing.T) {
	out := Result{Count: 3, Outputs: []Output{
		{Kind: "stream", Name: "stdout", Text: "a <b>\n\u2028é\\u2028"},
		{Kind: "error", Class: "E", Value: "v"},
	}}
	for name, text := range map[string]string{
		"jupyter":         string(file("x", "y")),
		"one line":        `{"cells":[{"cell_type":"code","source":"x","metadata":{},"outputs":[],"execution_count":null},{"source":["y"],"cell_type":"code","execution_count":1,"outputs":[{"a":"]"}]}],"nbformat":4,"metadata":{"u":"é\u00e9 \" }"},"nbformat_minor":2}`,
		"tabs":            "\ufeff{\n\t\"nbformat\": 4,\n\t\"cells\": [\n\t\t{\n\t\t\t\"cell_type\": \"code\",\n\t\t\t\"source\": \"x\"\n\t\t},\n\t\t{\n\t\t\t\"outputs\": [ 1, 2 ],\n\t\t\t\"cell_type\": \"code\", \"source\": \"y\" } ] }",
		"windows":         strings.ReplaceAll(string(file("x", "y")), "\n", "\r\n"),
		"no metadata":     `{"nbformat": 4, "cells": [ {"cell_type": "code", "source": "x"}, {"cell_type":"code","source":"y"} ]}`,
		"markdown before": strings.Replace(string(file("x", "y")), "\n  {", "\n  {\"cell_type\": \"markdown\", \"source\": \"# outputs\"},\n  {", 1),
	} {
		d := parse(t, []byte(text))
		code := d.Code()
		if len(code) != 2 {
			t.Fatalf("%s: code cells %v", name, code)
		}
		got, err := d.With(map[int]Result{code[1]: out, 99: out})
		if err != nil {
			t.Fatal(err)
		}
		after := parse(t, got)
		c := after.Cells[code[1]]
		if string(c.ExecutionCount) != "3" || c.Source != "y" || after.Cells[code[0]].Source != "x" {
			t.Errorf("%s: got %+v in\n%s", name, c, got)
		}
		var outputs []struct {
			Text []string `json:"text"`
		}
		if err := json.Unmarshal(c.Outputs, &outputs); err != nil || strings.Join(outputs[0].Text, "") != "a <b>\n\u2028é\\u2028" {
			t.Errorf("%s: outputs %q, %v", name, c.Outputs, err)
		}
		// And back again: every byte that is not a result is the file's own.
		if c.outputs.known() && d.Cells[code[1]].outputs.known() && d.Cells[code[1]].count.known() {
			back := append(append(append([]byte{}, got[:c.outputs.from]...), d.Cells[code[1]].Outputs...), got[c.outputs.to:]...)
			c = parse(t, back).Cells[code[1]]
			back = append(append(append([]byte{}, back[:c.count.from]...), d.Cells[code[1]].ExecutionCount...), back[c.count.to:]...)
			if string(back) != text {
				t.Errorf("%s: got\n%s\nwant\n%s", name, back, text)
			}
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for text, want := range map[string]string{
		"":                               "empty",
		"{":                              "line 1",
		"{\n<<<<<<< HEAD\n}":             "conflict markers",
		`{"worksheets": []}`:             "format 3",
		`{"nbformat": 5, "cells": []}`:   "format 5",
		`{"nbformat": 4, "cells": 7}`:    "not a notebook",
		`{"nbformat": 4, "cells": [{}]}`: "cell 1 of the notebook: it has no cell_type",
		`{"nbformat": 4, "cells": [1]}`:  "cell 1",
		`[]`:                             "not a notebook",
		`{"nbformat":4,"cells":[{"cell_type":"code","source":7}]}`: "cell 1",
	} {
		_, err := Parse([]byte(text))
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: got %v, want %q", text, err, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(file("a", "b\nc"))
	f.Add([]byte(`{"cells":[{"cell_type":"code","source":["y"],"outputs":[{"a":"]"}]}],"nbformat":4}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		d, err := Parse(text)
		if err != nil {
			return
		}
		results := map[int]Result{}
		for _, i := range d.Code() {
			results[i] = Result{Count: 7, Outputs: []Output{{Kind: "stream", Name: "stdout", Text: "x"}}}
		}
		out, err := d.With(results)
		if err != nil {
			t.Fatal(err)
		}
		again, err := Parse(out)
		if err != nil || len(again.Cells) != len(d.Cells) {
			t.Fatalf("%v from\n%q\nto\n%q", err, text, out)
		}
		for i := range d.Cells {
			if again.Cells[i].Source != d.Cells[i].Source || again.Cells[i].Kind != d.Cells[i].Kind {
				t.Fatalf("cell %d changed from\n%q\nto\n%q", i, text, out)
			}
		}
	})
}

func TestRun(t *testing.T) {
	d := parse(t, file("add a", "  \n", "fail now", "add b"))
	k := newKernel()
	results, err := Run(context.Background(), k, d, Options{})
	var failed *CellError
	if !errors.As(err, &failed) || failed.Cell != 3 || failed.Index != 2 || failed.Class != "Oops" || len(k.ran) != 2 {
		t.Fatalf("got %v after %v", err, k.ran)
	}
	if r := results[0]; r.Count != 1 || len(r.Outputs) != 1 || r.Outputs[0].Text != "a\n" {
		t.Errorf("the first cell has %+v", r)
	}
	if r := results[2]; len(r.Outputs) != 1 || r.Outputs[0].Kind != "error" {
		t.Errorf("the failed cell has %+v", r)
	}
	k = newKernel()
	results, err = Run(context.Background(), k, d, Options{AllowErrors: true})
	if !errors.As(err, &failed) || results[3].Outputs[0].Text != "ahalfb\n" {
		t.Errorf("with errors allowed: %v, %+v", err, results[3])
	}
	k = newKernel()
	_, err = Run(context.Background(), k, parse(t, file("wait")), Options{Timeout: time.Millisecond})
	if !errors.As(err, &failed) || failed.Class != "timeout" {
		t.Errorf("a slow cell: %v", err)
	}
}

// Whatever is edited, the outputs are those of a run of all cells from the start, and
// what is above the first change does not run again.
func TestSessionFollowsEdits(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for round := range 60 {
		k := newKernel()
		s := &Session{Kernel: k, Checkpoints: k, Spec: "python3"}
		var cells []string
		for range 25 {
			before := append([]string(nil), cells...)
			at := random.IntN(len(cells) + 1)
			switch n := random.IntN(5); {
			case n < 2 || len(cells) == 0:
				text := fmt.Sprintf("add %c", 'a'+random.IntN(26))
				if random.IntN(6) == 0 {
					text = "fail x"
				}
				cells = append(cells[:at], append([]string{text}, cells[at:]...)...)
			case n == 2:
				cells[at%len(cells)] = fmt.Sprintf("add %c", 'a'+random.IntN(26))
			case n == 3:
				at %= len(cells)
				cells = append(cells[:at], cells[at+1:]...)
			default:
				i, j := random.IntN(len(cells)), random.IntN(len(cells))
				cells[i], cells[j] = cells[j], cells[i]
			}
			same := 0
			for same < len(before) && same < len(cells) && before[same] == cells[same] {
				same++
			}
			d := parse(t, file(cells...))
			k.ran = nil
			for steps := 0; !s.Done(d); steps++ {
				if steps > len(cells)+1 {
					t.Fatalf("round %d: %q is not done after %d steps", round, cells, steps)
				}
				_, err := s.Step(context.Background(), d)
				var failed *CellError
				if err != nil && !errors.As(err, &failed) {
					t.Fatal(err)
				}
			}
			results := s.Results(d)
			model := newKernel()
			want, err := Run(context.Background(), model, d, Options{})
			for _, i := range d.Code() {
				if fmt.Sprint(results[i].Outputs) != fmt.Sprint(want[i].Outputs) && len(results[i].Outputs)+len(want[i].Outputs) > 0 {
					t.Fatalf("round %d, cells %q: cell %d has %+v, want %+v", round, cells, i, results[i], want[i])
				}
			}
			if err == nil && k.text != model.text {
				t.Fatalf("round %d: the kernel has %q, want %q", round, k.text, model.text)
			}
			if len(k.ran) > len(cells)-same {
				t.Fatalf("round %d: %q ran for %q after %q", round, k.ran, cells, before)
			}
		}
	}
}

func TestOutputs(t *testing.T) {
	var o Outputs
	send := func(kind, content string) {
		t.Helper()
		m, err := jupyter.New("iopub", kind, "s", json.RawMessage(content))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := o.Take(m); err != nil {
			t.Fatal(err)
		}
	}
	send("stream", `{"name":"stdout","text":"a"}`)
	send("clear_output", `{"wait":true}`)
	send("display_data", `{"data":{"text/plain":"one\ntwo"},"metadata":{},"transient":{"display_id":"d"}}`)
	send("stream", `{"name":"stdout","text":"x"}`)
	send("stream", `{"name":"stderr","text":"y"}`)
	send("update_display_data", `{"data":{"text/plain":"three"},"metadata":{},"transient":{"display_id":"d"}}`)
	send("execute_result", `{"data":{"application/json":{"b":1}},"metadata":{},"execution_count":4}`)
	text, err := json.Marshal(o.List())
	want := `[{"data":{"text/plain":["three"]},"metadata":{},"output_type":"display_data"},{"name":"stdout","output_type":"stream","text":["x"]},{"name":"stderr","output_type":"stream","text":["y"]},{"data":{"application/json":{"b":1}},"execution_count":4,"metadata":{},"output_type":"execute_result"}]`
	if err != nil || string(text) != want {
		t.Errorf("got  %s\nwant %s (%v)", text, want, err)
	}
	big, _ := json.Marshal(map[string]string{"name": "stdout", "text": strings.Repeat("z", 1<<20)})
	for range 40 {
		send("stream", string(big))
	}
	list := o.List()
	if note := list[len(list)-1]; note.Name != "stderr" || !strings.Contains(note.Text, "left out") {
		t.Errorf("too much output ends with %+v", note)
	}
	if got := lines("a\r\nb\rc\nd\u2028"); len(got) != 4 || got[0] != "a\r\n" {
		t.Errorf("lines: %q", got)
	}
}
