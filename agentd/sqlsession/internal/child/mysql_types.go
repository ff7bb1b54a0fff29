package child

import (
	"database/sql/driver"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/apache/arrow-go/v18/arrow"
)

// mysqlType is how a type of the server becomes one of Arrow. pg is the name of
// PostgreSQL's type whose text form is the same: what prints a result goes by it.
type mysqlType struct {
	pg     string
	layout layout
	arrow  arrow.DataType
}

var (
	mysqlInt16  = mysqlType{"int2", layout16, arrow.PrimitiveTypes.Int16}
	mysqlInt32  = mysqlType{"int4", layout32, arrow.PrimitiveTypes.Int32}
	mysqlInt64  = mysqlType{"int8", layout64, arrow.PrimitiveTypes.Int64}
	mysqlUint64 = mysqlType{"numeric", layout64, arrow.PrimitiveTypes.Uint64}
	mysqlText   = mysqlType{"text", layoutText, arrow.BinaryTypes.String}
	mysqlBytes  = mysqlType{"bytea", layoutText, arrow.BinaryTypes.Binary}
)

// mysqlTypes are the types by the driver's names. What is not here goes as bytes.
var mysqlTypes = map[string]mysqlType{
	"TINYINT": mysqlInt16, "UNSIGNED TINYINT": mysqlInt16, "SMALLINT": mysqlInt16, "YEAR": mysqlInt16,
	"UNSIGNED SMALLINT": mysqlInt32, "MEDIUMINT": mysqlInt32, "UNSIGNED MEDIUMINT": mysqlInt32, "INT": mysqlInt32,
	"UNSIGNED INT": mysqlInt64, "BIGINT": mysqlInt64, "UNSIGNED BIGINT": mysqlUint64, "BIT": mysqlUint64,
	"FLOAT": {"float4", layout32, arrow.PrimitiveTypes.Float32}, "DOUBLE": {"float8", layout64, arrow.PrimitiveTypes.Float64},
	"DECIMAL": {"numeric", layoutText, arrow.BinaryTypes.String},
	"DATE":    {"date", layoutDate, arrow.FixedWidthTypes.Date32},
	// DATETIME is a wall clock's, TIMESTAMP a moment: the session's time zone is UTC.
	"DATETIME":  {"timestamp", layoutTimestamp, &arrow.TimestampType{Unit: arrow.Microsecond}},
	"TIMESTAMP": {"timestamptz", layoutTimestamp, &arrow.TimestampType{Unit: arrow.Microsecond, TimeZone: "UTC"}},
	// TIME goes from -838 to 838 hours: it is a duration more than a time of day.
	"TIME": {"interval", layoutText, arrow.BinaryTypes.String},
	"JSON": {"json", layoutText, arrow.BinaryTypes.String},
	"CHAR": mysqlText, "VARCHAR": mysqlText, "TINYTEXT": mysqlText, "TEXT": mysqlText, "MEDIUMTEXT": mysqlText, "LONGTEXT": mysqlText,
	"ENUM": mysqlText, "SET": mysqlText, "NULL": mysqlText,
}

// mysqlField describes a column of a result.
func mysqlField(name, database string) (field, string) {
	t, ok := mysqlTypes[database]
	if !ok {
		t = mysqlBytes
	}
	return field{
		name: strings.ToValidUTF8(name, "\uFFFD"), layout: t.layout, arrow: t.arrow,
		meta: []string{"pg.type", t.pg, "mysql.type", strings.ToLower(database)},
	}, t.pg
}

// mysqlCell turns the driver's value into the column's. database is the driver's
// name of the type.
func mysqlCell(out *cell, f *field, database string, v driver.Value) error {
	*out = cell{}
	if v == nil {
		out.null = true
		return nil
	}
	unexpected := func() error {
		return &valueError{f.name, fmt.Sprintf("the driver gave a %T for a %s", v, strings.ToLower(database))}
	}
	switch f.layout {
	case layoutText:
		switch v := v.(type) {
		case []byte:
			out.text = v
		case string:
			out.text = []byte(v)
		default:
			return unexpected()
		}
		if f.arrow == arrow.BinaryTypes.String && !utf8.Valid(out.text) {
			return &valueError{f.name, "a text is not valid in its character set: cast it to binary"}
		}
		return nil
	case layoutDate, layoutTimestamp:
		text, ok := v.([]byte)
		if !ok {
			return unexpected()
		}
		days, micros, err := mysqlMoment(string(text))
		if err != nil {
			return &valueError{f.name, err.Error()}
		}
		if out.bits = days; f.layout == layoutTimestamp {
			out.bits = days*86400e6 + micros
		}
		return nil
	}
	switch v := v.(type) {
	case int64:
		out.bits = v
	case uint64:
		out.bits = int64(v)
	case float32:
		out.bits = int64(math.Float32bits(v))
	case float64:
		out.bits = int64(math.Float64bits(v))
	case string: // an unsigned number above the largest int64
		n, err := strconv.ParseUint(v, 10, 64)
		if err != nil {
			return unexpected()
		}
		out.bits = int64(n)
	case []byte:
		if database != "BIT" || len(v) > 8 {
			if n, err := strconv.ParseUint(string(v), 10, 64); err == nil && database == "UNSIGNED BIGINT" {
				out.bits = int64(n)
				return nil
			}
			return unexpected()
		}
		for _, b := range v {
			out.bits = out.bits<<8 | int64(b)
		}
	default:
		return unexpected()
	}
	return nil
}

// mysqlMoment reads 2006-01-02 and 2006-01-02 15:04:05.999999 as days since 1970 and
// microseconds of the day.
func mysqlMoment(text string) (days, micros int64, err error) {
	layout := time.DateOnly
	if len(text) > len(layout) {
		layout = time.DateTime // also with a fraction
	}
	t, err := time.Parse(layout, text)
	if err != nil {
		// The calendar has no such day: 0000-00-00, 2024-00-00, 2024-02-31.
		return 0, 0, fmt.Errorf("the date %q is none of the calendar's: cast it to char, or use NULLIF", clean(text))
	}
	seconds := t.Unix()
	days = seconds / 86400
	if seconds%86400 < 0 {
		days--
	}
	return days, (seconds-days*86400)*1e6 + int64(t.Nanosecond())/1000, nil
}
