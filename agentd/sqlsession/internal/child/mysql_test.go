package child

import (
	"slices"
	"testing"
)

func TestMySQLPosition(t *testing.T) {
	message := func(near, line string) string {
		return "You have an error in your SQL syntax; check the manual for the right syntax to use near '" + near + "' at line " + line
	}
	long := "select a frm t where b = 1 and c = 2 and d = 3 and e = 4 and f = 5 and g = 6 and h = 7 and i = 8"
	for _, test := range []struct {
		name, message, text string
		want                int
	}{
		{"the rest", message("frm t", "1"), "select 'é' frm t", 12},
		{"a later line", message("frm t", "2"), "select 1\nfrm t", 10},
		{"the end", message("", "1"), "select (1", 10},
		{"80 bytes", message(long[9:89], "1"), long, 10},
		{"not of the text", message("xyz", "1"), "select 1", 0},
		{"beyond the lines", message("frm t", "9"), "select frm t", 0},
		{"another message", "Unknown column", "select a", 0},
	} {
		if got := mysqlPosition(test.message, test.text); got != test.want {
			t.Errorf("%s: got %d, want %d", test.name, got, test.want)
		}
	}
}

func TestSplitPrivileges(t *testing.T) {
	got := splitPrivileges("SELECT (a, b), INSERT, SHOW VIEW")
	if want := []string{"SELECT", "INSERT", "SHOW VIEW"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestMySQLMoment(t *testing.T) {
	for text, want := range map[string][2]int64{
		"1970-01-01": {0, 0}, "1969-12-31": {-1, 0}, "0001-01-01": {-719162, 0}, "9999-12-31": {2932896, 0},
		"1969-12-31 23:59:59.999999": {-1, 86399999999}, "2024-02-29 12:00:00": {19782, 43200000000},
	} {
		days, micros, err := mysqlMoment(text)
		if err != nil || [2]int64{days, micros} != want {
			t.Errorf("%s: got %d, %d, %v, want %v", text, days, micros, err, want)
		}
	}
	for _, text := range []string{"0000-00-00", "2024-00-10", "2023-02-29", "x", ""} {
		if _, _, err := mysqlMoment(text); err == nil {
			t.Errorf("%q is a date", text)
		}
	}
}

// What describes a column or placeholder is read from whatever a server may send.
func FuzzMySQLDefinition(f *testing.F) {
	good := "\x03def\x04shop\x01a\x06things\x02nm\x04name\x0c\x2d\x00\xff\x00\x00\x00\xfd\x01\x10\x00\x00\x00"
	f.Add([]byte(good))
	f.Add([]byte("\xfe\xff\xff\xff\xff\xff\xff\xff\xff"))
	f.Add([]byte("\x03def\x00\x00\x00\xfc\x01\x00x\x00\x0c\x3f\x00\x00\x00\x00\x00\x08\x20\x00\x00"))
	c, err := mysqlDefinition([]byte(good))
	if want := (mysqlColumn{schema: "shop", table: "things", name: "nm", column: "name", database: "VARCHAR", notNull: true}); err != nil || c != want {
		f.Fatalf("got %+v, %v, want %+v", c, err, want)
	}
	f.Fuzz(func(t *testing.T, packet []byte) {
		if c, err := mysqlDefinition(packet); err == nil && len(c.name)+len(c.schema)+len(c.table)+len(c.column) > len(packet) {
			t.Errorf("%q: got %+v", packet, c)
		}
		_ = mysqlRefusal(packet)
	})
}
