package child

import (
	"strings"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/sqltext"
	"github.com/postern-dev/postern/proto"
)

// parameterTypes are the types that a parameter may be given, with the OIDs of
// the type and of its array. They are the same in every database.
var parameterTypes = map[string]struct{ oid, array uint32 }{
	"bool": {16, 1000}, "bytea": {17, 1001}, "name": {19, 1003}, "int8": {20, 1016}, "int2": {21, 1005}, "int4": {23, 1007},
	"text": {25, 1009}, "oid": {26, 1028}, "json": {114, 199}, "xml": {142, 143}, "cidr": {650, 651}, "float4": {700, 1021},
	"float8": {701, 1022}, "macaddr": {829, 1040}, "inet": {869, 1041}, "bpchar": {1042, 1014}, "varchar": {1043, 1015},
	"date": {1082, 1182}, "time": {1083, 1183}, "timestamp": {1114, 1115}, "timestamptz": {1184, 1185}, "interval": {1186, 1187},
	"timetz": {1266, 1270}, "numeric": {1700, 1231}, "uuid": {2950, 2951}, "jsonb": {3802, 3807},
}

// typeAliases are other names of the same types.
var typeAliases = map[string]string{
	"boolean": "bool", "smallint": "int2", "int": "int4", "integer": "int4", "bigint": "int8", "real": "float4",
	"double": "float8", "double precision": "float8", "decimal": "numeric", "char": "bpchar",
}

// parameterType is the OID of a type by its name.
func parameterType(name string) (oid uint32, ok bool) {
	name = strings.ToLower(strings.TrimSpace(name))
	element, array := strings.CutSuffix(name, "[]")
	if alias := typeAliases[element]; alias != "" {
		element = alias
	}
	t, ok := parameterTypes[element]
	if array {
		return t.array, ok
	}
	return t.oid, ok
}

// bind puts the values into the request's text.
func (x *execution) bind() *proto.Error {
	if x.request.Session && len(x.request.Parameters) == 0 && sqltext.FirstKeyword(x.request.SQL) == "prepare" {
		x.text = sqltext.Verbatim(x.request.SQL) // $1 is its own here
		return nil
	}
	values := make([]sqltext.Value, len(x.request.Parameters))
	for i, p := range x.request.Parameters {
		values[i] = sqltext.Value{Name: p.Name, Text: p.Value, Type: p.Type}
		if p.Type == "" {
			continue
		}
		if _, ok := parameterType(p.Type); !ok {
			return proto.Errorf(proto.CodeInvalid, "parameter %q: %q is no type that a parameter can have: use one of bool, int8, float8, numeric, text, date, timestamptz, uuid, jsonb and others, or leave it out and cast", p.Name, p.Type)
		}
	}
	dialect := sqltext.PostgreSQL
	if x.request.Guard.Mode == modeMetadata && x.request.Explain == "" {
		loose := *dialect
		loose.Loose = true
		dialect = &loose
	}
	var err error
	if x.text, err = dialect.Bind(x.request.SQL, values); err != nil {
		return proto.Errorf(proto.CodeInvalid, "%w", err)
	}
	x.types = make([]uint32, len(x.text.Args))
	for i, a := range x.text.Args {
		x.types[i], _ = parameterType(a.Type)
		if a.Text != nil && strings.HasSuffix(strings.TrimSpace(a.Type), "[]") {
			literal := sqltext.ArrayLiteral(*a.Text)
			x.text.Args[i].Text = &literal
		}
	}
	return nil
}
