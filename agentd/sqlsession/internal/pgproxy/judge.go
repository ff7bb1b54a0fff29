package pgproxy

import (
	"container/list"
	"context"
	"encoding/binary"
	"errors"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	pgquery "github.com/pganalyze/pg_query_go/v6"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
	"github.com/postern-dev/postern/proto"
)

const (
	// MaxText is the longest text of statements in bytes: more is not parsed.
	MaxText = 1 << 20
	// judgeTimeout bounds the time that parsing and judging a text may take, with the
	// start of a parser.
	judgeTimeout = 25 * time.Second
	// verdictLife is how long a verdict counts that was made in the light of what
	// names meant: somebody else may replace a function.
	verdictLife = 5 * time.Second
	// maxCached bounds the cache of verdicts by the length of its texts, in bytes.
	maxCached = 1 << 20
	// maxCachedText is the longest text whose verdict is kept, in bytes.
	maxCachedText = 16 << 10
)

// Verdict is the policy's answer to a statement that may be sent.
type Verdict struct {
	// Reads tells that the statement changes nothing.
	Reads bool
	// DescribeOnly is why it may be parsed and described but not run; nil: it may.
	DescribeOnly *Refusal
	// Bracket is why no value of a Bind may be an array, a row or a range; nil: it may.
	Bracket *Refusal
	// Hide masks its result; nil: as Config.Hide says.
	Hide Hider
}

// Judge holds queries against the source's policy.
type Judge interface {
	// Judge decides on the one statement of tree, whose locations are bytes of text
	// (a part of a longer statement, perhaps). It may ask the server.
	Judge(ctx context.Context, server Asker, text string, tree *pgtree.Tree) (Verdict, *Refusal)
}

// Asker asks the server on the client's own connection, in its transaction, for
// what its catalogs say.
type Asker interface {
	// Ask runs one statement with parameters $1... and returns the rows as text, at
	// most 10,000. NULL is "". A Refusal as error means that nothing can be asked in
	// the state that the transaction is in.
	Ask(ctx context.Context, sql string, parameters ...string) ([][]string, error)
}

// judgement is what was decided about a text.
type judgement struct {
	parts   []part
	refusal *Refusal // then nothing of the text is sent
	// rewrite is what is sent instead of the text; "" is the text itself.
	rewrite string
	made    time.Time
	epoch   uint64
}

// view is what there is to know about the session for a verdict.
func (p *Proxy) view() view {
	return view{
		readWrite: p.config.ReadWrite, narrowed: len(p.config.Guard.WriteSchemas)+len(p.config.Guard.WriteStatements) > 0, masked: len(p.config.Guard.Masks) > 0, metadata: p.config.Guard.Mode == "metadata", plans: p.config.Planner != nil,
		pathNamesCatalog: p.pathNamesCatalog, ownPath: p.ownPath,
	}
}

// judge decides on a text. An error that is no refusal ends the session.
func (p *Proxy) judge(text string) *judgement {
	if len(text) > MaxText {
		return &judgement{refusal: refuse(stateLimit, "the text has %d bytes, more than the %d that are understood", len(text), MaxText)}
	}
	if !utf8.ValidString(text) {
		return &judgement{refusal: &Refusal{SQLState: stateEncoding, Message: "the text is not valid UTF-8", Code: proto.CodeInvalid}}
	}
	key := p.cacheKey(text)
	j := p.verdicts.get(key, p.epoch)
	if j == nil && key != text {
		j = p.verdicts.get(text, p.epoch)
	}
	if j != nil {
		if len(j.parts) == 1 && j.parts[0].sql != text {
			same := *j
			same.parts = []part{j.parts[0]}
			same.parts[0].sql = strings.TrimSpace(strings.TrimRight(strings.TrimSpace(text), ";"))
			return &same
		}
		return j
	}
	j = p.look(text)
	j.made, j.epoch = time.Now(), p.epoch
	switch {
	case j.refusal != nil:
	case key == text, len(j.parts) == 1 && j.parts[0].data && j.parts[0].declares == "" && j.rewrite == "":
		p.verdicts.put(key, j)
	default:
		p.verdicts.put(text, j) // of others a number may matter: SET x = 0
	}
	return j
}

func (p *Proxy) look(text string) *judgement {
	ctx, done := context.WithTimeout(context.Background(), judgeTimeout)
	defer done()
	tree, err := p.config.Parser.Parse(ctx, text)
	var complaint *pgtree.SyntaxError
	var complex *pgtree.TooComplexError
	switch {
	case errors.As(err, &complaint):
		return &judgement{refusal: &Refusal{SQLState: stateSyntax, Message: complaint.Message, Position: complaint.Position, Code: proto.CodeSQL}}
	case errors.As(err, &complex):
		return &judgement{refusal: refuse(stateComplex, "the statement is refused: %s", complex.Reason)}
	case err != nil:
		return &judgement{refusal: refuse(stateUnavailable, "the text could not be looked at and is refused: %s", oneLine(err))}
	}
	if lower := strings.ToLower(text); strings.Contains(lower, "set_config") || strings.Contains(lower, "pg_advisory_unlock_all") {
		p.learnPath()
	}
	j := &judgement{}
	original, spared := text, false
	if p.config.Spare != nil && len(tree.GetStmts()) == 1 && tree.Stmts[0].GetStmt().GetSelectStmt() != nil {
		if judged, sent := p.config.Spare(text, tree); judged != "" {
			again, err := p.config.Parser.Parse(ctx, judged)
			if err != nil || len(again.GetStmts()) != 1 || again.Stmts[0].GetStmt().GetSelectStmt() == nil {
				return &judgement{refusal: refuse(stateDenied, "the statement is not understood and is refused")}
			}
			tree, text, j.rewrite, spared = again, judged, sent, true
		}
	}
	v := p.view()
	moved := false                // names may mean something else than now
	prepared := map[string]part{} // by this text
	for _, raw := range tree.GetStmts() {
		sql, offset := slice(text, raw)
		if spared {
			sql = strings.TrimSpace(original)
		}
		if raw.GetStmt() == nil {
			return &judgement{refusal: refuse(stateDenied, "the statement is not understood and is refused")}
		}
		one, inside, refusal := classify(raw.GetStmt(), v)
		one.sql = sql
		if refusal != nil && refusal.Position == 0 && len(tree.Stmts) > 1 {
			refusal.Position = utf8.RuneCountInString(text[:offset]) + 1
		}
		if refusal != nil {
			return &judgement{parts: []part{one}, refusal: refusal}
		}
		if one.explains {
			if len(tree.Stmts) > 1 {
				return &judgement{parts: []part{one}, refusal: refuse(stateUnsupported, "EXPLAIN beside other statements in one message is not supported: send them one by one")}
			}
			rewrite, refusal := p.explain(ctx, text, raw.GetStmt().GetExplainStmt())
			return &judgement{parts: []part{one}, refusal: refusal, rewrite: rewrite}
		}
		if moved && one.data {
			r := refuse(stateUnsupported, "a query behind a change of search_path in one message is refused: send them one after the other")
			r.Position = utf8.RuneCountInString(text[:offset]) + 1
			return &judgement{parts: []part{one}, refusal: r}
		}
		for _, q := range inside {
			verdict, refusal := p.config.Judge.Judge(ctx, p, text, treeOf(q.node, raw))
			if refusal != nil {
				if spared {
					refusal.Position = 0 // of another text than the client's
				}
				return &judgement{parts: []part{one}, refusal: refusal}
			}
			if verdict.Hide != nil && (one.declares != "" || one.executes != "") && verdict.Hide.Masked() != "" {
				what := "a cursor over"
				if one.executes != "" {
					what = "a value for a prepared statement made of"
				}
				return &judgement{parts: []part{one}, refusal: refuse(stateDenied, "the statement is refused: %s the masked column %s", what, verdict.Hide.Masked())}
			}
			one.hide = verdict.Hide
			if one.bracket == nil {
				one.bracket = verdict.Bracket
			}
			one.write = one.write || p.config.ReadWrite && !verdict.Reads
			if one.describeOnly == nil {
				one.describeOnly = verdict.DescribeOnly
			}
		}
		if one.executes != "" {
			if refusal := p.judgeExecute(&one, prepared); refusal != nil {
				return &judgement{parts: []part{one}, refusal: refusal}
			}
		}
		if one.prepares != "" {
			prepared[one.prepares] = one
		}
		moved = moved || one.path
		j.parts = append(j.parts, one)
	}
	if len(tree.GetStmts()) == 1 && !p.config.ReadWrite {
		if t := tree.Stmts[0].GetStmt().GetTransactionStmt(); t.GetKind() == pgquery.TransactionStmtKind_TRANS_STMT_BEGIN || t.GetKind() == pgquery.TransactionStmtKind_TRANS_STMT_START {
			modes, _ := transactionModes(t.GetOptions(), v)
			j.rewrite = "BEGIN READ ONLY" + modes
			if t.GetKind() == pgquery.TransactionStmtKind_TRANS_STMT_START {
				j.rewrite = "START TRANSACTION READ ONLY" + modes // the command tags differ
			}
		}
	}
	return j
}

// fresh tells whether a verdict still counts.
func (j *judgement) fresh(epoch uint64) bool {
	return j.epoch == epoch && time.Since(j.made) <= verdictLife
}

// judgeExecute looks at what an EXECUTE of SQL runs: a statement of this text, or
// one that the session has.
func (p *Proxy) judgeExecute(one *part, here map[string]part) *Refusal {
	if made, ok := here[one.executes]; ok {
		one.write = one.write || made.write
		one.describeOnly, one.hide = made.describeOnly, made.hide
		return nil
	}
	known := p.statements[one.executes]
	if known == nil {
		return &Refusal{SQLState: stateNoStatement, Message: "prepared statement \"" + clip(one.executes, 64) + "\" does not exist", Code: proto.CodeSQL}
	}
	again := p.judge(known.text)
	if again.refusal != nil {
		return &Refusal{SQLState: again.refusal.SQLState, Message: again.refusal.Message, Code: again.refusal.Code}
	}
	for _, made := range again.parts {
		one.write = one.write || made.write
		one.hide = made.hide
		if one.describeOnly == nil {
			one.describeOnly = made.describeOnly
		}
	}
	return nil
}

// firstOwnType is the first OID of what did not come with the server.
const firstOwnType = 16384

// judgeTypes holds the types against the policy that a Parse gives parameters: their
// values are read by what belongs to the type, a domain's check, as if the statement
// had named it.
func (p *Proxy) judgeTypes(types []byte, one *part) (*Refusal, error) {
	var ids []string
	for ; len(types) >= 4; types = types[4:] {
		if oid := binary.BigEndian.Uint32(types); oid >= firstOwnType {
			ids = append(ids, strconv.FormatUint(uint64(oid), 10))
		}
	}
	if len(ids) == 0 {
		return nil, nil
	}
	if len(ids) > maxOwnTypes {
		return refuse(stateComplex, "the statement is refused: it has more than %d parameters of types of the database's own", maxOwnTypes), nil
	}
	ctx, done := context.WithTimeout(context.Background(), judgeTimeout)
	defer done()
	rows, err := p.Ask(ctx, "SELECT n.nspname, t.typname FROM pg_catalog.pg_type t JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) t.typnamespace"+
		" WHERE t.oid OPERATOR(pg_catalog.=) ANY ($1::pg_catalog.oid[])", "{"+strings.Join(ids, ",")+"}")
	if refusal, ok := asRefusal(err); ok {
		return refusal, p.lastError()
	} else if err != nil {
		return nil, err
	}
	var casts []*pgquery.Node
	for i, row := range rows {
		if len(row) != 2 {
			return nil, errServer
		}
		casts = append(casts, &pgquery.Node{Node: &pgquery.Node_TypeCast{TypeCast: &pgquery.TypeCast{
			Arg:      &pgquery.Node{Node: &pgquery.Node_ParamRef{ParamRef: &pgquery.ParamRef{Number: int32(i + 1)}}},
			TypeName: &pgquery.TypeName{Names: []*pgquery.Node{pgquery.MakeStrNode(row[0]), pgquery.MakeStrNode(row[1])}, Typemod: -1},
		}}})
	}
	if len(casts) == 0 {
		return nil, nil // the server says that there are none
	}
	verdict, refusal := p.config.Judge.Judge(ctx, p, "", treeOf(selectOf(casts), &pgquery.RawStmt{}))
	if err := p.lastError(); err != nil {
		return nil, err
	}
	if refusal != nil {
		refusal.Position = 0
		return refusal, nil
	}
	if one.describeOnly == nil {
		one.describeOnly = verdict.DescribeOnly
	}
	if one.bracket == nil {
		one.bracket = verdict.Bracket
	}
	return nil, nil
}

// maxOwnTypes bounds the parameters of a statement whose types are the database's own.
const maxOwnTypes = 1000

func asRefusal(err error) (*Refusal, bool) {
	var refusal *Refusal
	ok := errors.As(err, &refusal)
	return refusal, ok
}

// slice is a statement's own text and where it begins.
func slice(text string, raw *pgquery.RawStmt) (string, int) {
	from := min(max(int(raw.GetStmtLocation()), 0), len(text))
	to := len(text)
	if n := int(raw.GetStmtLen()); n > 0 {
		to = min(from+n, len(text))
	}
	own := strings.TrimLeft(text[from:to], " \t\r\n\f\v")
	return strings.TrimRight(own, " \t\r\n\f\v;"), to - len(own)
}

// oneLine folds an error's text.
func oneLine(err error) string { return clip(strings.Join(strings.Fields(err.Error()), " "), 1<<10) }

// cache keeps verdicts of texts that were allowed, the least recently made go first.
type cache struct {
	entries map[string]*list.Element
	order   list.List
	bytes   int
}

type cached struct {
	key string
	j   *judgement
}

func (c *cache) get(key string, epoch uint64) *judgement {
	e := c.entries[key]
	if e == nil {
		return nil
	}
	j := e.Value.(cached).j
	if !j.fresh(epoch) {
		c.remove(e)
		return nil
	}
	return j
}

func (c *cache) put(key string, j *judgement) {
	if len(key) > maxCachedText {
		return
	}
	for _, one := range j.parts {
		if one.explains || one.executes != "" || one.prepares != "" || one.path || one.forgets != "" {
			return // what it means changes with the session
		}
	}
	if c.entries == nil {
		c.entries = make(map[string]*list.Element)
	}
	if e := c.entries[key]; e != nil {
		c.remove(e)
	}
	c.entries[key] = c.order.PushBack(cached{key, j})
	c.bytes += len(key) + 256
	for c.bytes > maxCached {
		c.remove(c.order.Front())
	}
}

func (c *cache) remove(e *list.Element) {
	key := c.order.Remove(e).(cached).key
	c.bytes -= len(key) + 256
	delete(c.entries, key)
}

// cacheKey is a text with its whole numbers taken out where they can't matter to a
// verdict: programs that paste values into texts send a new one each time. What
// it does not understand it leaves as it is.
func (p *Proxy) cacheKey(text string) string {
	if len(text) > 1<<10 || len(p.config.Guard.Masks) > 0 {
		return text
	}
	b := p.keyBuffer[:0]
	changed := false
	for i := 0; i < len(text); {
		c := text[i]
		switch {
		case c == '\\' || c == '$' || c == '-' && i+1 < len(text) && text[i+1] == '-' || c == '/' && i+1 < len(text) && text[i+1] == '*':
			return text
		case c == '\'' || c == '"':
			end := strings.IndexByte(text[i+1:], c)
			if end < 0 {
				return text
			}
			literal := text[i : i+end+2]
			if strings.IndexByte(literal, '\\') >= 0 {
				return text
			}
			b = append(b, literal...)
			i += len(literal)
		case c == ';':
			if strings.TrimSpace(text[i+1:]) != "" {
				return text // several statements
			}
			i = len(text)
		case c >= '0' && c <= '9':
			end := i
			for end < len(text) && text[end] >= '0' && text[end] <= '9' {
				end++
			}
			if end-i > 9 || i > 0 && wordByte(text[i-1]) || end < len(text) && wordByte(text[end]) {
				return text
			}
			b = append(b, 0)
			changed = true
			i = end
		case wordByte(c):
			end := i
			for end < len(text) && wordByte(text[end]) {
				end++
			}
			if strings.EqualFold(text[i:end], "by") { // ORDER BY 1
				return text
			}
			b = append(b, text[i:end]...)
			i = end
		default:
			b = append(b, c)
			i++
		}
	}
	p.keyBuffer = b
	if !changed {
		return text
	}
	return string(b)
}

// wordByte tells whether a byte can be part of a name or of a number that is not
// whole.
func wordByte(c byte) bool {
	return c == '_' || c == '.' || c >= 0x80 || c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
}
