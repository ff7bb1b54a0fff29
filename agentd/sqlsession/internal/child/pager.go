package child

import (
	"crypto/sha256"

	gproto "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/agentd/policy"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// pager sends what an engine's walk through its catalog tells, for engines whose
// catalog is not asked for as PostgreSQL's is. It keeps a page and a few bytes for
// each schema.
type pager struct {
	sink    *sink
	request *frame.IntrospectRequest
	hide    policy.Hide
	sums    map[string][sha256.Size]byte
	emit    bool // false while only fingerprints are wanted
	skip    map[string]bool
	page    *posternv1.CatalogPage
	size    int
}

// pages walks the catalog: once to see what has changed, if the caller knows some of
// it, and once to send it. walk calls schema first for each of them, then table and
// function in an order that is always the same.
func pages(out *sink, r *frame.IntrospectRequest, walk func(*pager) error) error {
	p := &pager{sink: out, request: r, hide: policy.Hide(r.Hide), page: &posternv1.CatalogPage{}}
	p.sums = map[string][sha256.Size]byte{}
	if len(r.Known) > 0 {
		if err := walk(p); err != nil {
			return err
		}
		p.skip = map[string]bool{}
		for name, known := range r.Known {
			if sum, there := p.sums[name]; there && string(known) == string(sum[:fingerprintSize]) {
				p.skip[name] = true
			}
		}
	}
	before := p.sums
	p.sums, p.emit = map[string][sha256.Size]byte{}, true
	p.page, p.size = &posternv1.CatalogPage{}, 0
	var schemas []*posternv1.CatalogSchema
	if err := walk(p); err != nil {
		return err
	}
	for name, sum := range p.sums {
		if p.skip[name] {
			sum = before[name]
		}
		schemas = append(schemas, &posternv1.CatalogSchema{Name: name, Fingerprint: sum[:fingerprintSize]})
	}
	sortSchemas(schemas)
	for _, s := range schemas {
		p.room(gproto.Size(s))
		p.page.Schemas = append(p.page.Schemas, s)
	}
	p.page.Complete = true
	p.flush()
	return nil
}

// schema begins a schema; it tells whether what is in it is to be looked at.
func (p *pager) schema(name string) bool {
	if p.hide.Schema(name) {
		return false
	}
	p.sums[name] = sha256.Sum256([]byte("postern catalog 1 " + name))
	return !p.skip[name]
}

// table adds a table unless it is hidden.
func (p *pager) table(t *posternv1.CatalogTable) {
	if p.hide.Object(t.Schema, t.Name) {
		return
	}
	if gproto.Size(t) > maxTable {
		t.Truncated = true
		for _, c := range t.Columns {
			c.Comment = ""
		}
	}
	if gproto.Size(t) > maxTable {
		t.Keys, t.Indexes = nil, nil
	}
	p.digest(t.Schema, t)
	p.room(gproto.Size(t))
	p.page.Tables = append(p.page.Tables, t)
}

// function adds a function unless it is hidden.
func (p *pager) function(f *posternv1.CatalogFunction) {
	if p.hide.Object(f.Schema, f.Name) {
		return
	}
	p.digest(f.Schema, f)
	p.room(gproto.Size(f))
	p.page.Functions = append(p.page.Functions, f)
}

// foreign sets what a foreign key refers to, unless it may not be told.
func (p *pager) foreign(k *posternv1.CatalogKey, schema, table string, columns []string, visible bool) {
	if !visible || p.hide.Object(schema, table) {
		k.Name, k.ReferencesHidden = "", true
		return
	}
	k.References = &posternv1.CatalogName{Schema: schema, Name: table}
	k.ReferencedColumns = columns
}

func (p *pager) digest(schema string, m gproto.Message) {
	sum := p.sums[schema]
	raw, err := gproto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		panic(err) // its texts are UTF-8
	}
	p.sums[schema] = sha256.Sum256(append(sum[:], raw...))
}

// room sends the page if it has no room for size bytes more.
func (p *pager) room(size int) {
	if p.size > 0 && p.size+size > pageSize {
		p.flush()
	}
	p.size += size + 8
}

func (p *pager) flush() {
	if p.emit {
		raw, err := gproto.Marshal(p.page)
		if err != nil {
			panic(err) // its texts are UTF-8
		}
		if err := p.sink.send(frame.Page, raw); err != nil {
			panic(err) // maxTable is less than the limit
		}
	}
	p.page, p.size = &posternv1.CatalogPage{}, 0
}

// roughly is an estimate as it may be told.
func (p *pager) roughly(n uint64) uint64 { return (&catalog{request: p.request}).roughly(n) }
