package store

import (
	"context"
	"database/sql"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	posternproto "github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/glob"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// stageBatch is how many objects one statement inserts.
	stageBatch = 50
	// searchBatch is how many objects are read at once, searchMost how many are
	// looked at for one page, searchBytes how large it gets.
	searchBatch = 500
	searchMost  = 20_000
	searchBytes = 2 << 20
	// defaultPage and largestPage are in tables, functions, types and sequences.
	defaultPage = 500
	largestPage = 1000
	// stageAge is after how long objects that no schema took over are forgotten.
	stageAge = time.Hour
)

// Kinds of objects.
const (
	kindTable    = 0
	kindFunction = 1
	kindType     = 2
	kindSequence = 3
)

// NewGeneration names a refresh that begins now.
func NewGeneration(now time.Time) string {
	return fmt.Sprintf("%013d_%s", now.UnixMilli(), posternproto.NewID(""))
}

// CatalogState says what is cached of a data source: its schemas with their
// fingerprints, how many columns and bytes each takes, when it was refreshed and whether
// some of it is missing. It is NOT_FOUND before the first FinishCatalog.
func (s *Store) CatalogState(ctx context.Context, agent, source string) (schemas []*posternv1.CatalogSchema, sizes map[string][2]int64, refreshed time.Time, truncated bool, err error) {
	var at, cut int64
	err = s.reader().row(ctx, "SELECT refreshed, truncated FROM catalogs WHERE agent = ? AND source = ?", agent, plainText(source)).Scan(&at, &cut)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil, time.Time{}, false, notFound("catalog of data source", source)
	}
	if err != nil {
		return nil, nil, time.Time{}, false, s.fail(ctx, "read a catalog", err)
	}
	sizes = map[string][2]int64{}
	rows, err := s.reader().query(ctx, `SELECT name, fingerprint, comment, column_count, byte_count
		FROM catalog_schemas WHERE agent = ? AND source = ? ORDER BY name`, agent, plainText(source))
	schemas, err = collect(ctx, s, "list schemas", rows, err, func(rows *sql.Rows) (*posternv1.CatalogSchema, error) {
		c := &posternv1.CatalogSchema{}
		var size [2]int64
		err := rows.Scan(&c.Name, &c.Fingerprint, &c.Comment, &size[0], &size[1])
		sizes[c.Name] = size
		return c, err
	})
	return schemas, sizes, time.UnixMilli(at).UTC(), cut != 0, err
}

// StageCatalog adds a page of a refresh under way; nobody sees it before
// FinishCatalog.
func (s *Store) StageCatalog(ctx context.Context, agent, source, generation string, page *posternv1.CatalogPage) error {
	var args []any // of this run of the transaction
	add := func(schema, name string, kind, position int, m proto.Message) error {
		data, err := proto.Marshal(m)
		if err != nil {
			return posternproto.Errorf(posternproto.CodeInvalid, "the catalog cannot be encoded: %w", err)
		}
		args = append(args, agent, plainText(source), plainText(schema), generation, kind, plainText(name), position, data)
		return nil
	}
	return s.writeRelaxed(ctx, "cache a catalog", func(tx handle) error {
		args = nil
		for _, t := range page.Tables {
			if err := add(t.Schema, t.Name, kindTable, 0, t); err != nil {
				return err
			}
		}
		position := 0
		for i, f := range page.Functions {
			// Functions come by schema and name: one of the same name may be on an
			// earlier page, too.
			position++
			if i > 0 && (f.Name != page.Functions[i-1].Name || f.Schema != page.Functions[i-1].Schema) {
				position = 0
			}
			if i == 0 {
				if err := tx.row(ctx, `SELECT coalesce(max(position), -1) + 1 FROM catalog_objects
					WHERE agent = ? AND source = ? AND schema = ? AND generation = ? AND kind = ? AND name = ?`,
					agent, plainText(source), plainText(f.Schema), generation, kindFunction, plainText(f.Name)).Scan(&position); err != nil {
					return err
				}
			}
			if err := add(f.Schema, f.Name, kindFunction, position, f); err != nil {
				return err
			}
		}
		for _, t := range page.Types {
			if err := add(t.Schema, t.Name, kindType, 0, t); err != nil {
				return err
			}
		}
		for _, q := range page.Sequences {
			if err := add(q.Schema, q.Name, kindSequence, 0, q); err != nil {
				return err
			}
		}
		const fields = 8
		for len(args) > 0 {
			n := min(stageBatch*fields, len(args))
			_, err := tx.exec(ctx, `INSERT INTO catalog_objects (agent, source, schema, generation, kind, name, position, data) VALUES `+
				strings.TrimSuffix(strings.Repeat("("+placeholders(fields)+"), ", n/fields), ", "), args[:n]...)
			if err != nil {
				return err
			}
			args = args[n:]
		}
		return nil
	})
}

// FinishCatalog makes a refresh count: schemas are all that the source has. Those
// in kept stay as they are, by their fingerprint; the others have what was staged, of
// these sizes.
func (s *Store) FinishCatalog(ctx context.Context, agent, source, generation string, schemas []*posternv1.CatalogSchema, kept map[string]bool, sizes map[string][2]int64, truncated bool, now time.Time) error {
	source = plainText(source)
	type old struct{ name, generation, fingerprint string }
	var replaced []old
	err := s.writeRelaxed(ctx, "cache a catalog", func(tx handle) error {
		replaced = nil
		cut := 0
		if truncated {
			cut = 1
		}
		// Takes the row, so that two control planes do not finish at once.
		if _, err := tx.exec(ctx, `INSERT INTO catalogs (agent, source, refreshed, truncated) VALUES (?, ?, ?, ?)
			ON CONFLICT (agent, source) DO UPDATE SET refreshed = excluded.refreshed, truncated = excluded.truncated`,
			agent, source, millis(now), cut); err != nil {
			return err
		}
		rows, err := tx.query(ctx, "SELECT name, generation, fingerprint FROM catalog_schemas WHERE agent = ? AND source = ?", agent, source)
		had, err := collect(ctx, s, "list schemas", rows, err, func(rows *sql.Rows) (old, error) {
			var o old
			var fingerprint []byte
			err := rows.Scan(&o.name, &o.generation, &fingerprint)
			o.fingerprint = string(fingerprint)
			return o, err
		})
		if err != nil {
			return err
		}
		before := map[string]old{}
		for _, o := range had {
			before[o.name] = o
		}
		for _, c := range schemas {
			name := plainText(c.Name)
			o, there := before[name]
			delete(before, name)
			if kept[c.Name] {
				if !there || o.fingerprint != string(c.Fingerprint) {
					return posternproto.Errorf(posternproto.CodeUnavailable, "the cached catalog of %q changed meanwhile: try again", clip(source))
				}
				continue
			}
			if there {
				replaced = append(replaced, o)
			}
			if c.Fingerprint == nil {
				c.Fingerprint = []byte{}
			}
			if _, err := tx.exec(ctx, `INSERT INTO catalog_schemas (agent, source, name, generation, fingerprint, comment, column_count, byte_count) VALUES (?, ?, ?, ?, ?, ?, ?, ?)
				ON CONFLICT (agent, source, name) DO UPDATE SET generation = excluded.generation, fingerprint = excluded.fingerprint,
					comment = excluded.comment, column_count = excluded.column_count, byte_count = excluded.byte_count`,
				agent, source, name, generation, c.Fingerprint, plainText(c.Comment), sizes[c.Name][0], sizes[c.Name][1]); err != nil {
				return err
			}
		}
		for _, o := range before {
			replaced = append(replaced, o)
			if _, err := tx.exec(ctx, "DELETE FROM catalog_schemas WHERE agent = ? AND source = ? AND name = ?", agent, source, o.name); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, o := range replaced {
		if err := s.writeRelaxed(ctx, "forget an old catalog", func(tx handle) error {
			_, err := tx.exec(ctx, "DELETE FROM catalog_objects WHERE agent = ? AND source = ? AND schema = ? AND generation = ?", agent, source, o.name, o.generation)
			return err
		}); err != nil {
			return err
		}
	}
	return s.writeRelaxed(ctx, "forget an old catalog", func(tx handle) error {
		_, err := tx.exec(ctx, `DELETE FROM catalog_objects WHERE agent = ? AND source = ? AND generation < ? AND NOT EXISTS
			(SELECT 1 FROM catalog_schemas s WHERE s.agent = catalog_objects.agent AND s.source = catalog_objects.source
				AND s.name = catalog_objects.schema AND s.generation = catalog_objects.generation)`,
			agent, source, fmt.Sprintf("%013d", now.Add(-stageAge).UnixMilli()))
		return err
	})
}

// DropStaged forgets a refresh that came to nothing.
func (s *Store) DropStaged(ctx context.Context, agent, source, generation string) error {
	return s.writeRelaxed(ctx, "forget an unfinished catalog", func(tx handle) error {
		_, err := tx.exec(ctx, `DELETE FROM catalog_objects WHERE agent = ? AND source = ? AND generation = ? AND NOT EXISTS
			(SELECT 1 FROM catalog_schemas s WHERE s.agent = catalog_objects.agent AND s.source = catalog_objects.source AND s.generation = ?)`,
			agent, plainText(source), generation, generation)
		return err
	})
}

// KeepCatalogs forgets the catalogs of an agent's data sources but these.
func (s *Store) KeepCatalogs(ctx context.Context, agent string, sources []string) error {
	return s.writeRelaxed(ctx, "forget catalogs", func(tx handle) error { return keepCatalogs(ctx, tx, agent, sources) })
}

func keepCatalogs(ctx context.Context, tx handle, agent string, sources []string) error {
	condition, args := " WHERE agent = ?", []any{agent}
	if len(sources) > 0 {
		condition += " AND source NOT IN (" + placeholders(len(sources)) + ")"
		for _, source := range sources {
			args = append(args, plainText(source))
		}
	}
	for _, table := range []string{"catalog_objects", "catalog_schemas", "catalogs"} {
		if _, err := tx.exec(ctx, "DELETE FROM "+table+condition, args...); err != nil {
			return err
		}
	}
	return nil
}

// place is where a page of a search ends.
type place struct {
	Schema   string `json:"s"`
	Kind     int    `json:"k"`
	Name     string `json:"n"`
	Position int    `json:"p"`
}

func (p place) token() string {
	raw, err := json.Marshal(p)
	if err != nil {
		panic(err) // texts and numbers always encode
	}
	return base64.RawURLEncoding.EncodeToString(raw)
}

// parsePlace reads a token, which comes from a caller.
func parsePlace(token string) (place, error) {
	start := place{Kind: -1}
	if token == "" {
		return start, nil
	}
	raw, err := base64.RawURLEncoding.DecodeString(token)
	var p place
	if err == nil && len(raw) <= 4096 {
		err = json.Unmarshal(raw, &p)
	}
	if err != nil || len(raw) > 4096 || p.Schema == "" || p.Kind < kindTable || p.Kind > kindSequence || p.Position < 0 {
		return start, posternproto.Errorf(posternproto.CodeInvalid, "the page token is none of ours: begin without one")
	}
	p.Schema, p.Name = plainText(p.Schema), plainText(p.Name)
	return p, nil
}

// SearchCatalog reads a page of what is cached of a data source; of the request,
// agent and refresh are not looked at. It is NOT_FOUND when nothing is.
func (s *Store) SearchCatalog(ctx context.Context, agent string, r *posternv1.IntrospectSourceRequest) (*posternv1.IntrospectSourceResponse, error) {
	from, err := parsePlace(r.PageToken)
	if err != nil {
		return nil, err
	}
	size := int(min(r.PageSize, largestPage))
	if size == 0 {
		size = defaultPage
	}
	source := plainText(r.Source)
	var at, cut int64
	err = s.reader().row(ctx, "SELECT refreshed, truncated FROM catalogs WHERE agent = ? AND source = ?", agent, source).Scan(&at, &cut)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, notFound("catalog of data source", r.Source)
	}
	if err != nil {
		return nil, s.fail(ctx, "read a catalog", err)
	}
	rows, err := s.reader().query(ctx, "SELECT name, comment FROM catalog_schemas WHERE agent = ? AND source = ? AND name >= ? ORDER BY name", agent, source, from.Schema)
	schemas, err := collect(ctx, s, "list schemas", rows, err, func(rows *sql.Rows) (*posternv1.CatalogSchema, error) {
		c := &posternv1.CatalogSchema{}
		return c, rows.Scan(&c.Name, &c.Comment)
	})
	if err != nil {
		return nil, err
	}
	page := &searchPage{IntrospectSourceResponse: &posternv1.IntrospectSourceResponse{Refreshed: stamp(at), Truncated: cut != 0}, request: r, size: size}
	for _, c := range schemas {
		if r.Schema != "" && !glob.Match(r.Schema, c.Name) {
			continue
		}
		if r.PageToken == "" {
			page.Schemas = append(page.Schemas, c)
		}
		if page.NextPageToken != "" {
			continue // only the list of schemas is to be finished
		}
		if c.Name != from.Schema {
			from = place{Schema: c.Name, Kind: -1}
		}
		if err := s.searchSchema(ctx, agent, source, from, page); err != nil {
			return nil, err
		}
	}
	return page.IntrospectSourceResponse, nil
}

// searchPage is a page that is being filled.
type searchPage struct {
	*posternv1.IntrospectSourceResponse
	request      *posternv1.IntrospectSourceRequest
	size         int
	found        int
	seen, volume int
}

// searchSchema goes on behind a place in a schema. Each statement sees one
// generation alone.
func (s *Store) searchSchema(ctx context.Context, agent, source string, from place, page *searchPage) error {
	for {
		rows, err := s.reader().query(ctx, `SELECT o.kind, o.name, o.position, o.data FROM catalog_schemas s
			JOIN catalog_objects o ON o.agent = s.agent AND o.source = s.source AND o.schema = s.name AND o.generation = s.generation
			WHERE s.agent = ? AND s.source = ? AND s.name = ? AND (o.kind, o.name, o.position) > (?, ?, ?)
			ORDER BY o.kind, o.name, o.position LIMIT ?`, agent, source, from.Schema, from.Kind, from.Name, from.Position, searchBatch)
		if err != nil {
			return s.fail(ctx, "read a catalog", err)
		}
		n, full := 0, false
		for rows.Next() && !full {
			var data []byte
			if err = rows.Scan(&from.Kind, &from.Name, &from.Position, &data); err != nil {
				break
			}
			n++
			if err = page.add(from, data); err != nil {
				break
			}
			if full = page.found >= page.size || page.volume >= searchBytes || page.seen >= searchMost; full {
				page.NextPageToken = from.token()
			}
		}
		err = errors.Join(err, rows.Err(), rows.Close())
		if err != nil || full || n < searchBatch {
			return s.fail(ctx, "read a catalog", err)
		}
	}
}

func (p *searchPage) add(at place, data []byte) error {
	p.seen++
	if p.request.Table != "" && !glob.Match(p.request.Table, at.Name) {
		return nil
	}
	p.found++
	p.volume += len(data)
	switch at.Kind {
	case kindTable:
		return decodeInto(&p.Tables, data, p.request.NamesOnly, func(t *posternv1.CatalogTable) *posternv1.CatalogTable {
			return &posternv1.CatalogTable{Schema: t.Schema, Name: t.Name, Kind: t.Kind}
		})
	case kindFunction:
		return decodeInto(&p.Functions, data, p.request.NamesOnly, func(f *posternv1.CatalogFunction) *posternv1.CatalogFunction {
			return &posternv1.CatalogFunction{Schema: f.Schema, Name: f.Name, Kind: f.Kind}
		})
	case kindType:
		return decodeInto(&p.Types, data, p.request.NamesOnly, func(t *posternv1.CatalogType) *posternv1.CatalogType {
			return &posternv1.CatalogType{Schema: t.Schema, Name: t.Name, Kind: t.Kind}
		})
	case kindSequence:
		return decodeInto(&p.Sequences, data, p.request.NamesOnly, func(q *posternv1.CatalogSequence) *posternv1.CatalogSequence {
			return &posternv1.CatalogSequence{Schema: q.Schema, Name: q.Name}
		})
	}
	return nil // of a newer version
}

// decodeInto adds an object to a page's list; short is what is left of it where names
// alone are wanted.
func decodeInto[M proto.Message](list *[]M, data []byte, namesOnly bool, short func(M) M) error {
	var none M
	m := none.ProtoReflect().New().Interface().(M)
	if err := proto.Unmarshal(data, m); err != nil {
		return err
	}
	if namesOnly {
		m = short(m)
	}
	*list = append(*list, m)
	return nil
}
