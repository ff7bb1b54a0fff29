// Package rowfmt turns the result of a statement, an Arrow IPC stream, into what
// people and programs read: csv, json, ndjson, parquet, a table, or the same
// Arrow bytes.
//
// The control plane converts for plain HTTP clients, the postern command for its
// user; both read bytes that a host sent, so the decoder here is a strict one of
// its own: it accepts the types that a SQL session emits, checks every offset
// before a row is touched, and allocates in proportion to the bytes that have
// really arrived. Convert therefore answers any input with output or an error,
// never with a panic or a memory demand that the input only claims.
//
// # Values
//
// A column has an Arrow type and, as field metadata "pg.type", the name of its
// type in the database. Text formats follow PostgreSQL's own text output:
//
//	               csv, table                     json, ndjson
//	NULL           empty (table: Options.Null)    null
//	bool           true, false (table: t, f)      true, false
//	int16..uint64  digits                         number, beyond 2^53 too
//	float32/64     shortest; NaN, Infinity        number; "NaN", "Infinity", "-Infinity"
//	numeric (utf8) as it is                       number; what is not finite as string
//	json, jsonb    as it is                       embedded; as string if it is not valid
//	binary         \x and hex digits              the same, as string
//	date32         2006-01-02                     the same, as string
//	timestamp[us]  2006-01-02 15:04:05.999999     2006-01-02T15:04:05.999999
//	  with zone    ...+00                         ...Z
//	time64[us]     15:04:05.999999                the same, as string
//
// Years before 1 carry " BC" at the end. The largest and the smallest value of a
// timestamp or date mean infinity and -infinity; Parquet keeps the number.
//
// # Formats
//
// csv is RFC 4180 with a header row and lines that end in LF; an empty field is
// NULL, "" is the empty string. json is one array, ndjson an object a line; a
// second column of the same name becomes name_2 (also in parquet). JSON text is
// always valid UTF-8: other bytes become U+FFFD. parquet is Snappy-compressed,
// its row groups hold at most 128 Ki rows or about 16 MiB. table is psql's
// aligned form, one line a row: control characters, which could drive a
// terminal, are shown as escapes.
//
// # Memory
//
// One batch of the input (at most Options.MaxMessage bytes) and 64 KiB of output;
// parquet holds a row group besides, and grows by about 100 bytes a column and
// row group for its footer; table holds the first 1,000 rows (or 1 MiB) to size
// its columns. Convert starts no goroutine and keeps nothing after it returns.
package rowfmt
