package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"gopkg.in/yaml.v3"
)

// Problem is one thing that is wrong, at a line of the file (0: unknown).
type Problem struct {
	Line    int
	Message string
}

// Error lists every problem of a configuration, by line.
type Error struct {
	File     string
	Problems []Problem
}

// Error is one line: the first problem, and how many more there are.
func (e *Error) Error() string {
	text := e.Lines()[0]
	if more := len(e.Problems) - 1; more > 0 {
		text += fmt.Sprintf(" (and %d more)", more)
	}
	return text
}

// Lines is each problem as FILE:LINE: what.
func (e *Error) Lines() []string {
	var lines []string
	for _, p := range e.Problems {
		where := e.File
		if p.Line > 0 {
			where += ":" + strconv.Itoa(p.Line)
		}
		lines = append(lines, where+": "+p.Message)
	}
	return lines
}

type problems struct {
	file string
	list []Problem
}

func (p *problems) add(line int, format string, args ...any) {
	message := strings.Join(strings.Fields(fmt.Sprintf(format, args...)), " ")
	p.list = append(p.list, Problem{line, message})
}

func (p *problems) err() error {
	if len(p.list) == 0 {
		return nil
	}
	slices.SortStableFunc(p.list, func(a, b Problem) int { return a.Line - b.Line })
	return &Error{p.file, p.list}
}

// yamlValue is a value that the YAML library quotes: it may be a password in the
// wrong place.
var yamlValue = regexp.MustCompile(" `[^`]*`")

var yamlLine = regexp.MustCompile(`^(?:yaml: )?(?:line (\d+): )?(.*)$`)

// fromYAML takes over a message of the YAML library without the values.
func (p *problems) fromYAML(message string) {
	m := yamlLine.FindStringSubmatch(strings.ReplaceAll(message, "\n", " "))
	line, _ := strconv.Atoi(m[1]) //nolint:errcheck // no number is line 0
	text := yamlValue.ReplaceAllString(m[2], "")
	text = strings.NewReplacer("!!str", "text", "!!int", "the number", "!!seq", "a list", "!!map", "a map", "!!bool", "the word").Replace(text)
	if i := strings.Index(text, " into "); i >= 0 && strings.HasPrefix(text, "cannot unmarshal ") {
		text = strings.TrimPrefix(text[:i], "cannot unmarshal ") + " cannot stand here: " + expected(text[i+len(" into "):])
	}
	p.add(line, "%s", text)
}

func expected(goType string) string {
	switch {
	case strings.Contains(goType, "int"):
		return "a whole number is expected"
	case strings.HasPrefix(goType, "[]"):
		return "a list is expected"
	case goType == "string":
		return "text is expected"
	}
	return "a map of keys is expected"
}

// decode fills out from raw, with every problem that the form alone shows. It
// returns the document's root; nil if there is none.
func (p *problems) decode(raw []byte, out any) *yaml.Node {
	dec := yaml.NewDecoder(bytes.NewReader(raw))
	var doc yaml.Node
	if err := dec.Decode(&doc); errors.Is(err, io.EOF) {
		return nil // an empty file
	} else if err != nil {
		p.fromYAML(err.Error())
		return nil
	}
	if err := dec.Decode(&yaml.Node{}); !errors.Is(err, io.EOF) {
		p.add(0, "there is more than one YAML document")
		return nil
	}
	root := doc.Content[0]
	if root.Kind == yaml.ScalarNode && root.Tag == "!!null" {
		return nil // comments alone
	}
	if root.Kind != yaml.MappingNode {
		p.add(root.Line, "the file must be a map of keys such as url: and sources:")
		return nil
	}
	p.keys(root, reflect.TypeOf(out).Elem(), "")
	if err := root.Decode(out); err != nil {
		var types *yaml.TypeError
		if errors.As(err, &types) {
			for _, message := range types.Errors {
				if !strings.Contains(message, "already set") { // found by keys
					p.fromYAML(message)
				}
			}
		} else {
			p.fromYAML(err.Error())
		}
	}
	return root
}

// keys reports the keys below node that t does not know, and repeated ones.
func (p *problems) keys(node *yaml.Node, t reflect.Type, path string) {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch {
	case node.Kind == yaml.AliasNode:
		p.add(node.Line, "%san alias (*%s) is not supported", path, node.Value)
	case node.Kind == yaml.SequenceNode && t.Kind() == reflect.Slice:
		for _, item := range node.Content {
			p.keys(item, t.Elem(), path)
		}
	case node.Kind == yaml.MappingNode && t.Kind() == reflect.Struct:
		known := map[string]reflect.Type{}
		var names []string
		for i := range t.NumField() {
			name, _, _ := strings.Cut(t.Field(i).Tag.Get("yaml"), ",")
			if name != "" && name != "-" {
				known[name] = t.Field(i).Type
				names = append(names, name)
			}
		}
		seen := map[string]bool{}
		for i := 0; i+1 < len(node.Content); i += 2 {
			key, value := node.Content[i], node.Content[i+1]
			field, ok := known[key.Value]
			switch {
			case seen[key.Value]:
				p.add(key.Line, "key %s%s is there twice", path, key.Value)
			case !ok:
				p.add(key.Line, "unknown key %s%s: %s", path, clip(key.Value), suggest(key.Value, names))
			default:
				p.keys(value, field, path+key.Value+".")
			}
			seen[key.Value] = true
		}
	}
}

func clip(s string) string {
	if len(s) > 40 {
		return fmt.Sprintf("%.40q...", s)
	}
	return s
}

// suggest names the nearest known key, or all.
func suggest(key string, names []string) string {
	best, distance := "", 3
	for _, name := range names {
		if d := editDistance(strings.ToLower(key), name); d < distance || (d == distance && best == "" && len(name) > 5) {
			best, distance = name, d
		}
	}
	if best != "" {
		return "did you mean " + best + "?"
	}
	slices.Sort(names)
	return "known are " + strings.Join(names, ", ")
}

// editDistance is Levenshtein's; keys are short.
func editDistance(a, b string) int {
	if len(a) > 64 {
		return len(a)
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j+1]+1, row[j]+1)
		}
	}
	return row[len(b)]
}

// lineOf is the line of a key, or of the deepest part of the path there is.
func lineOf(node *yaml.Node, keys ...any) int {
	if node == nil {
		return 0
	}
	line := node.Line
	for _, key := range keys {
		var next *yaml.Node
		switch k := key.(type) {
		case string:
			if node.Kind != yaml.MappingNode {
				return line
			}
			for i := 0; i+1 < len(node.Content); i += 2 {
				if node.Content[i].Value == k {
					line, next = node.Content[i].Line, node.Content[i+1]
				}
			}
		case int:
			if node.Kind == yaml.SequenceNode && k < len(node.Content) {
				next = node.Content[k]
				line = next.Line
			}
		}
		if next == nil {
			return line
		}
		node = next
	}
	return line
}
