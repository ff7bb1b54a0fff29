package enginetest

import (
	"fmt"
	"strings"
	"testing"

	"github.com/postern-dev/postern/agentd/sqlsession"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// root is the shared server as its superuser.
func root(t *testing.T) (*database, func(s *sqlsession.Source)) {
	t.Helper()
	db, err := mariadb()
	if err != nil {
		t.Fatal(err)
	}
	return db, func(s *sqlsession.Source) {
		s.DSN, s.Password = mariaServer.SocketDSN("root", "shop"), login(mariaServer.Password)
	}
}

func TestMariaTypes(t *testing.T) {
	db, super := root(t)
	m := db.open(t, super)
	tests := []struct {
		expression, arrow string
		want              string
	}{
		{"CAST(-128 AS SIGNED)", "int32", "-128"},
		{"c_tiny", "int16", "-128"},
		{"c_utiny", "int16", "255"},
		{"c_small", "int16", "-32768"},
		{"c_usmall", "int32", "65535"},
		{"c_medium", "int32", "-8388608"},
		{"c_int", "int32", "-2147483648"},
		{"c_uint", "int64", "4294967295"},
		{"c_big", "int64", "-9223372036854775808"},
		{"c_ubig", "uint64", "18446744073709551615"},
		{"c_bool", "int16", "1"},
		{"c_year", "int16", "2155"},
		{"c_bit", "uint64", "255"},
		{"c_bit64", "uint64", "18446744073709551615"},
		{"c_float", "float32", "1.5"},
		{"c_double", "float64", "-1.7976931348623157e+308"},
		{"c_decimal", "utf8", "-12345678901234567890.0123456789"},
		{"c_date", "date32", "9999-12-31"},
		{"c_datetime", "timestamp[us]", "9999-12-31T23:59:59.999999Z"},
		{"c_timestamp", "timestamp[us, tz=UTC]", "2024-02-29T12:00:00Z"},
		{"c_time", "utf8", "-838:59:59.000000"},
		{"c_char", "utf8", "ä"},
		{"c_varchar", "utf8", ""},
		{"c_text", "utf8", "𝄞"},
		{"c_enum", "utf8", "b"},
		{"c_set", "utf8", "a,c"},
		{"c_json", "utf8", `{"a": 1}`},
		{"c_binary", "binary", "AP8A"},
		{"c_blob", "binary", "AA=="},
		{"c_null", "int32", "(null)"},
		{"NULL", "utf8", "(null)"},
		{"CAST('x' AS BINARY)", "binary", "eA=="},
		{"1.50", "utf8", "1.50"},
		{"1e0", "float64", "1"},
		{"'a'", "utf8", "a"},
		{"1 = 1", "int32", "1"},
	}
	_, err := db.admin.Exec("CREATE TABLE types (c_tiny TINYINT, c_utiny TINYINT UNSIGNED, c_small SMALLINT, c_usmall SMALLINT UNSIGNED, c_medium MEDIUMINT, c_int INT, c_uint INT UNSIGNED, c_big BIGINT, c_ubig BIGINT UNSIGNED, " +
		"c_bool BOOL, c_year YEAR, c_bit BIT(8), c_bit64 BIT(64), c_float FLOAT, c_double DOUBLE, c_decimal DECIMAL(30,10), c_date DATE, c_datetime DATETIME(6), c_timestamp TIMESTAMP NULL, c_time TIME(6), " +
		"c_char CHAR(5), c_varchar VARCHAR(5), c_text LONGTEXT, c_enum ENUM('a','b'), c_set SET('a','b','c'), c_json JSON, c_binary BINARY(3), c_blob BLOB, c_null INT)")
	if err != nil {
		t.Fatal(err)
	}
	_, err = db.admin.Exec("INSERT INTO types VALUES (-128, 255, -32768, 65535, -8388608, -2147483648, 4294967295, -9223372036854775808, 18446744073709551615, TRUE, 2155, b'11111111', ~0, 1.5, -1.7976931348623157e308, " +
		"-12345678901234567890.0123456789, '9999-12-31', '9999-12-31 23:59:59.999999', '2024-02-29 12:00:00', '-838:59:59', 'ä', '', '𝄞', 'b', 'a,c', '{\"a\": 1}', x'00ff', x'00', NULL)")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = db.admin.Exec("DROP TABLE types") }()
	for _, test := range tests {
		got, _ := query(t, m, request("SELECT "+test.expression+" AS v FROM types"))
		if f := got.schema.Field(0); f.Type.String() != test.arrow || got.rows[0][0] != test.want {
			t.Errorf("%s: got %s %q, want %s %q", test.expression, f.Type, got.rows[0][0], test.arrow, test.want)
		}
	}
	for text, says := range map[string]string{
		"SELECT d FROM zero": `column "d": the date "0000-00-00" is none of the calendar's`,
		"SELECT p FROM zero": `column "p": the date "2024-00-00 00:00:00" is none`,
	} {
		if _, err := db.admin.Exec("CREATE TABLE IF NOT EXISTS zero (d DATE, p DATETIME)"); err != nil {
			t.Fatal(err)
		}
		_, _ = db.admin.Exec("SET SESSION sql_mode = ''; DELETE FROM zero; INSERT INTO zero VALUES ('0000-00-00', '2024-00-00')")
		if e := refuse(t, m, request(text), proto.CodeInvalid); !strings.Contains(e.Error(), says) {
			t.Errorf("%s: got %q, want %q", text, e, says)
		}
	}
	got, _ := query(t, m, request("SELECT CAST(d AS CHAR) FROM zero"))
	if got.rows[0][0] != "0000-00-00" {
		t.Errorf("got %v", got.rows)
	}
	_, _ = db.admin.Exec("DROP TABLE zero")
}

func TestMariaTLS(t *testing.T) {
	db, _ := root(t)
	dsn := func(rest string) func(*sqlsession.Source) {
		return func(s *sqlsession.Source) {
			s.DSN = fmt.Sprintf("host=localhost port=%d user=reader dbname=shop %s", mariaServer.Port, rest)
		}
	}
	for rest, want := range map[string]string{
		"": "encrypted, but anybody could pose", "sslmode=require": "encrypted, but anybody", "sslmode=disable": "stays on this host",
		"sslrootcert=" + mariaServer.CAFile: "certificate verified", "sslmode=verify-ca sslrootcert=" + mariaServer.CAFile: "certificate verified",
	} {
		m := db.open(t, dsn(rest))
		found := false
		for _, c := range m.Check(t.Context(), "db") {
			// On a loopback address it makes no difference that nobody vouches for the server.
			found = found || c.Name == "tls" && (strings.Contains(c.Message, want) || strings.Contains(c.Message, "stays on this host") && !strings.Contains(want, "verified"))
		}
		if !found {
			t.Errorf("%q: got %v, want %q", rest, m.Check(t.Context(), "db"), want)
		}
		query(t, m, request("SELECT 1"))
	}
	e := refuse(t, db.open(t, dsn("sslmode=verify-full")), request("SELECT 1"), proto.CodeSourceConfig)
	if !strings.Contains(e.Error(), "check sslmode and sslrootcert") || strings.Contains(e.Error(), "\n") {
		t.Errorf("got %q", e)
	}
	refuse(t, db.open(t, func(s *sqlsession.Source) { s.DSN = "host=127.0.0.1 port=1 user=reader" }), request("SELECT 1"), proto.CodeSourceUnreachable)
	refuse(t, db.open(t, func(s *sqlsession.Source) { s.DSN = mariaServer.DSN("reader", "nowhere") }), request("SELECT 1"), proto.CodeSourceConfig)
}

// Views that the account may read and not look into are refused, unless listed.
func TestMariaHiddenViews(t *testing.T) {
	db, _ := root(t)
	for _, s := range []string{
		"CREATE DATABASE IF NOT EXISTS inner_db", "CREATE TABLE inner_db.t (a INT)", "INSERT INTO inner_db.t VALUES (1)", "CREATE FUNCTION inner_db.f() RETURNS INT RETURN GET_LOCK('attack', 0)",
		"CREATE VIEW inner_db.v AS SELECT inner_db.f() AS a", "CREATE DATABASE IF NOT EXISTS outer_db", "CREATE VIEW outer_db.over_table AS SELECT a FROM inner_db.t", "CREATE VIEW outer_db.over_view AS SELECT a FROM inner_db.v",
		"CREATE USER narrow IDENTIFIED BY '" + readerPassword + "'", "GRANT SELECT, SHOW VIEW ON outer_db.* TO narrow", "CREATE USER blind IDENTIFIED BY '" + readerPassword + "'", "GRANT SELECT ON outer_db.* TO blind",
	} {
		if _, err := db.admin.Exec(s); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
	as := func(user string, functions ...string) *sqlsession.Manager {
		return db.open(t, func(s *sqlsession.Source) {
			s.DSN, s.Guard.Mode, s.Guard.Functions = mariaServer.DSN(user, "outer_db"), "read-only", functions
		})
	}
	for _, view := range []string{"over_table", "over_view"} {
		refuse(t, as("narrow"), request("SELECT * FROM "+view), proto.CodePolicyDenied)
		refuse(t, as("blind"), request("SELECT * FROM "+view), proto.CodePolicyDenied)
	}
	query(t, as("narrow", "outer_db.over_table"), request("SELECT * FROM over_table"))
	query(t, as("blind", "outer_db.*"), request("SELECT * FROM over_table"))
	refuse(t, as("narrow", "outer_db.over_table"), request("SELECT * FROM over_view"), proto.CodePolicyDenied)
}

// Accounts of MariaDB's ed25519 can log in, also where no TLS hides it.
func TestMariaEd25519(t *testing.T) {
	db, _ := root(t)
	for _, s := range []string{"INSTALL SONAME 'auth_ed25519'", "CREATE USER modern IDENTIFIED VIA ed25519 USING PASSWORD('" + readerPassword + "')", "GRANT SELECT ON shop.* TO modern"} {
		if _, err := db.admin.Exec(s); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
	m := db.open(t, func(s *sqlsession.Source) { s.DSN = mariaServer.DSN("modern", "shop") })
	query(t, m, request("SELECT 1"))
	// An account that reads only is told of as such.
	for _, c := range m.Check(t.Context(), "db") {
		if c.Result != "ok" {
			t.Errorf("got %v", c)
		}
	}
}

// A value of 100 MB passes, and what it took is given back.
func TestMariaGiantValue(t *testing.T) {
	db, super := root(t)
	m := db.open(t, super)
	query(t, m, request("SELECT 1"))
	pids := children(t)
	if len(pids) != 1 {
		t.Fatalf("got processes %v, want one", pids)
	}
	r := request("SELECT REPEAT('x', 100000000)")
	var size counter
	if _, err := m.Run(t.Context(), r, &size); err != nil || size < 100_000_000 {
		t.Fatalf("got %d bytes, %v", size, err)
	}
	query(t, m, request("SELECT 1"))
	peak, now := memoryOf(t, pids[0], "VmHWM"), memoryOf(t, pids[0], "VmRSS")
	t.Logf("peak %d MiB, %d MiB after", peak>>10, now>>10)
	// The race detector keeps memory of its own.
	if !raceEnabled && (peak > 600<<10 || now > 150<<10) {
		t.Errorf("got a peak of %d kB and %d kB after, want 600 MB and 150 MB at most", peak, now)
	}
}

// What the server warns of arrives.
func TestMariaWarnings(t *testing.T) {
	db, super := root(t)
	m := db.open(t, super, readWrite)
	write := func(text string) *posternv1.QueryOutcome {
		r := request(text)
		r.ReadWrite = true
		_, outcome := query(t, m, r)
		return outcome
	}
	write("CREATE TABLE narrow_table (a TINYINT)")
	outcome := write("INSERT IGNORE INTO narrow_table VALUES (1000), (1)")
	if outcome.CommandTag != "INSERT 2" || len(outcome.Notices) != 1 || !strings.Contains(outcome.Notices[0].Message, "Out of range") || outcome.Notices[0].Severity != "WARNING" {
		t.Errorf("got %v", outcome)
	}
	write("DROP TABLE narrow_table")
}
