package child

import (
	"errors"
	"strings"
	"time"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// sqliteSchema is the one schema there is.
const sqliteSchema = "main"

// introspect is engine's. It keeps the names of all tables.
func (s *sqliteSession) introspect(r *frame.IntrospectRequest, st *statement) *proto.Error {
	s.running.Store(st)
	defer s.running.Store(nil)
	timer := time.AfterFunc(time.Duration(r.TimeoutMillis)*time.Millisecond, func() { st.stop(frame.TimedOut) })
	defer timer.Stop()
	_, err := s.db.exec("BEGIN")
	if err == nil {
		err = pages(s.sink, r, func(p *pager) error { return s.walk(p, st) })
	}
	switch {
	case err == nil:
		return nil
	case st.stopReason() != 0:
		return stopError(st.stopReason(), &frame.RunRequest{TimeoutMillis: r.TimeoutMillis})
	}
	var e *sqliteError
	if errors.As(err, &e) {
		return proto.Errorf(proto.CodeSQL, "introspection failed: the database said: %s", s.explain(e))
	}
	return proto.Errorf(proto.CodeInternal, "%w", err)
}

func (s *sqliteSession) walk(p *pager, st *statement) error {
	if !p.schema(sqliteSchema) {
		return nil
	}
	// Tables that a virtual table keeps its own in ("shadow") are none of anybody's.
	tables, err := s.db.exec(`SELECT name, type FROM pragma_table_list WHERE schema = 'main' AND type IN ('table', 'view', 'virtual') AND name NOT LIKE 'sqlite\_%' ESCAPE '\' ORDER BY name`)
	if err != nil {
		return err
	}
	visible := map[string]string{} // by lower case
	for _, t := range tables {
		visible[strings.ToLower(t[0])] = t[0]
	}
	for _, row := range tables {
		if st.isStopped() {
			return errStopped
		}
		kind := "table"
		if row[1] == "view" {
			kind = "view"
		}
		if p.hide.Object(sqliteSchema, row[0]) {
			continue
		}
		t := &posternv1.CatalogTable{Schema: sqliteSchema, Name: name(row[0]), Kind: kind}
		if err := s.columns(t, row[0]); err != nil {
			return err
		}
		if kind == "table" {
			if err := s.indexes(t, row[0]); err != nil {
				return err
			}
			if err := s.foreignKeys(p, t, row[0], visible); err != nil {
				return err
			}
		}
		p.table(t)
	}
	return nil
}

func (s *sqliteSession) columns(t *posternv1.CatalogTable, table string) error {
	rows, err := s.db.exec(`SELECT name, type, "notnull", dflt_value IS NOT NULL, pk, hidden FROM pragma_table_xinfo(?1) WHERE hidden <> 1 ORDER BY cid`, table)
	if err != nil {
		// A view of what is gone has no columns any more.
		if t.Kind == "view" {
			return nil
		}
		return err
	}
	var primary []string
	for _, row := range rows {
		c := &posternv1.CatalogColumn{Name: name(row[0]), Type: frame.Clip(name(row[1]), 4*maxComment), NotNull: row[2] == "1", HasDefault: row[3] == "1"}
		if row[5] == "2" || row[5] == "3" {
			c.Generated, c.HasDefault = "generated", false
		}
		if row[4] != "0" {
			primary = append(primary, c.Name)
		}
		t.Columns = append(t.Columns, c)
	}
	if len(primary) > 0 {
		t.Keys = append(t.Keys, &posternv1.CatalogKey{Kind: "primary", Columns: primary[:min(len(primary), maxKeyColumns)]})
	}
	return nil
}

func (s *sqliteSession) indexes(t *posternv1.CatalogTable, table string) error {
	rows, err := s.db.exec(`SELECT name, "unique", origin, partial FROM pragma_index_list(?1) ORDER BY name`, table)
	if err != nil {
		return err
	}
	for _, row := range rows {
		if len(t.Indexes) >= maxIndexes {
			t.Truncated = true
			break
		}
		x := &posternv1.CatalogIndex{Name: name(row[0]), Unique: row[1] == "1", Method: "btree", Partial: row[3] == "1"}
		columns, err := s.db.exec(`SELECT name FROM pragma_index_info(?1) ORDER BY seqno`, row[0])
		if err != nil {
			return err
		}
		for _, c := range columns {
			if c[0] == "" {
				c[0] = "(expression)"
			}
			x.Columns = append(x.Columns, name(c[0]))
		}
		t.Indexes = append(t.Indexes, x)
		if row[2] == "u" && len(t.Keys) < maxKeys {
			t.Keys = append(t.Keys, &posternv1.CatalogKey{Name: x.Name, Kind: "unique", Columns: x.Columns})
		}
	}
	return nil
}

func (s *sqliteSession) foreignKeys(p *pager, t *posternv1.CatalogTable, table string, visible map[string]string) error {
	rows, err := s.db.exec(`SELECT id, "table", "from", "to" FROM pragma_foreign_key_list(?1) ORDER BY id, seq`, table)
	if err != nil {
		return err
	}
	last, target := "", ""
	var key *posternv1.CatalogKey
	var to []string
	flush := func() {
		if key != nil {
			real, known := visible[strings.ToLower(target)]
			p.foreign(key, sqliteSchema, real, to, known)
			t.Keys = append(t.Keys, key)
		}
	}
	for _, row := range rows {
		if key == nil || row[0] != last {
			flush()
			if len(t.Keys) >= maxKeys {
				t.Truncated = true
				return nil
			}
			last, target, to = row[0], row[1], nil
			key = &posternv1.CatalogKey{Kind: "foreign"}
		}
		key.Columns = append(key.Columns, name(row[2]))
		if row[3] != "" {
			to = append(to, name(row[3]))
		}
	}
	flush()
	return nil
}
