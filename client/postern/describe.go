package main

import (
	"bytes"
	"fmt"
	"io"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/rowfmt"
)

// describeTag is the command tag of a statement that was described and not run.
const describeTag = "DESCRIBE"

// maxHeld bounds what is held back of a result until its first row, in bytes. A
// schema of 1,600 columns has a tenth.
const maxHeld = 16 << 20

// emptyTable holds back the table of a result that has no rows so far: it may
// turn out to be a description, which is printed in another way. What is larger
// than maxHeld goes through.
type emptyTable struct {
	w      io.Writer
	rows   bool
	held   bytes.Buffer
	schema bytes.Buffer
}

// Write implements io.Writer.
func (e *emptyTable) Write(p []byte) (int, error) {
	if e.rows || e.held.Len()+len(p) > maxHeld {
		if err := e.release(); err != nil {
			return 0, err
		}
		return e.w.Write(p)
	}
	return e.held.Write(p)
}

// release writes what was held back; from then on nothing is.
func (e *emptyTable) release() error {
	e.rows = true
	e.schema = bytes.Buffer{}
	if e.held.Len() == 0 {
		return nil
	}
	_, err := e.w.Write(e.held.Bytes())
	e.held = bytes.Buffer{}
	return err
}

// tee copies what is read of r for the schema.
func (e *emptyTable) tee(r io.Reader) io.Reader {
	return io.TeeReader(r, writerFunc(func(p []byte) (int, error) {
		if !e.rows && e.schema.Len() < maxHeld {
			e.schema.Write(p[:min(len(p), maxHeld-e.schema.Len())])
		}
		return len(p), nil
	}))
}

// describe prints what a statement would return and take.
func (e *emptyTable) describe(outcome *posternv1.QueryOutcome) error {
	columns, err := rowfmt.Columns(&e.schema)
	if err != nil {
		return err
	}
	e.held = bytes.Buffer{}
	rows := [][]string{{"COLUMN", "TYPE", "NULLABLE"}}
	for _, c := range columns {
		nullable := "no"
		if c.Nullable {
			nullable = "yes"
		}
		rows = append(rows, []string{c.Name, c.Type, nullable})
	}
	text := alignedRows(rows)
	if len(columns) == 0 {
		text = "no columns\n"
	}
	if len(outcome.GetParameters()) > 0 {
		rows := [][]string{{"PARAMETER", "TYPE"}}
		for _, p := range outcome.Parameters {
			rows = append(rows, []string{p.Name, p.Type})
		}
		text += "\n" + alignedRows(rows)
		if outcome.ParametersTruncated {
			text += fmt.Sprintf("only the first %d parameters are told\n", len(outcome.Parameters))
		}
	}
	e.rows = true
	_, err = io.WriteString(e.w, text)
	return err
}
