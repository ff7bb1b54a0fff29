package child

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgguard"
	"github.com/postern-dev/postern/proto"
)

// prepare opens the transaction, has the server parse the statement and, for a
// read-only source, say whether it only reads. All of it is one round trip.
func (x *execution) prepare() (fields []pgproto3.FieldDescription, failure *proto.Error, lost bool) {
	r, c := x.request, x.wire
	x.session.primed = false
	var err error
	if r.Session { // what the statement before left; a session is not reset
		err = c.send(&pgproto3.Close{ObjectType: 'S', Name: statementName}, &pgproto3.Close{ObjectType: 'S', Name: classifyName})
	}
	if err != nil {
		return nil, x.broken(err), true
	}
	err = c.send(
		&pgproto3.Query{String: x.begin(r.ReadWrite)},
		&pgproto3.Parse{Name: statementName, Query: x.text.Text, ParameterOIDs: x.types},
		&pgproto3.Describe{ObjectType: 'S', Name: statementName},
		&pgproto3.Sync{},
	)
	classify := !r.ReadWrite && x.query != "" && x.judgement.Class != pgguard.Show
	if err == nil && classify {
		err = c.send(&pgproto3.Parse{Name: classifyName, Query: classifyPrefix + x.query, ParameterOIDs: x.types}, &pgproto3.Sync{})
	}
	if err == nil {
		err = c.flush()
	}
	if err != nil {
		return nil, x.broken(err), true
	}
	held := x.own || r.ReadWrite
	refusal, err := c.untilReady(func(t byte, body []byte) error {
		var row pgproto3.DataRow
		if t == 'D' && row.Decode(body) == nil && len(row.Values) == 1 && string(row.Values[0]) == "on" {
			held = true
		}
		return nil
	})
	if err != nil || refusal != nil && isFatal(refusal) {
		return nil, x.lostError(refusal, err), true
	}
	if refusal == nil && !held {
		return nil, x.lostError(nil, fmt.Errorf("%w: a transaction that was to be read only is not", errProtocol)), true
	}
	if refusal != nil {
		// The cycles behind it are read to their ends.
		cycles := 1
		if classify {
			cycles = 2
		}
		for range cycles {
			if _, err := c.untilReady(nil); err != nil {
				return nil, x.lostError(nil, err), true
			}
		}
		return nil, x.refused(refusal), false
	}
	var parameters int
	refusal, err = c.untilReady(func(t byte, body []byte) error {
		switch t {
		case 't':
			var description pgproto3.ParameterDescription
			if err := description.Decode(body); err != nil {
				return fmt.Errorf("%w: %v", errProtocol, err)
			}
			parameters = len(description.ParameterOIDs)
		case 'T':
			var description pgproto3.RowDescription
			if err := description.Decode(body); err != nil {
				return fmt.Errorf("%w: %v", errProtocol, err)
			}
			fields = copyFields(description.Fields)
		}
		return nil
	})
	if err != nil || refusal != nil && isFatal(refusal) {
		return nil, x.lostError(refusal, err), true
	}
	if refusal != nil {
		failure = x.refused(refusal)
	} else if parameters != len(x.text.Args) {
		failure = proto.Errorf(proto.CodeInvalid, "the statement has %d parameters, and %d values are given", parameters, len(x.text.Args))
	}
	if classify {
		class, err := c.untilReady(nil)
		if err != nil || class != nil && isFatal(class) {
			return nil, x.lostError(class, err), true
		}
		if failure == nil && class != nil {
			failure = x.refusedClass(class)
		}
	}
	return fields, failure, false
}

// begin is the text that opens the statement's transaction, with its limits.
func (x *execution) begin(readWrite bool) string {
	r := x.request
	mode, readOnly := "BEGIN READ ONLY;", ""
	if readWrite {
		mode = "BEGIN READ WRITE;"
	}
	lock := min(r.TimeoutMillis, maxLockTimeout.Milliseconds())
	// The transaction must not be ended under a client that reads slowly:
	// agentd ends it.
	idle := r.TimeoutMillis + time.Minute.Milliseconds()
	if x.stay != nil && x.stay.lockTimeout > 0 {
		lock = min(lock, x.stay.lockTimeout)
	}
	if x.explicit() {
		mode = ""
		idle = r.TimeoutMillis + explicitIdle.Milliseconds()
		if !readWrite {
			readOnly = askReadOnly
		}
	}
	return fmt.Sprintf("%sSET LOCAL statement_timeout = %d;SET LOCAL lock_timeout = %d;SET LOCAL idle_in_transaction_session_timeout = %d;%s%s",
		mode, r.TimeoutMillis, lock, idle, x.checkPeer, readOnly)
}

// askReadOnly asks whether a transaction that began earlier is what it was to be.
const askReadOnly = "SHOW transaction_read_only;"

// copyFields copies the names out of the read buffer.
func copyFields(fields []pgproto3.FieldDescription) []pgproto3.FieldDescription {
	own := make([]pgproto3.FieldDescription, len(fields))
	for i, f := range fields {
		own[i] = f
		own[i].Name = []byte(strings.ToValidUTF8(string(f.Name), "\uFFFD"))
	}
	return own
}

// typeNames asks for the names of types that pgTypes does not have.
func (x *execution) typeNames(fields []pgproto3.FieldDescription) (func(uint32) string, *proto.Error) {
	names := make(map[uint32]string)
	var unknown []string
	for _, f := range fields {
		if _, ok := pgTypes[f.DataTypeOID]; ok {
			continue
		}
		if _, ok := names[f.DataTypeOID]; !ok {
			names[f.DataTypeOID] = strconv.FormatUint(uint64(f.DataTypeOID), 10)
			unknown = append(unknown, names[f.DataTypeOID])
		}
	}
	name := func(oid uint32) string { return names[oid] }
	if len(unknown) == 0 {
		return name, nil
	}
	// Every name is qualified: the statement's search_path is not trusted.
	rows, refusal, err := x.wire.simple("SELECT t.oid, n.nspname, t.typname FROM pg_catalog.pg_type t JOIN pg_catalog.pg_namespace n" +
		" ON n.oid OPERATOR(pg_catalog.=) t.typnamespace WHERE t.oid OPERATOR(pg_catalog.=) ANY ('{" + strings.Join(unknown, ",") + "}'::pg_catalog.oid[])")
	if err != nil {
		return nil, x.broken(err)
	}
	if refusal != nil {
		return nil, x.refused(refusal)
	}
	for _, row := range rows {
		if len(row) != 3 {
			continue
		}
		oid, _ := strconv.ParseUint(row[0], 10, 32)
		full := row[2]
		if row[1] != "pg_catalog" {
			full = row[1] + "." + row[2]
		}
		names[uint32(oid)] = full
	}
	return name, nil
}
