package rowfmt

import "io"

// Column is what an Arrow IPC stream says of one of its columns.
type Column struct {
	Name string
	// Type is the type as SQL writes it where the stream says so, else the
	// database's own name of it; empty if the stream names none.
	Type     string
	Nullable bool
}

// Columns reads the schema of an Arrow IPC stream, at most 16 MiB of it.
//
// Errors: ErrNoSchema, ErrGarbled, and those of src.
func Columns(src io.Reader) ([]Column, error) {
	s := newStream(src, DefaultMaxMessage)
	if err := s.readSchema(); err != nil {
		return nil, err
	}
	columns := make([]Column, len(s.columns))
	for i, c := range s.columns {
		columns[i] = Column{Name: c.name, Type: c.pgType, Nullable: c.nullable}
		for _, pair := range c.meta {
			switch pair[0] {
			case "pg.sqltype", "mysql.sqltype", "sqlite.type": // a stream has one of them
				if pair[1] != "" {
					columns[i].Type = pair[1]
				}
			}
		}
	}
	return columns, nil
}
