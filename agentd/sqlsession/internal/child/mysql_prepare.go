package child

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"reflect"

	"github.com/go-sql-driver/mysql"
)

// The driver prepares statements, but does not tell what the server says of their
// columns and placeholders before they run. So this is COM_STMT_PREPARE by our own
// hands, on the driver's connection, between two commands of its own: nothing is
// buffered there then, and packets are numbered from zero by every command.
//
//	-> 0x16 text
//	<- 0x00 id:4 columns:2 parameters:2 0:1 warnings:2 | 0xff code:2 '#' state:5 message
//	<- a definition for each parameter, then EOF unless that is deprecated
//	<- a definition for each column, then EOF unless that is deprecated
//	-> 0x19 id:4 (no answer)

const (
	comStmtPrepare = 0x16
	comStmtClose   = 0x19
	// capabilityDeprecateEOF is CLIENT_DEPRECATE_EOF.
	capabilityDeprecateEOF = 1 << 24
	// maxDefinition bounds a packet that describes something, in bytes.
	maxDefinition = 1 << 20
	// maxMySQLText bounds a text that fits into one packet, in bytes.
	maxMySQLText = 1<<24 - 2
)

// mysqlColumn is what the server says of a column, or of a placeholder.
type mysqlColumn struct {
	// schema, table and column are where it comes from; empty for an expression.
	schema, table, column string
	name                  string
	// database is the driver's name of the type.
	database string
	notNull  bool
}

// mysqlPrepared is what the server says of a statement that it has not run.
type mysqlPrepared struct {
	columns, parameters []mysqlColumn
}

// errTransport is returned by transport when the driver keeps its connection elsewhere
// than it used to.
var errTransport = errors.New("the driver's connection is not where it should be")

// transport is what the driver reads from and writes to: the socket, or TLS on it.
func (s *mysqlSession) transport() (conn net.Conn, deprecatesEOF bool, err error) {
	v := reflect.ValueOf(s.conn)
	if v.Kind() != reflect.Pointer || v.Elem().Kind() != reflect.Struct {
		return nil, false, errTransport
	}
	inner, capabilities := v.Elem().FieldByName("netConn"), v.Elem().FieldByName("capabilities")
	if inner.Kind() != reflect.Interface || inner.IsNil() || capabilities.Kind() != reflect.Uint32 {
		return nil, false, errTransport
	}
	deprecatesEOF = capabilities.Uint()&capabilityDeprecateEOF != 0
	switch at := inner.Elem(); {
	case at.Type() == reflect.TypeFor[*tls.Conn]():
		return (*tls.Conn)(at.UnsafePointer()), deprecatesEOF, nil
	case at.Kind() == reflect.Pointer && at.Type() == reflect.TypeOf(s.socket) && at.Pointer() == reflect.ValueOf(s.socket).Pointer():
		return s.socket, deprecatesEOF, nil
	}
	return nil, false, errTransport
}

// prepareOnly has the server prepare a statement and forget it again. The error is a
// *mysql.MySQLError where the server refuses it; after any other the connection is not
// used again.
func (s *mysqlSession) prepareOnly(text string) (*mysqlPrepared, error) {
	if len(text) > maxMySQLText {
		return nil, fmt.Errorf("the statement has more than %d bytes", maxMySQLText)
	}
	conn, deprecatesEOF, err := s.transport()
	if err != nil {
		return nil, err
	}
	w := &mysqlPackets{conn: conn}
	if err := w.write(append([]byte{comStmtPrepare}, text...)); err != nil {
		return nil, err
	}
	head, err := w.read()
	switch {
	case err != nil:
		return nil, err
	case len(head) > 0 && head[0] == 0xff:
		return nil, mysqlRefusal(head)
	case len(head) < 9 || head[0] != 0:
		return nil, errPacket
	}
	id := head[1:5]
	columns, parameters := binary.LittleEndian.Uint16(head[5:]), binary.LittleEndian.Uint16(head[7:])
	p := &mysqlPrepared{}
	for _, part := range []struct {
		n    int
		into *[]mysqlColumn
	}{{int(parameters), &p.parameters}, {int(columns), &p.columns}} {
		for range part.n {
			packet, err := w.read()
			if err != nil {
				return nil, err
			}
			c, err := mysqlDefinition(packet)
			if err != nil {
				return nil, err
			}
			*part.into = append(*part.into, c)
		}
		if part.n > 0 && !deprecatesEOF {
			if packet, err := w.read(); err != nil {
				return nil, err
			} else if len(packet) == 0 || len(packet) > 8 || packet[0] != 0xfe {
				return nil, errPacket
			}
		}
	}
	w.sequence = 0
	return p, w.write(append([]byte{comStmtClose}, id...))
}

var errPacket = errors.New("the server said something that is no answer to a statement")

// mysqlPackets reads and writes the packets of one command.
type mysqlPackets struct {
	conn     net.Conn
	sequence byte
}

func (w *mysqlPackets) write(body []byte) error {
	packet := make([]byte, 4, 4+len(body))
	binary.LittleEndian.PutUint32(packet, uint32(len(body)))
	packet[3] = w.sequence
	w.sequence++
	_, err := w.conn.Write(append(packet, body...))
	return err
}

func (w *mysqlPackets) read() ([]byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(w.conn, head[:]); err != nil {
		return nil, err
	}
	n := int(head[0]) | int(head[1])<<8 | int(head[2])<<16
	if head[3] != w.sequence || n > maxDefinition {
		return nil, errPacket
	}
	w.sequence++
	body := make([]byte, n)
	_, err := io.ReadFull(w.conn, body)
	return body, err
}

// mysqlRefusal reads an error packet.
func mysqlRefusal(packet []byte) error {
	if len(packet) < 3 {
		return errPacket
	}
	e := &mysql.MySQLError{Number: binary.LittleEndian.Uint16(packet[1:3])}
	rest := packet[3:]
	if len(rest) >= 6 && rest[0] == '#' {
		copy(e.SQLState[:], rest[1:6])
		rest = rest[6:]
	}
	e.Message = string(rest)
	return e
}

// mysqlDefinition reads what the server says of one column or placeholder.
func mysqlDefinition(packet []byte) (mysqlColumn, error) {
	var c mysqlColumn
	var texts [6]string // catalog, schema, table, its own name, name, its own name
	for i := range texts {
		text, rest, ok := lengthEncoded(packet)
		if !ok {
			return c, errPacket
		}
		texts[i], packet = string(text), rest
	}
	// 0x0c charset:2 length:4 type:1 flags:2 decimals:1
	if len(packet) < 11 || packet[0] != 0x0c {
		return c, errPacket
	}
	flags := binary.LittleEndian.Uint16(packet[8:])
	c.schema, c.table, c.name, c.column = texts[1], texts[3], texts[4], texts[5]
	c.database = mysqlTypeName(packet[7], flags, binary.LittleEndian.Uint16(packet[1:]))
	c.notNull = flags&mysqlNotNull != 0
	return c, nil
}

// lengthEncoded reads a text with its length in front.
func lengthEncoded(b []byte) (text, rest []byte, ok bool) {
	if len(b) == 0 {
		return nil, nil, false
	}
	n, size := uint64(b[0]), 1
	switch b[0] {
	case 0xfb, 0xff:
		return nil, nil, false
	case 0xfc:
		size = 3
	case 0xfd:
		size = 4
	case 0xfe:
		size = 9
	}
	if len(b) < size {
		return nil, nil, false
	}
	if size > 1 {
		n = 0
		for i := size - 1; i > 0; i-- {
			n = n<<8 | uint64(b[i])
		}
	}
	if n > uint64(len(b)-size) {
		return nil, nil, false
	}
	return b[size : size+int(n)], b[size+int(n):], true
}

// Flags of a definition.
const (
	mysqlNotNull     = 1 << 0
	mysqlUnsigned    = 1 << 5
	mysqlEnum        = 1 << 8
	mysqlSet         = 1 << 11
	mysqlBinaryChars = 63 // the collation of bytes
)

// mysqlTypeNames are the driver's names of types by number; the second is that of
// bytes, for types that texts share with them.
var mysqlTypeNames = map[byte][2]string{
	0: {"DECIMAL"}, 1: {"TINYINT"}, 2: {"SMALLINT"}, 3: {"INT"}, 4: {"FLOAT"}, 5: {"DOUBLE"}, 6: {"NULL"}, 7: {"TIMESTAMP"}, 8: {"BIGINT"}, 9: {"MEDIUMINT"},
	10: {"DATE"}, 11: {"TIME"}, 12: {"DATETIME"}, 13: {"YEAR"}, 14: {"DATE"}, 15: {"VARCHAR", "VARBINARY"}, 16: {"BIT"},
	242: {"VECTOR"}, 245: {"JSON"}, 246: {"DECIMAL"}, 247: {"ENUM"}, 248: {"SET"},
	249: {"TINYTEXT", "TINYBLOB"}, 250: {"MEDIUMTEXT", "MEDIUMBLOB"}, 251: {"LONGTEXT", "LONGBLOB"}, 252: {"TEXT", "BLOB"},
	253: {"VARCHAR", "VARBINARY"}, 254: {"CHAR", "BINARY"}, 255: {"GEOMETRY"},
}

// mysqlTypeName is the name that the driver gives a type when the statement runs.
func mysqlTypeName(number byte, flags, collation uint16) string {
	names, ok := mysqlTypeNames[number]
	switch {
	case !ok:
		return ""
	case number == 254 && flags&mysqlEnum != 0:
		return "ENUM"
	case number == 254 && flags&mysqlSet != 0:
		return "SET"
	case names[1] != "" && collation == mysqlBinaryChars:
		return names[1]
	case flags&mysqlUnsigned != 0 && (number >= 1 && number <= 3 || number == 8 || number == 9):
		return "UNSIGNED " + names[0]
	}
	return names[0]
}
