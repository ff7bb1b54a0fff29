package mysqlguard

import (
	"fmt"
	"strings"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/sqltext"
)

// ShowKind is what a Show asks for.
type ShowKind uint8

// The kinds.
const (
	ShowDatabases ShowKind = iota
	ShowTables
	ShowTableStatus
	ShowColumns // also DESCRIBE
	ShowIndex
	ShowCreate // of a table or view
	ShowServer // variables, character sets, collations: nothing of a database
)

// Show is a question that has words of its own: SHOW and DESCRIBE.
type Show struct {
	Kind ShowKind
	// Schema and Table are what it is about; empty: the connection's database, and none.
	Schema, Table string
	// Text is the question as the server gets it: our words, with names in backticks
	// and the text after LIKE as it was.
	Text string
}

// Names are those that have to be looked up as views.
func (s *Show) Names() []string {
	if s.Table == "" {
		return nil
	}
	return []string{s.Table}
}

const allowedShows = "allowed are SHOW DATABASES, [FULL] TABLES, TABLE STATUS, [FULL] COLUMNS, INDEX, CREATE TABLE, CREATE VIEW, VARIABLES, CHARACTER SET and COLLATION, with FROM and LIKE, and DESCRIBE"

// IsShow tells whether a text begins with SHOW, DESCRIBE or DESC.
func IsShow(text string) bool {
	switch strings.ToLower(sqltext.FirstWord(sqltext.MySQL, text)) {
	case "show", "describe", "desc":
		return true
	}
	return false
}

// ParseShow reads a text that begins with SHOW, DESCRIBE or DESC. What it does not know
// word by word it refuses.
func ParseShow(text string) (*Show, *Refusal) {
	tokens, refusal := scan(text)
	if refusal != nil {
		return nil, refusal
	}
	p := &showParser{tokens: withoutEnd(tokens)}
	if len(p.tokens) == 0 {
		return nil, &Refusal{"the statement is empty", 0}
	}
	s, ok := p.parse()
	if !ok || p.at != len(p.tokens) {
		at := p.tokens[min(p.at, len(p.tokens)-1)]
		return nil, &Refusal{fmt.Sprintf("the statement is refused from %s on: %s", shown(at), allowedShows), at.Position}
	}
	return s, nil
}

type showParser struct {
	tokens []sqltext.Piece
	at     int
}

// word passes one of some words without quotes.
func (p *showParser) word(words ...string) string {
	if p.at < len(p.tokens) && p.tokens[p.at].Kind == sqltext.KindWord {
		for _, w := range words {
			if strings.EqualFold(p.tokens[p.at].Text, w) {
				p.at++
				return w
			}
		}
	}
	return ""
}

// notNames are words that may follow where a name is left out.
var notNames = set("from in like where limit for")

// name passes a name.
func (p *showParser) name() string {
	if p.at < len(p.tokens) {
		t := p.tokens[p.at]
		if t.Kind == sqltext.KindIdentifier || t.Kind == sqltext.KindWord && !notNames[strings.ToLower(t.Text)] {
			p.at++
			return t.Text
		}
	}
	return ""
}

func (p *showParser) symbol(text string) bool {
	if p.at < len(p.tokens) && p.tokens[p.at].Kind == sqltext.KindSymbol && p.tokens[p.at].Text == text {
		p.at++
		return true
	}
	return false
}

// table passes NAME or SCHEMA.NAME.
func (p *showParser) table(s *Show) bool {
	if s.Table = p.name(); s.Table == "" {
		return false
	}
	if p.symbol(".") {
		s.Schema = s.Table
		s.Table = p.name()
	}
	return s.Table != ""
}

// from passes FROM SCHEMA, if it is there.
func (p *showParser) from(s *Show) bool {
	if p.word("from", "in") == "" {
		return true
	}
	s.Schema = p.name()
	return s.Schema != ""
}

// like passes LIKE 'pattern', if it is there; the text of it is what it returns.
func (p *showParser) like() (string, bool) {
	if p.word("like") == "" {
		return "", true
	}
	if p.at == len(p.tokens) || p.tokens[p.at].Kind != sqltext.KindLiteral {
		return "", false
	}
	p.at++
	return " LIKE " + p.tokens[p.at-1].Text, true
}

func ident(name string) string { return "`" + strings.ReplaceAll(name, "`", "``") + "`" }

func (s *Show) place() string {
	if s.Schema == "" {
		return ident(s.Table)
	}
	return ident(s.Schema) + "." + ident(s.Table)
}

func (s *Show) in() string {
	if s.Schema == "" {
		return ""
	}
	return " FROM " + ident(s.Schema)
}

func (p *showParser) parse() (*Show, bool) {
	s := &Show{}
	if p.word("describe", "desc") != "" {
		s.Kind = ShowColumns
		if !p.table(s) {
			return nil, false
		}
		s.Text = "SHOW COLUMNS FROM " + s.place()
		// A column's name is a pattern here, too.
		if p.at < len(p.tokens) {
			switch t := p.tokens[p.at]; t.Kind {
			case sqltext.KindLiteral:
				s.Text += " LIKE " + t.Text
			case sqltext.KindWord, sqltext.KindIdentifier:
				s.Text += " LIKE '" + strings.NewReplacer(`\`, `\\`, "'", "''").Replace(t.Text) + "'"
			default:
				return nil, false
			}
			p.at++
		}
		return s, true
	}
	if p.word("show") == "" {
		return nil, false
	}
	full := ""
	if p.word("full") != "" {
		full = "FULL "
	}
	what := p.word("databases", "schemas", "tables", "table", "columns", "fields", "index", "indexes", "keys", "create", "session", "global", "variables", "character", "charset", "collation")
	if full != "" && what != "tables" && what != "columns" && what != "fields" {
		return nil, false
	}
	switch what {
	case "databases", "schemas":
		s.Kind, s.Text = ShowDatabases, "SHOW DATABASES"
	case "tables":
		s.Kind = ShowTables
		if !p.from(s) {
			return nil, false
		}
		s.Text = "SHOW " + full + "TABLES" + s.in()
	case "table":
		s.Kind = ShowTableStatus
		if p.word("status") == "" || !p.from(s) {
			return nil, false
		}
		s.Text = "SHOW TABLE STATUS" + s.in()
	case "columns", "fields", "index", "indexes", "keys":
		if p.word("from", "in") == "" || !p.table(s) || !p.from(s) {
			return nil, false
		}
		if what != "columns" && what != "fields" {
			s.Kind, s.Text = ShowIndex, "SHOW INDEX FROM "+s.place()
			return s, true
		}
		s.Kind, s.Text = ShowColumns, "SHOW "+full+"COLUMNS FROM "+s.place()
	case "create":
		of := p.word("table", "view")
		if of == "" || !p.table(s) {
			return nil, false
		}
		s.Kind, s.Text = ShowCreate, "SHOW CREATE "+strings.ToUpper(of)+" "+s.place()
		return s, true
	case "session", "global", "variables":
		scope := ""
		if what != "variables" {
			scope = strings.ToUpper(what) + " "
			if p.word("variables") == "" {
				return nil, false
			}
		}
		s.Kind, s.Text = ShowServer, "SHOW "+scope+"VARIABLES"
	case "character", "charset":
		if what == "character" && p.word("set") == "" {
			return nil, false
		}
		s.Kind, s.Text = ShowServer, "SHOW CHARACTER SET"
	case "collation":
		s.Kind, s.Text = ShowServer, "SHOW COLLATION"
	default:
		return nil, false
	}
	like, ok := p.like()
	s.Text += like
	return s, ok
}
