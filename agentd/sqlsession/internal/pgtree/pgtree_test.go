package pgtree

import (
	"context"
	"errors"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	tree, err := InProcess().Parse(context.Background(), "SELECT a FROM b; TABLE c")
	if err != nil || len(tree.Stmts) != 2 || tree.Stmts[0].Stmt.GetSelectStmt() == nil {
		t.Fatalf("got %v, %v", tree, err)
	}
	_, err = InProcess().Parse(context.Background(), "SELECT é FROM FROM b")
	var complaint *SyntaxError
	if !errors.As(err, &complaint) || complaint.Position != 15 {
		t.Fatalf("got %#v", err)
	}
}

func TestMeasure(t *testing.T) {
	many := func(n int, text string) string { return strings.Repeat(text, n) }
	for name, c := range map[string]struct {
		text string
		want Lane // 0: too complex
	}{
		"small":              {"SELECT 1", Small},
		"many words":         {"SELECT 1" + many(1500, ", 1"), Large},
		"long":               {"SELECT '" + many(1<<15, "x") + "'", Large},
		"long list":          {"SELECT a IN (1" + many(100_000, ",1") + ")", Large},
		"many OR":            {"SELECT a = 1" + many(10_000, " OR a = 1"), Large},
		"many CASE":          {"SELECT 1" + many(2000, ", CASE WHEN a = 1 THEN 2 ELSE 3 END"), Large},
		"names":              {"SELECT 1" + many(3000, ", t.case AS end"), Large},
		"too long":           {"SELECT '" + many(4<<20, "x") + "'", 0},
		"too many words":     {"SELECT 1" + many(250_000, ",1"), 0},
		"brackets":           {"SELECT " + many(1000, "(") + "1" + many(1000, ")"), 0},
		"CASE in CASE":       {"SELECT " + many(1000, "CASE WHEN ") + "true" + many(1000, " THEN 1 END"), 0},
		"CASE behind a name": {"SELECT " + many(1000, "CASE WHEN t.end THEN "), 0},
		"operators":          {"SELECT 1" + many(3000, " + 1"), 0},
		"BETWEEN":            {"SELECT a" + many(3000, " BETWEEN 1 AND 2 IS NULL"), 0},
		"joins":              {"SELECT 1 FROM a" + many(3000, " JOIN b ON true"), 0},
		"comments":           {many(65, "/*") + many(65, "*/"), 0},
	} {
		got, err := Measure(c.text)
		if got != c.want || (err == nil) != (c.want != 0) {
			t.Errorf("%s: got %v, %v, want %v", name, got, err, c.want)
		}
	}
}

// FuzzParse holds that no text of the small lane breaks the parser.
func FuzzParse(f *testing.F) {
	for _, seed := range []string{
		"SELECT 1", "(SELECT (SELECT 1))", "SELECT NOT NOT a IS NULL", "WITH a AS (SELECT 1) SELECT * FROM a", "SELECT E'\\'", "SELECT U&\"\\0061\" UESCAPE '!'",
		"CASE WHEN", "a::int[][]", "$$", "VALUES (1,2),(3,4)", "MERGE INTO a USING b ON true WHEN MATCHED THEN DELETE", "SELECT JSON_TABLE('', '$' COLUMNS (NESTED PATH '$' COLUMNS (a int)))",
	} {
		f.Add(seed, 1)
		f.Add(seed, 100)
	}
	f.Fuzz(func(t *testing.T, text string, times int) {
		if times < 1 || times > 2000 || strings.Contains(text, "\x00") {
			return
		}
		text = strings.Repeat(text, times)
		if lane, err := Measure(text); err != nil || lane != Small {
			return
		}
		if _, err := parse(text); errors.Is(err, errBroken) {
			t.Fatalf("%.200q breaks the parser: %v", text, err)
		}
	})
}
