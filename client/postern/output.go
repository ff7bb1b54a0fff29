package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	protobuf "google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/postern-dev/postern/proto/rowfmt"
)

// asJSON is m as protojson maps it: lowerCamel names, 64-bit numbers as strings,
// times as RFC 3339; values that are zero are there, messages that are absent
// are not.
func asJSON(m protobuf.Message) (json.RawMessage, error) {
	return protojson.MarshalOptions{EmitDefaultValues: true}.Marshal(m)
}

// printJSON prints v with an indent of two, always in the same form: protojson's
// own spacing varies on purpose.
func (a *app) printJSON(v any) error {
	var raw []byte
	var err error
	if m, ok := v.(protobuf.Message); ok {
		raw, err = asJSON(m)
	} else {
		raw, err = json.Marshal(v)
	}
	if err != nil {
		return err
	}
	var out bytes.Buffer
	if err := json.Indent(&out, raw, "", "  "); err != nil {
		return err
	}
	out.WriteByte('\n')
	_, err = a.stdout.Write(out.Bytes())
	return err
}

// printList prints items as a table with these columns, or as a JSON array.
func printList[T protobuf.Message](a *app, items []T, columns []string, row func(T) []string) error {
	if a.output == "json" {
		list := make([]json.RawMessage, len(items))
		for i, item := range items {
			raw, err := asJSON(item)
			if err != nil {
				return err
			}
			list[i] = raw
		}
		return a.printJSON(list)
	}
	rows := [][]string{columns}
	for _, item := range items {
		rows = append(rows, row(item))
	}
	return a.printRows(rows)
}

// printRows prints rows with aligned columns, two spaces apart.
func (a *app) printRows(rows [][]string) error {
	_, err := a.stdout.WriteString(alignedRows(rows))
	return err
}

// alignedRows is the text of rows with aligned columns, two spaces apart, safe for
// a terminal.
func alignedRows(rows [][]string) string {
	var widths []int
	cells := make([][]int, len(rows))
	for r, row := range rows {
		row = slices.Clone(row)
		rows[r] = row
		cells[r] = make([]int, len(row))
		for i, text := range row {
			row[i], cells[r][i] = rowfmt.Safe(text)
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], cells[r][i])
		}
	}
	var out strings.Builder
	for r, row := range rows {
		var line strings.Builder
		for i, text := range row {
			if i > 0 {
				line.WriteString("  ")
			}
			line.WriteString(text)
			line.WriteString(strings.Repeat(" ", widths[i]-cells[r][i]))
		}
		out.WriteString(strings.TrimRight(line.String(), " "))
		out.WriteByte('\n')
	}
	return out.String()
}

// printFields prints names and values, one a line; fields without a value are
// left out.
func (a *app) printFields(fields ...[2]string) error {
	var rows [][]string
	for _, f := range fields {
		if f[1] != "" {
			rows = append(rows, []string{f[0], f[1]})
		}
	}
	return a.printRows(rows)
}

// timeText is a time in UTC to the second; "-" if absent.
func timeText(t *timestamppb.Timestamp) string {
	if t == nil {
		return "-"
	}
	return t.AsTime().UTC().Format(time.RFC3339)
}

// timeOr is a time, or other if absent.
func timeOr(t *timestamppb.Timestamp, other string) string {
	if t == nil {
		return other
	}
	return timeText(t)
}

// durationText is a duration with three digits or so; "-" if absent.
func durationText(d *durationpb.Duration) string {
	if d == nil {
		return "-"
	}
	return roughly(d.AsDuration())
}

func roughly(d time.Duration) string {
	switch {
	case d >= time.Minute:
		return d.Round(time.Second).String()
	case d >= time.Second:
		return d.Round(10 * time.Millisecond).String()
	case d >= time.Millisecond:
		return d.Round(10 * time.Microsecond).String()
	default:
		return d.Round(time.Microsecond).String()
	}
}

func labelsText(labels map[string]string) string {
	pairs := make([]string, 0, len(labels))
	for k, v := range labels {
		pairs = append(pairs, k+"="+v)
	}
	slices.Sort(pairs)
	if len(pairs) == 0 {
		return "-"
	}
	return strings.Join(pairs, ",")
}

// sizeText is a number of bytes for people.
func sizeText(n uint64) string {
	switch {
	case n >= 1<<30:
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	case n >= 1<<10:
		return fmt.Sprintf("%.1f KiB", float64(n)/(1<<10))
	}
	return fmt.Sprintf("%d B", n)
}

// clip shortens text to n characters.
func clip(text string, n int) string {
	text = strings.Join(strings.Fields(text), " ")
	runes := []rune(text)
	if len(runes) <= n {
		return text
	}
	return string(runes[:n-3]) + "..."
}
