package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sort"
	"strings"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/rowfmt"
)

const shellHelp = `Statements end with a semicolon and may have several lines.
  \d            tables and views; \dt as well
  \d NAME       a table in detail; * is any text, ? any character; SCHEMA.NAME too
  \x            expanded display: a line for each column
  \format F     table, csv, json or ndjson
  \explain S    the plan of a statement on one line, as far as the policy tells it; \explain analyze S runs it, too
  \timing       time of each statement
  \pager        use $PAGER for long results, or not
  \set          the variables; \set NAME VALUE or NAME:TYPE VALUE sets one, \unset NAME forgets it.
                In statements :NAME and {{NAME}} are its value, bound and never pasted
  \i FILE       run a file
  \o FILE       write results to a file; \o alone ends that
  \r            forget what is typed so far
  \?            this help
  \q            leave (Ctrl-D, too)
Ctrl-C cancels the statement under way, or forgets what is typed; twice at an empty prompt it leaves.
The prompt has * in a transaction and ! in one that has failed.`

// command runs a backslash command.
func (s *shell) command(ctx context.Context, text string) error {
	words := strings.Fields(text)
	name, args := words[0], words[1:]
	most := map[string]int{`\q`: 0, `\?`: 0, `\r`: 0, `\x`: 1, `\timing`: 1, `\pager`: 1, `\format`: 1, `\d`: 1, `\dt`: 1, `\unset`: 1, `\i`: 1, `\o`: 1}
	if n, known := most[name]; known && len(args) > n {
		return usagef("%s takes at most %d argument", name, n)
	}
	switch name {
	case `\q`:
		return errQuit
	case `\?`:
		s.app.info("%s", shellHelp)
	case `\r`:
		s.lines.Reset()
	case `\x`:
		return s.toggle(&s.expanded, args, "expanded display")
	case `\timing`:
		return s.toggle(&s.timing, args, "timing")
	case `\pager`:
		return s.toggle(&s.pager, args, "pager")
	case `\format`:
		if len(args) == 0 {
			s.app.info("format is %s", s.format)
			return nil
		}
		format, err := rowfmt.ParseFormat(args[0])
		if err != nil {
			return &usageError{err}
		}
		if format.Binary() {
			return usagef("%s is not a format for several statements: choose table, csv, json or ndjson", format)
		}
		s.format = format
	case `\d`, `\dt`:
		return s.describe(ctx, firstOf(args...))
	case `\set`:
		return s.set(strings.TrimSpace(strings.TrimPrefix(text, name)))
	case `\unset`:
		if len(args) == 0 {
			return usagef(`\unset needs a name`)
		}
		delete(s.variables, args[0])
	case `\explain`:
		return s.explain(ctx, strings.TrimSpace(strings.TrimPrefix(text, name)))
	case `\i`:
		if len(args) == 0 {
			return usagef(`\i needs a file`)
		}
		return s.include(ctx, args[0])
	case `\o`:
		return s.redirect(firstOf(args...))
	default:
		return usagef("there is no command %s here: \\? lists those there are", name)
	}
	return nil
}

// explain asks for a statement's plan.
func (s *shell) explain(ctx context.Context, text string) error {
	how := posternv1.Explain_EXPLAIN_PLAN
	if first, rest, _ := strings.Cut(text, " "); strings.EqualFold(first, "analyze") {
		how, text = posternv1.Explain_EXPLAIN_ANALYZE, strings.TrimSpace(rest)
	}
	if text = strings.TrimSpace(strings.TrimRight(text, "; ")); text == "" {
		return usagef(`\explain needs a statement`)
	}
	return s.statement(ctx, text, how)
}

func (s *shell) toggle(what *bool, args []string, name string) error {
	switch firstOf(args...) {
	case "":
		*what = !*what
	case "on":
		*what = true
	case "off":
		*what = false
	default:
		return usagef("%s is on or off", name)
	}
	if s.interactive {
		s.app.info("%s is %s", name, map[bool]string{true: "on", false: "off"}[*what])
	}
	return nil
}

// describe shows the tables, or one in detail, from the control plane's cache.
func (s *shell) describe(ctx context.Context, pattern string) error {
	r := &posternv1.IntrospectSourceRequest{Agent: s.agent, Source: s.source}
	if pattern != "" {
		pattern = strings.TrimSuffix(strings.NewReplacer(`"`, "", "`", "").Replace(pattern), ";")
		if schema, table, ok := strings.Cut(pattern, "."); ok {
			r.Schema, r.Table = schema, table
		} else {
			r.Table = pattern
		}
	}
	return s.interruptible(ctx, func(ctx context.Context) error {
		return s.app.introspect(ctx, s.client, s.agent+"/"+s.source, r)
	})
}

// set shows the variables, or sets one.
func (s *shell) set(text string) error {
	if text == "" {
		names := make([]string, 0, len(s.variables))
		for name := range s.variables {
			names = append(names, name)
		}
		sort.Strings(names)
		for _, name := range names {
			p := s.variables[name]
			value := "NULL"
			if p.Value != nil {
				value = "= " + *p.Value
			}
			if p.Type != "" {
				name += ":" + p.Type
			}
			s.app.info("%s %s", safe(name), safe(value))
		}
		return nil
	}
	name, value, ok := strings.Cut(text, " ")
	value = strings.TrimSpace(value)
	if !ok {
		value = ""
	}
	if n := len(value); n > 1 && value[0] == '\'' && value[n-1] == '\'' {
		value = strings.ReplaceAll(value[1:n-1], "''", "'")
	}
	list, err := parseParameters([]string{name + "=" + value}, nil)
	if err != nil {
		return err
	}
	s.variables[list[0].Name] = list[0]
	return nil
}

// include runs a file. Its last statement needs no semicolon.
func (s *shell) include(ctx context.Context, name string) error {
	if s.includes >= maxIncludes {
		return usagef(`\i goes %d files deep at most`, maxIncludes)
	}
	if !s.lines.Empty() {
		return usagef(`\i within a statement makes no sense: end it with a semicolon first`)
	}
	f, err := os.Open(name)
	if err != nil {
		var path *fs.PathError
		if errors.As(err, &path) {
			err = path.Err
		}
		return fmt.Errorf("read %s: %w", name, err)
	}
	defer f.Close() //nolint:errcheck // it was only read
	s.includes++
	defer func() { s.includes-- }()
	defer func() { s.lines.Reset() }()
	return s.read(ctx, f, name)
}

// redirect sends results to a file from now on, or to stdout again.
func (s *shell) redirect(name string) error {
	var out *os.File
	if name != "" && name != "-" {
		var err error
		if out, err = os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o666); err != nil {
			var path *fs.PathError
			if errors.As(err, &path) {
				err = path.Err
			}
			return fmt.Errorf("write results to %s: %w", name, err)
		}
	}
	if s.out != nil {
		if err := s.out.Close(); err != nil {
			return fmt.Errorf("write results to %s: %w", s.out.Name(), err)
		}
	}
	s.out = out
	return nil
}
