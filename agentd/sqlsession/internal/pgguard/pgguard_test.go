package pgguard

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	pgquery "github.com/pganalyze/pg_query_go/v6"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/frame"
	"github.com/postern-dev/postern/agentd/sqlsession/internal/pgtree"
)

// fakeCatalog knows a few functions; everything else is unknown.
type fakeCatalog struct {
	asked []Question
	err   error
}

func (f *fakeCatalog) Resolve(_ context.Context, q Question) (*Catalog, error) {
	f.asked = append(f.asked, q)
	if f.err != nil {
		return nil, f.err
	}
	c := &Catalog{Functions: make(map[Name][]Proc), Relations: make(map[Name]RelationFacts), CurrentSchema: "public"}
	for _, n := range q.Functions {
		switch {
		case n.Name == "lower":
			c.Functions[n] = []Proc{{OID: 870, Schema: "pg_catalog", Name: "lower", Volatility: 'i', Kind: 'f'}}
		case n.Name == "nextval":
			c.Functions[n] = []Proc{{OID: 1574, Schema: "pg_catalog", Name: "nextval", Volatility: 'v', Kind: 'f'}}
		case n.Name == "random":
			c.Functions[n] = []Proc{{OID: 1598, Schema: "pg_catalog", Name: "random", Volatility: 'v', Kind: 'f'}}
		case n.Name == "future_function":
			c.Functions[n] = []Proc{{OID: 9999, Schema: "pg_catalog", Name: "future_function", Volatility: 'v', Kind: 'f'}}
		case strings.HasPrefix(n.Name, "own"):
			c.Functions[n] = []Proc{{OID: 20000, Schema: "app", Name: n.Name, Volatility: 'i', Kind: 'f', One: true, Row: strings.HasSuffix(n.Name, "row")}}
		case strings.HasPrefix(n.Name, "json_"):
			c.Functions[n] = []Proc{{OID: 20001, Schema: "public", Name: n.Name, Volatility: 'i', Kind: 'f'}}
		}
	}
	for _, n := range q.Relations {
		if n.Name == "v" {
			c.Hidden = append(c.Hidden, Hidden{Proc: Proc{OID: 20000, Schema: "app", Name: "own", Volatility: 's'}, Via: "the view v", From: n})
		}
	}
	return c, nil
}

func check(t testing.TB, text string, guard frame.Guard, version int, session bool) (Verdict, *Refusal) {
	t.Helper()
	tree, err := pgtree.InProcess().Parse(context.Background(), text)
	if err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return Check(context.Background(), Input{Tree: tree, Text: text, Guard: &guard, Version: version, Session: session, Resolver: &fakeCatalog{}})
}

func TestCheck(t *testing.T) {
	readOnly := frame.Guard{Mode: ModeReadOnly}
	for _, c := range []struct {
		text    string
		guard   frame.Guard
		version int
		says    string // "": allowed
		at      int
	}{
		{"SELECT lower('a'), random()", readOnly, 15, "", 0},
		{"SELECT 'é', nextval('s')", readOnly, 15, "nextval", 13},
		{"SELECT future_function()", readOnly, 15, "not known to change nothing", 8},
		{"SELECT own(1)", readOnly, 15, "app.own", 8},
		{"SELECT own(1)", frame.Guard{Mode: ModeReadOnly, Functions: []string{"app.*"}}, 15, "", 0},
		{"SELECT own(1)", frame.Guard{Mode: ModeReadOnly, Functions: []string{"public.*"}}, 15, "app.own", 8},
		{"SELECT own(1)", frame.Guard{Mode: ModeReadOnly, Functions: []string{"ow?"}}, 15, "", 0},
		{"SELECT nextval('s')", frame.Guard{Mode: ModeReadOnly, Functions: []string{"*", "pg_catalog.*"}}, 15, "nextval", 8},
		{"SELECT nextval('s')", frame.Guard{Mode: ModeReadOnly, Functions: []string{"nextval"}}, 15, "", 0},
		{"SELECT x.own FROM x", readOnly, 15, "", 0},
		{"SELECT x.ownrow FROM x", readOnly, 15, "ownrow", 8},
		{"SELECT (x).ownrow FROM x", readOnly, 15, "ownrow", 0},
		{"SELECT (1).own", readOnly, 15, "app.own", 0},
		{"SELECT x.own FROM lower('a') x", readOnly, 15, "app.own", 8},
		{"SELECT * FROM v", readOnly, 15, "the view v", 15},
		{"SELECT * FROM w", readOnly, 15, "", 0},
		{"SELECT JSON_EXISTS('{}', '$')", readOnly, 15, "json_exists", 8},
		{"SELECT JSON_EXISTS('{}', '$')", readOnly, 17, "", 0},
		{"SELECT JSON_OBJECT('a': 1)", readOnly, 15, "json_object", 8},
		{"SELECT JSON_ARRAY(1)", readOnly, 15, "json_array", 8},
		{"SELECT * FROM JSON_TABLE('{}', '$' COLUMNS (a int PATH '$')) j", readOnly, 16, "json_table", 15},
		{"SELECT 1 FROM w FOR UPDATE", readOnly, 15, "FOR UPDATE", 0},
		{"VALUES (1) ORDER BY (SELECT 1 FROM w FOR KEY SHARE)", readOnly, 15, "FOR UPDATE", 0},
		{"/* é */ -- x\n VACUUM", readOnly, 15, "read-only", 15},
		{"SELECT 1; SELECT 2", readOnly, 15, "more than one", 0},
		{"SHOW primary_conninfo", readOnly, 15, "password", 1},
		{"SHOW ALL", readOnly, 15, "password", 1},
		{"SELECT * FROM pg_file_settings", readOnly, 15, "files", 15},
		{"INSERT INTO w VALUES (1)", frame.Guard{Mode: ModeReadWrite, WriteSchemas: []string{"pub*"}}, 15, "", 0},
		{"INSERT INTO w VALUES (1)", frame.Guard{Mode: ModeReadWrite, WriteSchemas: []string{"app"}}, 15, "schema public", 13},
	} {
		verdict, refusal := check(t, c.text, c.guard, c.version, false)
		switch {
		case c.says == "" && refusal != nil:
			t.Errorf("%s: refused: %s", c.text, refusal.Reason)
		case c.says == "" && len(verdict.Statements) != 1:
			t.Errorf("%s: got %d statements", c.text, len(verdict.Statements))
		case c.says != "" && (refusal == nil || !strings.Contains(refusal.Reason, c.says)):
			t.Errorf("%s: got %+v, want it refused and to say %q", c.text, refusal, c.says)
		case c.at != 0 && refusal.Position != c.at:
			t.Errorf("%s: got position %d, want %d (%s)", c.text, refusal.Position, c.at, refusal.Reason)
		}
	}
}

// TestSession: what a session may say besides, and what it may not.
func TestSession(t *testing.T) {
	for text, allowed := range map[string]bool{
		"BEGIN": true, "START TRANSACTION READ ONLY": true, "BEGIN ISOLATION LEVEL SERIALIZABLE": true, "COMMIT": true, "SAVEPOINT a": true, "ROLLBACK TO a": true,
		"SELECT 1; SELECT 2": true, "PREPARE a AS SELECT 1": true, "DECLARE c CURSOR FOR SELECT 1": true, "FETCH 1 FROM c": true, "EXECUTE a(1)": true, "SHOW search_path": true,
		"LOCK TABLE w IN ACCESS SHARE MODE": true, "SET DateStyle = ISO": true,
		"BEGIN READ WRITE": false, "SET TRANSACTION READ WRITE": false, "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE": false, "PREPARE TRANSACTION 'x'": false,
		"COMMIT PREPARED 'x'": false, "PREPARE a AS DELETE FROM w": false, "DECLARE c CURSOR FOR SELECT nextval('s')": false, "EXECUTE a(nextval('s'))": false, "LOCK TABLE w": false, "LISTEN x": false,
		"SELECT 1; DELETE FROM w": false,
	} {
		if _, refusal := check(t, text, frame.Guard{Mode: ModeReadOnly}, 15, true); (refusal == nil) != allowed {
			t.Errorf("%s: got %+v, want allowed: %v", text, refusal, allowed)
		}
	}
}

// TestNothingIsAskedForNothing: a text that names nothing costs no round trip, and
// a catalog that can't be asked lets nothing through.
func TestNothingIsAskedForNothing(t *testing.T) {
	run := func(text string, catalog *fakeCatalog) *Refusal {
		tree, err := pgtree.InProcess().Parse(context.Background(), text)
		if err != nil {
			t.Fatal(err)
		}
		_, refusal := Check(context.Background(), Input{Tree: tree, Text: text, Guard: &frame.Guard{Mode: ModeReadOnly}, Version: 15, Resolver: catalog})
		return refusal
	}
	broken := &fakeCatalog{err: errors.New("broken")}
	if refusal := run("SELECT 1, 'a', $1::int", broken); refusal != nil || len(broken.asked) != 0 {
		t.Errorf("got %+v, asked %v", refusal, broken.asked)
	}
	if refusal := run("SELECT lower('a')", broken); refusal == nil || !errors.Is(refusal.Err, broken.err) {
		t.Errorf("got %+v, want the resolver's error", refusal)
	}
}

// TestEveryNode puts every kind of node that the grammar has, with all its fields
// set, where a read-only statement may have an expression: nothing panics, and
// those that are not known are refused.
func TestEveryNode(t *testing.T) {
	messages := (&pgquery.Node{}).ProtoReflect().Descriptor().Oneofs().Get(0).Fields()
	known := 0
	for i := range messages.Len() {
		field := messages.Get(i)
		node := &pgquery.Node{}
		value := node.ProtoReflect().Mutable(field).Message()
		fill(value, 2)
		select1 := &pgquery.SelectStmt{TargetList: []*pgquery.Node{{Node: &pgquery.Node_ResTarget{ResTarget: &pgquery.ResTarget{Val: node}}}}}
		for mode, in := range map[string]*pgquery.Node{"inside": {Node: &pgquery.Node_SelectStmt{SelectStmt: select1}}, "alone": node} {
			for _, guard := range []frame.Guard{{Mode: ModeReadOnly}, {Mode: ModeReadWrite, WriteSchemas: []string{"x"}, WriteStatements: []string{"insert"}}, {Mode: ModeReadWrite}} {
				_, refusal := Check(context.Background(), Input{
					Tree: &pgtree.Tree{Stmts: []*pgquery.RawStmt{{Stmt: in}}}, Text: "x", Guard: &guard, Version: 17, Resolver: &fakeCatalog{},
				})
				name := string(field.Message().Name())
				if refusal != nil && refusal.Reason == "it is not understood" && refusal.Position == 0 {
					t.Errorf("%s: %s: it panicked", name, mode)
				}
				if mode == "inside" && refusal == nil {
					known++
					if guard.Mode == ModeReadOnly && !queryNodes[name] {
						t.Errorf("%s is allowed, and not known", name)
					}
				}
			}
		}
	}
	if known == 0 {
		t.Error("nothing is allowed at all")
	}
}

func fill(m protoreflect.Message, depth int) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		switch {
		case f.ContainingOneof() != nil && i > 0:
		case f.Message() != nil && depth == 0:
		case f.IsList() && f.Message() != nil:
			fill(m.Mutable(f).List().AppendMutable().Message(), depth-1)
		case f.IsList():
		case f.Message() != nil:
			fill(m.Mutable(f).Message(), depth-1)
		case f.Kind() == protoreflect.StringKind:
			m.Set(f, protoreflect.ValueOfString("x"))
		case f.Kind() == protoreflect.BoolKind:
			m.Set(f, protoreflect.ValueOfBool(true))
		case f.Kind() == protoreflect.EnumKind:
			m.Set(f, protoreflect.ValueOfEnum(1))
		}
	}
}

// FuzzCheck feeds trees that no grammar makes.
func FuzzCheck(f *testing.F) {
	for _, text := range []string{"SELECT a.b, c(1) FROM d", "INSERT INTO a VALUES (1) ON CONFLICT DO NOTHING", "DROP TABLE a.b", "SET a = 1", "MERGE INTO a USING b ON true WHEN MATCHED THEN DELETE"} {
		tree, err := pgtree.InProcess().Parse(context.Background(), text)
		if err != nil {
			f.Fatal(err)
		}
		raw, err := proto.Marshal(tree)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw, text)
	}
	f.Fuzz(func(t *testing.T, raw []byte, text string) {
		tree := new(pgtree.Tree)
		if proto.Unmarshal(raw, tree) != nil {
			return
		}
		for _, guard := range []frame.Guard{{Mode: ModeReadOnly}, {Mode: ModeReadWrite, WriteSchemas: []string{"x"}}} {
			verdict, refusal := Check(context.Background(), Input{Tree: tree, Text: text, Guard: &guard, Version: 15, Session: true, Resolver: &fakeCatalog{}})
			if refusal == nil && guard.Mode == ModeReadOnly && slices.ContainsFunc(verdict.Statements, func(s Statement) bool { return s.Writes }) {
				t.Errorf("a read-only source would write: %v", tree)
			}
		}
	})
}
