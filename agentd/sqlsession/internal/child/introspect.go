package child

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"
	gproto "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/agentd/policy"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// pageSize is what a page is filled up to, in bytes; a single large table
	// may take more, maxTable at most.
	pageSize = 128 << 10
	maxTable = frame.MaxPage - 1<<20
	// chunkTables and chunkColumns bound how much is asked for at once.
	chunkTables  = 200
	chunkColumns = 4000
	// maxComment bounds a comment, in bytes.
	maxComment = 1 << 10
	// maxKeys and maxIndexes are kept of a table, maxKeyColumns of a key.
	maxKeys       = 500
	maxIndexes    = 500
	maxKeyColumns = 64
	maxTriggers   = 500
	// maxMembers bounds the labels of an enum and the attributes of a composite.
	maxMembers = 1000
	// hiddenName stands where a name may not be told.
	hiddenName = "(hidden)"
)

// catalog is one introspection under way. What it keeps is a page, a chunk of
// tables, and a few bytes for each schema.
type catalog struct {
	*session
	st      *statement
	request *frame.IntrospectRequest
	hide    policy.Hide
	// sums are the schemas' fingerprints so far.
	sums map[string][sha256.Size]byte
	// emit is false while only fingerprints are wanted.
	emit    bool
	skip    map[string]bool // unchanged schemas
	page    *posternv1.CatalogPage
	size    int
	refusal *pgproto3.ErrorResponse
}

// introspect is engine's.
func (s *session) introspect(r *frame.IntrospectRequest, st *statement) *proto.Error {
	c := &catalog{session: s, st: st, request: r, hide: policy.Hide(r.Hide), page: &posternv1.CatalogPage{}}
	return c.failure(c.run())
}

// failure puts an error into our words.
func (c *catalog) failure(err error) *proto.Error {
	limit := &frame.RunRequest{TimeoutMillis: c.request.TimeoutMillis}
	switch {
	case err == nil:
		return nil
	case c.st.stopReason() != 0:
		return stopError(c.st.stopReason(), limit)
	case c.refusal != nil && c.refusal.Code == stateQueryCanceled:
		return timeoutError(limit)
	case c.refusal != nil:
		return proto.Errorf(proto.CodeSQL, "introspection failed: the database said: %s (SQLSTATE %s)", clean(c.refusal.Message), clean(c.refusal.Code))
	}
	return (&execution{session: c.session}).broken(err)
}

func (c *catalog) run() error {
	timeout := c.request.TimeoutMillis
	begin := fmt.Sprintf("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;SET LOCAL search_path = '';SET LOCAL statement_timeout = %d;"+
		"SET LOCAL lock_timeout = %d;SET LOCAL idle_in_transaction_session_timeout = %d;SET LOCAL jit = off;%s",
		timeout, min(timeout, maxLockTimeout.Milliseconds()), timeout+time.Minute.Milliseconds(), c.checkPeer)
	if err := c.each(begin, nil); err != nil {
		return err
	}
	if len(c.request.Known) > 0 {
		// Which schemas have changed must be known before any is sent.
		if _, err := c.pass(); err != nil {
			return err
		}
		c.skip = map[string]bool{}
		for name, known := range c.request.Known {
			if sum, there := c.sums[name]; there && string(known) == string(sum[:fingerprintSize]) {
				c.skip[name] = true
			}
		}
	}
	before := c.sums
	c.emit = true
	c.page, c.size = &posternv1.CatalogPage{}, 0
	schemas, err := c.pass()
	if err != nil {
		return err
	}
	for _, s := range schemas {
		sum := c.sums[s.Name]
		if c.skip[s.Name] {
			sum = before[s.Name]
		}
		s.Fingerprint = sum[:fingerprintSize]
		c.room(gproto.Size(s))
		c.page.Schemas = append(c.page.Schemas, s)
	}
	c.page.Complete = true
	c.flush()
	return nil
}

// fingerprintSize is the length of a fingerprint in bytes.
const fingerprintSize = 16

// pass reads the catalog once.
func (c *catalog) pass() ([]*posternv1.CatalogSchema, error) {
	c.sums = map[string][sha256.Size]byte{}
	var schemas []*posternv1.CatalogSchema
	err := c.each(schemasQuestion, func(row []string) error {
		s := &posternv1.CatalogSchema{Name: name(row[0]), Comment: comment(row[1])}
		if c.hide.Schema(s.Name) {
			return nil
		}
		c.sums[s.Name] = sha256.Sum256([]byte("postern catalog 1"))
		c.digest(s.Name, s)
		schemas = append(schemas, s)
		return nil
	})
	if err != nil {
		return nil, err
	}
	if err := c.relations(); err != nil {
		return nil, err
	}
	for _, part := range []func() error{c.functions, c.types, c.sequences} {
		if err := part(); err != nil {
			return nil, err
		}
	}
	return schemas, nil
}

// digest adds a message to a schema's fingerprint.
func (c *catalog) digest(schema string, m gproto.Message) {
	sum := c.sums[schema]
	raw, err := gproto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		panic(err) // its texts are UTF-8
	}
	c.sums[schema] = sha256.Sum256(append(sum[:], raw...))
}

// wanted reports whether what is in a schema is to be looked at at all.
func (c *catalog) wanted(schema string) bool {
	_, there := c.sums[schema]
	return there && !c.skip[schema]
}

// relation is a table with what is needed to ask for the rest of it.
type relation struct {
	oid      string
	columns  int
	table    *posternv1.CatalogTable
	byNumber map[int]string // names of its visible columns
}

func (c *catalog) relations() error {
	if err := c.each("DECLARE postern_relations NO SCROLL CURSOR FOR "+relationsQuestion, nil); err != nil {
		return err
	}
	for {
		var batch []*relation
		fetched := 0
		err := c.each(fmt.Sprintf("FETCH %d FROM postern_relations", chunkTables), func(row []string) error {
			fetched++
			r := c.relation(row)
			if r != nil {
				batch = append(batch, r)
			}
			return nil
		})
		if err != nil {
			return err
		}
		for len(batch) > 0 {
			n, columns := 0, 0
			for n < len(batch) && (n == 0 || columns+batch[n].columns <= chunkColumns) {
				columns += batch[n].columns
				n++
			}
			if err := c.details(batch[:n]); err != nil {
				return err
			}
			batch = batch[n:]
		}
		if fetched < chunkTables {
			return c.each("CLOSE postern_relations", nil)
		}
	}
}

var kinds = map[string]string{"r": "table", "p": "partitioned table", "v": "view", "m": "materialized view", "f": "foreign table"}

// relation makes a table of a row; nil if nobody may hear of it.
func (c *catalog) relation(row []string) *relation {
	t := &posternv1.CatalogTable{Schema: name(row[1]), Name: name(row[2]), Kind: kinds[row[3]], Comment: comment(row[4])}
	if !c.wanted(t.Schema) || c.hide.Object(t.Schema, t.Name) {
		return nil
	}
	columns, _ := strconv.Atoi(row[5])
	rows, _ := strconv.ParseInt(row[6], 10, 64)
	pages, _ := strconv.ParseInt(row[7], 10, 64)
	unknown := rows < 0 || rows == 0 && pages == 0 && c.majorVersion() < 14
	if t.Kind != "view" && !unknown {
		t.Rows = gproto.Uint64(c.roughly(uint64(rows)))
	}
	if (t.Kind == "table" || t.Kind == "materialized view") && pages >= 0 && !unknown {
		t.Bytes = gproto.Uint64(c.roughly(uint64(pages) * 8192))
	}
	if parent := (&posternv1.CatalogName{Schema: name(row[8]), Name: name(row[9])}); row[10] == "t" && !c.hide.Object(parent.Schema, parent.Name) {
		t.PartitionOf = parent
	}
	return &relation{oid: row[0], columns: columns, table: t, byNumber: map[int]string{}}
}

// fewest is the smallest estimate, but for 0, that is told where estimates are
// coarse.
const fewest = 100

// roughly keeps two significant digits; one where estimates are coarse, and there
// nothing from 1 to 100 is told apart.
func (c *catalog) roughly(n uint64) uint64 {
	if c.request.Coarse {
		if n == 0 {
			return 0
		}
		return max(fewest, significant(n, 10))
	}
	return significant(n, 100)
}

// significant rounds n so that what is left of it is below limit times a power of ten.
func significant(n, limit uint64) uint64 {
	unit := uint64(1)
	for n/unit >= limit {
		unit *= 10
	}
	rest := n % unit
	n -= rest
	if rest >= (unit+1)/2 && unit > 1 {
		n += unit
	}
	return n
}

// details asks for columns, keys and indexes, and sends the tables.
func (c *catalog) details(batch []*relation) error {
	of := make(map[string]*relation, len(batch))
	oids := make([]string, len(batch))
	for i, r := range batch {
		of[r.oid], oids[i] = r, r.oid
	}
	list := " ANY ('{" + strings.Join(oids, ",") + "}'::pg_catalog.oid[]) "
	for _, question := range []struct {
		sql  string
		take func(*relation, []string) error
	}{{columnsQuestion, c.column}, {keysQuestion, c.key}, {indexesQuestion, c.index}, {triggersQuestion, c.trigger}} {
		err := c.each(strings.ReplaceAll(question.sql, "$tables", list), func(row []string) error {
			if r := of[row[0]]; r != nil {
				return question.take(r, row[1:])
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	for _, r := range batch {
		t := r.table
		if gproto.Size(t) > maxTable {
			t.Truncated = true
			for _, column := range t.Columns {
				column.Comment = ""
			}
		}
		if gproto.Size(t) > maxTable {
			t.Keys, t.Indexes, t.Triggers = nil, nil, nil
		}
		c.digest(t.Schema, t)
		c.room(gproto.Size(t))
		c.page.Tables = append(c.page.Tables, t)
	}
	return nil
}

// typeText is a type's name unless it may not be told.
func (c *catalog) typeText(text, schema, object string) string {
	if c.hide.Object(name(schema), name(object)) {
		return hiddenName
	}
	return frame.Clip(name(text), 4*maxComment)
}

func (c *catalog) column(r *relation, row []string) error {
	number, _ := strconv.Atoi(row[0])
	column := &posternv1.CatalogColumn{
		Name: name(row[1]), Type: c.typeText(row[2], row[8], row[9]), NotNull: row[3] == "t", HasDefault: row[4] == "t", Comment: comment(row[7]),
	}
	switch {
	case row[5] == "a":
		column.Generated = "identity always"
	case row[5] != "":
		column.Generated = "identity"
	case row[6] != "":
		column.Generated, column.HasDefault = "generated", false
	}
	r.byNumber[number] = column.Name
	r.table.Columns = append(r.table.Columns, column)
	return nil
}

// names turns column numbers, a JSON array, into names.
func (r *relation) names(numbers string) ([]string, error) {
	var list []int
	if numbers == "" {
		return nil, nil
	}
	if err := json.Unmarshal([]byte(numbers), &list); err != nil {
		return nil, fmt.Errorf("%w: %q is no list of columns", errProtocol, frame.Clip(numbers, 100))
	}
	if len(list) > maxKeyColumns {
		list, r.table.Truncated = list[:maxKeyColumns], true
	}
	names := make([]string, len(list))
	for i, n := range list {
		switch column, visible := r.byNumber[n]; {
		case visible:
			names[i] = column
		case n == 0:
			names[i] = "(expression)"
		default:
			names[i] = hiddenName
		}
	}
	return names, nil
}

var keyKinds = map[string]string{"p": "primary", "u": "unique", "f": "foreign", "c": "check", "x": "exclusion"}

func (c *catalog) key(r *relation, row []string) error {
	if len(r.table.Keys) >= maxKeys {
		r.table.Truncated = true
		return nil
	}
	k := &posternv1.CatalogKey{Name: name(row[0]), Kind: keyKinds[row[1]]}
	var err error
	if k.Columns, err = r.names(row[2]); err != nil {
		return err
	}
	if k.Kind == "foreign" {
		target := &posternv1.CatalogName{Schema: name(row[3]), Name: name(row[4])}
		if row[6] != "t" || c.hide.Object(target.Schema, target.Name) {
			// Its name may be made of the other table's.
			k.Name, k.ReferencesHidden = "", true
		} else {
			k.References = target
			if err := json.Unmarshal([]byte(row[5]), &k.ReferencedColumns); err != nil {
				return fmt.Errorf("%w: %q is no list of names", errProtocol, frame.Clip(row[5], 100))
			}
		}
	}
	r.table.Keys = append(r.table.Keys, k)
	return nil
}

func (c *catalog) index(r *relation, row []string) error {
	if len(r.table.Indexes) >= maxIndexes {
		r.table.Truncated = true
		return nil
	}
	columns, err := r.names(row[4])
	if err != nil {
		return err
	}
	if n, err := strconv.Atoi(row[5]); err == nil && n < len(columns) {
		columns = columns[:n] // the rest is INCLUDEd
	}
	r.table.Indexes = append(r.table.Indexes, &posternv1.CatalogIndex{
		Name: name(row[0]), Unique: row[1] == "t", Method: name(row[2]), Partial: row[3] == "t", Columns: columns,
	})
	return nil
}

var (
	functionKinds = map[string]string{"f": "function", "p": "procedure", "a": "aggregate", "w": "window"}
	argumentModes = map[string]string{"i": "in", "o": "out", "b": "inout", "v": "variadic", "t": "table"}
)

func (c *catalog) functions() error {
	return c.each(functionsQuestion, func(row []string) error {
		f := &posternv1.CatalogFunction{
			Schema: name(row[0]), Name: name(row[1]), Kind: functionKinds[row[2]], ReturnsSet: row[3] == "t",
			Result: c.typeText(row[4], row[5], row[6]), Comment: comment(row[7]),
		}
		if !c.wanted(f.Schema) || c.hide.Object(f.Schema, f.Name) {
			return nil
		}
		if f.Kind == "procedure" {
			f.Result = ""
		}
		// Each: name, mode, type, the type's schema, its bare name.
		var arguments [][5]string
		if row[8] != "" {
			if err := json.Unmarshal([]byte(row[8]), &arguments); err != nil {
				return fmt.Errorf("%w: %q are no arguments", errProtocol, frame.Clip(row[8], 100))
			}
		}
		for _, a := range arguments {
			f.Arguments = append(f.Arguments, &posternv1.CatalogArgument{Name: name(a[0]), Mode: argumentModes[a[1]], Type: c.typeText(a[2], a[3], a[4])})
		}
		c.digest(f.Schema, f)
		c.room(gproto.Size(f))
		c.page.Functions = append(c.page.Functions, f)
		return nil
	})
}

// room sends the page if it has no room for size bytes more. While only
// fingerprints are wanted it throws the page away.
func (c *catalog) room(size int) {
	if c.size > 0 && c.size+size > pageSize {
		c.flush()
	}
	c.size += size + 8
}

func (c *catalog) flush() {
	if c.emit && !c.st.isStopped() {
		raw, err := gproto.Marshal(c.page)
		if err != nil {
			panic(err) // its texts are UTF-8
		}
		if err := c.sink.send(frame.Page, raw); err != nil {
			panic(err) // maxTable is less than the limit
		}
	}
	c.page, c.size = &posternv1.CatalogPage{}, 0
}

// each runs a statement of ours and hands its rows, as text, to take; NULL is "".
func (c *catalog) each(sql string, take func(row []string) error) error {
	if c.st.isStopped() {
		return errStopped
	}
	w := c.wire
	if err := w.send(&pgproto3.Query{String: sql}); err != nil {
		return err
	}
	if err := w.flush(); err != nil {
		return err
	}
	refusal, err := w.untilReady(func(t byte, body []byte) error {
		if t != 'D' || take == nil {
			return nil
		}
		var row pgproto3.DataRow
		if err := row.Decode(body); err != nil {
			return fmt.Errorf("%w: %v", errProtocol, err)
		}
		texts := make([]string, len(row.Values))
		for i, v := range row.Values {
			texts[i] = string(v)
		}
		return take(texts)
	})
	if err == nil && refusal != nil {
		c.refusal = refusal
		err = errStopped
	}
	return err
}

// errStopped stands for what the statement or the refusal says better.
var errStopped = fmt.Errorf("introspection stopped")

func name(text string) string { return strings.ToValidUTF8(text, "\uFFFD") }

func comment(text string) string { return frame.Clip(name(text), maxComment) }
