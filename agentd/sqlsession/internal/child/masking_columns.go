package child

import (
	"bytes"
	"math"
	"strconv"
	"unicode/utf8"

	"github.com/apache/arrow-go/v18/arrow"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/lineage"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/mask"
	"github.com/postern-dev/postern/proto"
)

// Masks by column on the engines whose statements nobody can follow (MySQL, MariaDB,
// SQLite). A column of a result is told as it is only where the engine's word that it is
// an unmasked column of a table can be relied on, or where the statement reads no masked
// column at all; everything else is masked. See mysql_masking.go and sqlite_masking.go
// for what is relied on.

// hidesColumns tells whether there is any rule for columns.
func (m *masking) hidesColumns() bool { return m != nil && m.policy.Active() }

// checkColumnMasks refuses what goes with masks by column on PostgreSQL alone. The
// configuration refuses it first.
func checkColumnMasks(g *frame.Guard, product string) *proto.Error {
	switch {
	case !columnMasks(g):
		return nil
	case g.MaskFilters != lineage.FiltersAllow:
		return denied(0, "the statement is refused: the data source's policy has mask for columns and no mask_filters: allow, and on %s nothing else is enforced", product)
	case len(g.SafeFunctions) > 0:
		return denied(0, "the statement is refused: the data source's policy has mask_safe_functions, which is not supported for %s", product)
	}
	return nil
}

// touched are the rules whose columns a statement reads, or may read.
type touched map[int]bool

// whole is the mask of what is made of masked columns: NULL, if a rule of null or noise
// is among them.
func (m *masking) whole(rules touched) mask.Rule {
	for i := range rules {
		if m.policy.Rules[i].Null {
			return mask.Rule{Kind: mask.Null}
		}
	}
	return mask.Rule{Kind: mask.Redact}
}

// allRules are those for columns.
func (m *masking) allRules() touched {
	all := touched{}
	for i, r := range m.policy.Rules {
		if len(r.Columns) > 0 {
			all[i] = true
		}
	}
	return all
}

// hideField masks a column of a result. source names the column that its values come
// from, for noise.
func (m *masking) hideField(f *field, rule mask.Rule, source string) {
	f.oid = fieldOID(f)
	c := mask.NewColumn(rule, f.oid, source, m.key)
	f.hide(c, rule.Kind)
	f.texts = nil
}

// pgOIDs are PostgreSQL's types by name, as far as fields of other engines have them.
var pgOIDs = map[string]uint32{
	"bool": 16, "bytea": 17, "int8": 20, "int2": 21, "int4": 23, "text": 25, "json": 114, "float4": 700, "float8": 701, "date": 1082,
	"timestamp": 1114, "timestamptz": 1184, "interval": 1186, "numeric": 1700,
}

// fieldOID is the type of PostgreSQL's that a field's values are written as.
func fieldOID(f *field) uint32 { return pgOIDs[f.meta[1]] }

// appendFloat writes a float as PostgreSQL does, so that hashes agree.
func appendFloat(out []byte, v float64, bits int) []byte {
	switch {
	case math.IsInf(v, 1):
		return append(out, "Infinity"...)
	case math.IsInf(v, -1):
		return append(out, "-Infinity"...)
	case math.IsNaN(v):
		return append(out, "NaN"...)
	}
	format, digits := byte('f'), 15.0
	if bits == 32 {
		digits = 6
	}
	if a := math.Abs(v); a != 0 && (a < 1e-4 || a >= math.Pow(10, digits)) {
		format = 'e'
	}
	return strconv.AppendFloat(out, v, format, -1, bits)
}

// appendValid appends a text; what is no UTF-8 in it becomes U+FFFD, as Arrow's texts are UTF-8.
func appendValid(out, text []byte) []byte {
	if utf8.Valid(text) {
		return append(out, text...)
	}
	return append(out, bytes.ToValidUTF8(text, []byte("\uFFFD"))...)
}

// isText tells whether the field's values leave as text.
func (f *field) isText() bool { return f.layout == layoutText && f.arrow == arrow.BinaryTypes.String }
