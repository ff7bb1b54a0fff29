package main

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/client"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/sqlsplit"
)

const (
	// maxNames is how many tables, types and sequences are completed, and maxColumnTables of how many the
	// columns are known at once.
	maxNames        = 10_000
	maxColumnTables = 200
	// namesAge is how old names may be before they are asked for again.
	namesAge = 5 * time.Minute
	// maxOffered bounds what a press of the tab key shows.
	maxOffered = 200
)

// names completes what a data source holds, from the control plane's cache, lazily:
// the first press of the tab key asks, and waits for completionTime at most.
type names struct {
	client        *client.Client
	agent, source string
	ctx           context.Context
	cancel        context.CancelFunc
	wg            sync.WaitGroup

	mu      sync.Mutex
	asked   time.Time
	loaded  chan struct{} // closed when what was asked for is there
	schemas []string
	tables  [][2]string // schema, name
	others  [][2]string // types and sequences: schema, name
	columns map[string][]string
}

func newNames(c *client.Client, agent, source string) *names {
	n := &names{client: c, agent: agent, source: source, columns: make(map[string][]string)}
	n.ctx, n.cancel = context.WithCancel(context.Background())
	return n
}

func (n *names) close() {
	n.cancel()
	n.wg.Wait()
}

// load asks for the names if they are old.
func (n *names) load() {
	n.mu.Lock()
	if n.loaded == nil || time.Since(n.asked) > namesAge {
		n.asked, n.loaded = time.Now(), make(chan struct{})
		clear(n.columns)
		loaded := n.loaded
		n.wg.Go(func() {
			defer close(loaded)
			n.ask()
		})
	}
	loaded := n.loaded
	n.mu.Unlock()
	select {
	case <-loaded:
	case <-time.After(completionTime):
	}
}

func (n *names) ask() {
	r := &posternv1.IntrospectSourceRequest{Agent: n.agent, Source: n.source, NamesOnly: true, PageSize: 1000}
	var schemas []string
	var tables, others [][2]string
	for {
		resp, err := n.client.Sources.Introspect(n.ctx, connect.NewRequest(r))
		if err != nil {
			break // what goes wrong gives no names
		}
		for _, s := range resp.Msg.Schemas {
			schemas = append(schemas, s.Name)
		}
		for _, t := range resp.Msg.Tables {
			tables = append(tables, [2]string{t.Schema, t.Name})
		}
		for _, t := range resp.Msg.Types {
			others = append(others, [2]string{t.Schema, t.Name})
		}
		for _, q := range resp.Msg.Sequences {
			others = append(others, [2]string{q.Schema, q.Name})
		}
		if r.PageToken = resp.Msg.NextPageToken; r.PageToken == "" || len(tables)+len(others) >= maxNames {
			break
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.schemas, n.tables, n.others = schemas, tables, others
}

// columnsOf are the columns of the tables of this name.
func (n *names) columnsOf(table string) []string {
	n.mu.Lock()
	known, ok := n.columns[table]
	full := len(n.columns) >= maxColumnTables
	n.mu.Unlock()
	if ok || full {
		return known
	}
	ctx, cancel := context.WithTimeout(n.ctx, completionTime)
	defer cancel()
	resp, err := n.client.Sources.Introspect(ctx, connect.NewRequest(&posternv1.IntrospectSourceRequest{Agent: n.agent, Source: n.source, Table: table, PageSize: 20}))
	if err != nil {
		return nil
	}
	var columns []string
	for _, t := range resp.Msg.Tables {
		if t.Name == table {
			for _, c := range t.Columns {
				columns = append(columns, c.Name)
			}
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.columns[table] = columns
	return columns
}

// complete is the editor's: pos counts characters.
func (s *shell) complete(line string, pos int) (head string, offers []string, tail string) {
	runes := []rune(line)
	before, tail := string(runes[:pos]), string(runes[pos:])
	start := strings.LastIndexFunc(before, func(r rune) bool { return !wordRune(r) && r != '.' && r != '\\' && r != '"' && r != '`' }) + 1
	for start < len(before) && before[start]&0xc0 == 0x80 {
		start++
	}
	head, word := before[:start], before[start:]
	var candidates []string
	switch {
	case strings.HasPrefix(word, `\`):
		candidates = []string{`\?`, `\d`, `\dt`, `\explain`, `\format`, `\i`, `\o`, `\pager`, `\q`, `\r`, `\set`, `\timing`, `\unset`, `\x`}
	case strings.HasPrefix(strings.TrimSpace(head), `\format`):
		candidates = []string{"table", "csv", "json", "ndjson"}
	default:
		candidates = s.words(s.lines.Text()+before, word)
	}
	for _, c := range candidates {
		if len(offers) == maxOffered {
			break
		}
		if len(c) >= len(word) && strings.EqualFold(c[:len(word)], word) && !slices.Contains(offers, c) {
			offers = append(offers, c)
		}
	}
	return head, offers, tail
}

func wordRune(r rune) bool {
	return r == '_' || r == '$' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r >= 0x80
}

// words are what may stand at the end of a statement that begins with text.
func (s *shell) words(text, word string) []string {
	s.names.load()
	s.names.mu.Lock()
	schemas, tables, others := s.names.schemas, s.names.tables, s.names.others
	s.names.mu.Unlock()
	engine := s.lines.Engine()
	mentioned := make(map[string]bool)
	for _, w := range strings.FieldsFunc(strings.ToLower(text), func(r rune) bool { return !wordRune(r) }) {
		mentioned[w] = true
	}
	var out []string
	if qualifier, _, ok := strings.Cut(word, "."); ok {
		for _, t := range tables {
			if strings.EqualFold(t[0], qualifier) {
				out = append(out, quoteName(engine, t[0])+"."+quoteName(engine, t[1]))
			}
			if strings.EqualFold(t[1], qualifier) {
				for _, c := range s.names.columnsOf(t[1]) {
					out = append(out, qualifier+"."+quoteName(engine, c))
				}
			}
		}
		for _, t := range others {
			if strings.EqualFold(t[0], qualifier) {
				out = append(out, quoteName(engine, t[0])+"."+quoteName(engine, t[1]))
			}
		}
		return out
	}
	for _, t := range tables {
		if mentioned[strings.ToLower(t[1])] {
			for _, c := range s.names.columnsOf(t[1]) {
				out = append(out, quoteName(engine, c))
			}
		}
	}
	for _, t := range tables {
		out = append(out, quoteName(engine, t[1]))
	}
	for _, t := range others {
		out = append(out, quoteName(engine, t[1]))
	}
	for _, name := range schemas {
		out = append(out, quoteName(engine, name)+".")
	}
	for _, k := range keywords {
		if word != "" && word == strings.ToUpper(word) {
			k = strings.ToUpper(k)
		}
		out = append(out, k)
	}
	return out
}

// quoteName writes a name as a statement must have it: MySQL takes double quotes for
// those of a text. What could drive the terminal is not offered as it is.
func quoteName(engine sqlsplit.Engine, name string) string {
	plain := name != "" && (name[0] < '0' || name[0] > '9')
	for _, r := range name {
		plain = plain && (r == '_' || r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r >= 'A' && r <= 'Z' && engine != sqlsplit.Postgres)
	}
	if plain && !slices.Contains(keywords, strings.ToLower(name)) {
		return name
	}
	q := `"`
	if engine == sqlsplit.MySQL {
		q = "`"
	}
	return safe(q + strings.ReplaceAll(name, q, q+q) + q)
}

var keywords = strings.Fields(`all alter analyze and any array as asc begin between by case cast close coalesce commit copy create cross current_date
	current_timestamp cursor deallocate declare default delete desc discard distinct drop else end except execute exists explain extract false
	fetch filter for from full group having if ilike in index inner insert intersect interval into is join lateral left like limit materialized
	natural not null nulls offset on only or order outer over partition prepare primary references release reset returning right rollback row
	rows savepoint select set show similar start table temporary then time timestamp to transaction true truncate union unique update using
	values view when where window with`)
