package mask_test

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgproto3"
	"go.uber.org/goleak"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/mask"
	"github.com/postern-dev/postern/e2e/pgserver"
)

func TestMain(m *testing.M) {
	code := m.Run()
	if err := goleak.Find(); code == 0 && err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// TestRow masks what a real server sends, in both formats, and compares the two:
// the server itself reads the binary result back.
func TestRow(t *testing.T) {
	ctx := context.Background()
	server := pgserver.Start(t)
	conn, err := server.Connect(ctx, "postgres")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx) //nolint:errcheck // the server is stopped
	if _, err := conn.Exec(ctx, "CREATE TYPE pair AS (a int, b text)"); err != nil {
		t.Fatal(err)
	}
	pg := conn.PgConn()
	key := []byte("0123456789abcdef0123456789abcdef")
	texts, err := mask.NewTexts([]mask.Pattern{{Expr: `\d{13,19}`, Rule: mask.Rule{Kind: mask.Redact}}}, key)
	if err != nil {
		t.Fatal(err)
	}
	const card = "4111111111111111"
	for _, expr := range []string{
		"'alice'::text", "''::text", "'a'::char(5)", "42::int2", "-42::int4", "42::int8", "1.5::float8", "1e20::float8", "0.00001::float4", "1234567::float4", "'NaN'::float8",
		"true", "12.50::numeric", "100::numeric", "'NaN'::numeric", "1e50::numeric", "0.0000000001::numeric", "'11111111-2222-3333-4444-555555555555'::uuid", `'\x0102'::bytea`, "'2020-02-03'::date",
		`'{"a": 1}'::jsonb`, `'{"a": 1}'::json`, "NULL::text", "ARRAY['a','b']", "(1,'x')::pair", "'2020-01-02 03:04:05+00'::timestamptz", "interval '1 day'",
		"'" + card + "'::text", `'{"a": ` + card + `}'::jsonb`, "ARRAY['" + card + "', NULL, 'b']", "ARRAY[ARRAY['x" + card + "'], ARRAY['" + card + "y']]", "(5,'see " + card + "')::pair",
		"ARRAY[(5,'see " + card + "')::pair]", "ARRAY['{\"k\": \"" + card + "\"}'::jsonb]", "ARRAY[1,2,3]", "'{}'::text[]",
	} {
		for _, kind := range []mask.Kind{"", mask.Redact, mask.Hash, mask.Partial, mask.Null, mask.Noise} {
			var shown [2]string
			for format := int16(0); format < 2; format++ {
				result := pg.ExecParams(ctx, "SELECT "+expr+", 7", nil, nil, nil, []int16{format, 0}).Read()
				if result.Err != nil {
					t.Fatal(expr, result.Err)
				}
				field := result.FieldDescriptions[0]
				row := pgproto3.DataRow{Values: result.Rows[0]}
				encoded, err := row.Encode(nil)
				if err != nil {
					t.Fatal(err)
				}
				description := pgproto3.RowDescription{Fields: []pgproto3.FieldDescription{
					{Name: []byte(field.Name), DataTypeOID: field.DataTypeOID, DataTypeSize: field.DataTypeSize, TypeModifier: field.TypeModifier, Format: format},
					{Name: []byte("n"), DataTypeOID: 23, DataTypeSize: 4, TypeModifier: -1},
				}}
				described, err := description.Encode(nil)
				if err != nil {
					t.Fatal(err)
				}
				columns := make([]*mask.Column, 2)
				if kind != "" {
					columns[0] = mask.NewColumn(mask.Rule{Kind: kind, Keep: 2, Noise: 0.1}, field.DataTypeOID, "t", key)
				}
				r := mask.NewRow(columns, []uint32{field.DataTypeOID, 23}, texts)
				body, what := encoded[5:], described[5:]
				if r != nil {
					if err := r.Describe(what); err != nil {
						t.Fatal(err)
					}
					if body, err = r.Append(nil, body, []int16{format, 0}); err != nil {
						t.Fatalf("%s: %v", expr, err)
					}
				}
				var got pgproto3.DataRow
				if err := got.Decode(body); err != nil || string(got.Values[1]) != "7" {
					t.Fatalf("%s with %q in format %d: %v, %q", expr, kind, format, err, got.Values)
				}
				if err := description.Decode(what); err != nil {
					t.Fatal(err)
				}
				oid := description.Fields[0].DataTypeOID
				// The server must understand the value as one of its new type.
				back := pg.ExecParams(ctx, "SELECT $1", [][]byte{got.Values[0]}, []uint32{oid}, []int16{format}, []int16{0}).Read()
				if back.Err != nil {
					t.Fatalf("%s with %q in format %d: %q is no value of type %d: %v", expr, kind, format, got.Values[0], oid, back.Err)
				}
				if shown[format] = string(back.Rows[0][0]); back.Rows[0][0] == nil {
					shown[format] = "NULL"
				}
				if strings.Contains(shown[format], card) {
					t.Errorf("%s with %q in format %d: %s", expr, kind, format, shown[format])
				}
			}
			// What has no text form that we know in binary becomes NULL rather than another hash.
			if shown[0] != shown[1] && shown[1] != "NULL" {
				t.Errorf("%s with %q: text %s, binary %s", expr, kind, shown[0], shown[1])
			}
			if shown[1] == "NULL" && shown[0] != "NULL" && kind != mask.Hash && kind != mask.Partial {
				t.Errorf("%s with %q: text %s, binary NULL", expr, kind, shown[0])
			}
		}
	}
}

// FuzzRow: whatever the bytes, lengths stay right and nothing panics.
func FuzzRow(f *testing.F) {
	f.Add([]byte{0, 1, 0, 0, 0, 3, 'a', 'b', 'c'}, uint32(25), uint8(0))
	key := []byte("0123456789abcdef")
	texts, err := mask.NewTexts([]mask.Pattern{{Expr: `a+b`, Rule: mask.Rule{Kind: mask.Redact}}}, key)
	if err != nil {
		f.Fatal(err)
	}
	kinds := []mask.Kind{"", mask.Redact, mask.Hash, mask.Partial, mask.Null, mask.Noise}
	f.Fuzz(func(t *testing.T, body []byte, oid uint32, kind uint8) {
		columns := make([]*mask.Column, 1)
		if k := kinds[int(kind)%len(kinds)]; k != "" {
			columns[0] = mask.NewColumn(mask.Rule{Kind: k, Keep: 4, Noise: 0.1}, oid, "t", key)
		}
		r := mask.NewRow(columns, []uint32{oid}, texts)
		if r == nil {
			return
		}
		for _, formats := range [][]int16{nil, {1}} {
			out, err := r.Append([]byte("x"), body, formats)
			if err != nil {
				if string(out) != "x" {
					t.Fatalf("an error with %q", out)
				}
				continue
			}
			var row pgproto3.DataRow
			if err := row.Decode(out[1:]); err != nil || len(row.Values) != 1 {
				t.Fatalf("%x became %x: %v", body, out, err)
			}
		}
		_ = r.Describe(append([]byte(nil), body...)) //nolint:errcheck // it must not panic
	})
}
