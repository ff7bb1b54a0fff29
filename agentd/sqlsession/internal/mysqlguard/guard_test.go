package mysqlguard

import (
	"strings"
	"testing"
)

func TestReadOnly(t *testing.T) {
	allowed := []string{
		"select 1", "SELECT 1;", "(select 1) union (select 2)", "with t (a, b) as (select 1, 2) select a from t", "values (1),(2)", "table t",
		"with recursive n(i) as (select 1 union all select i+1 from n where i < 10) select count(*) from n",
		"select concat('into outfile', \"for update\") -- into outfile", "select `into`, `update` from t", "select 'it''s; \\' drop'", "select replace('a','b','c'), insert('a',1,1,'b')",
		"select a -- 1\n from t", "select 1 # into outfile 'x'", "select json_extract(a, '$.b') from t", "select cast(a as decimal(10,2)), convert(b, char(5)), c in (1,2) from t where (a or b) and exists (select 1)",
		"select row_number() over (partition by a order by b) from t", "select last_insert_id()", "select @@version", "select 1/*x*/+1", "select st_astext(g) from t",
		"select * from (values row(1,2)) as v (a, b)", "select truncate(1.5, 1)", "select 0x41, 1e5, 1.5, .5, t.a from t", "select {{x}} + :y", "select date '2020-01-01'",
		"select app.report(1)", "select match (a) against ('x' in boolean mode) from t", "select group_concat(a order by b separator ',') from t group by c with rollup",
		"select if(a, 'x', 'y'), left(a, 2), interval(1,2) from t limit 5",
	}
	for _, text := range allowed {
		if _, refusal := ReadOnly(text, []string{"app.report"}); refusal != nil {
			t.Errorf("%s: refused: %s (%d)", text, refusal.Reason, refusal.Position)
		}
	}
	refused := []string{
		"", ";", "insert into t values (1)", "update t set a=1", "delete from t", "select 1; drop table t", "select 1 into outfile '/tmp/x'", "select 1 into @a",
		"select @a := 1", "select @a", "select * from t for update", "select * from t for share", "select * from t lock in share mode", "select * from t procedure analyse()",
		"select /*!50000 1 into outfile 'x' */", "select 1 /*M! + sleep(1) */", "select /*+ SET_VAR(sql_mode='') */ 1", "select get_lock('a', 1)", "select `get_lock`('a', 1)", "select get_lock ('a', 1)",
		"select load_file('/etc/passwd')", "select release_lock('a')", "select release_all_locks()", "select benchmark(1000, md5('a'))", "select sys_exec('id')", "select f(1)", "select db.f(1)", "select `db`.`f`(1)", "select db . f (1)",
		"select next value for s", "select nextval(s)", "select setval(s, 1)", "select s.nextval", "select last_insert_id(5)", "select uuid_short()", "select master_pos_wait('a', 1)",
		"with t as (select 1) delete from u", "with t as (select 1) update u set a = 1", "set global x = 1", "set statement max_statement_time=1 for select 1", "call p()", "do sleep(1)", "handler t open", "explain select 1", "analyze select 1",
		"show tables", "begin", "lock tables t write", "prepare s from 'x'", "select 'unclosed", "select `unclosed", "select /* unclosed", "select 1into outfile 'x'", "select 1e5into outfile 'x'", "select 1.into outfile 'x'", "select 1sleep(1)",
		"select \x00 1", "select \xff", "select 'a' 'b\\' into outfile \"x", "select 1 --into\ninto outfile 'x'", "select 1 --1 into outfile 'x'", "select \"a\" into outfile 'x'", "select 'a\\\\' into outfile 'x'",
		"select $$into$$", "select name_const('a', 1)", "flush tables", "kill 1", "select * from t where a = (select get_lock('x',1))", "select json_value(get_lock('x',1), '$')", "select ＧＥＴ_lock('a',1)",
		"with get_lock(a) as (select 1) select get_lock('x', 1)", "select 1 as `x` into dumpfile 'y'", "select des_encrypt('a')", "select sleep/**/(1), get_lock/**/('a',1)",
	}
	for _, text := range refused {
		if _, refusal := ReadOnly(text, []string{"app.report"}); refusal == nil {
			t.Errorf("%s: allowed", text)
		}
	}
}

func TestPosition(t *testing.T) {
	_, refusal := ReadOnly("select 'é', get_lock('a', 1)", nil)
	if refusal == nil || refusal.Position != 13 || !strings.Contains(refusal.Reason, "get_lock") {
		t.Errorf("got %+v, want get_lock at 13", refusal)
	}
}

func TestReadWrite(t *testing.T) {
	for text, want := range map[string]string{
		"insert into t values (1)": "", "create table t (a int)": "", "call p(1)": "", "select 1": "", "(select 1)": "",
		"begin": "BEGIN is refused", "COMMIT": "COMMIT is refused", "/*!50000 commit */": "a comment with code", "set autocommit=0": "SET is refused",
		"lock tables t write": "LOCK is refused", "load data infile 'x' into table t": "LOAD is refused", "": "the statement is empty", "use mysql": "USE is refused",
	} {
		got := ""
		if refusal := ReadWrite(text, false); refusal != nil {
			got = refusal.Reason
		}
		if (want == "") != (got == "") || !strings.HasPrefix(got, want) {
			t.Errorf("%s: got %q, want %q", text, got, want)
		}
	}
}

func TestUses(t *testing.T) {
	u, refusal := ReadOnly("select lower(a) from db.`My View` v join t on (v.a = t.a)", nil)
	if refusal != nil {
		t.Fatal(refusal)
	}
	if got := strings.Join(u.Names, " "); got != "select lower a from db My View v join t on" {
		t.Errorf("names: %q", got)
	}
	if len(u.Calls) != 1 || u.Calls[0].Name != "lower" {
		t.Errorf("calls: %v", u.Calls)
	}
}

func FuzzReadOnly(f *testing.F) {
	f.Add("select 'a\\'b' /* c */ from `t` -- x\n where f(1)")
	f.Fuzz(func(t *testing.T, text string) {
		u, refusal := ReadOnly(text, nil)
		if refusal == nil && len(u.Names) == 0 {
			t.Errorf("%q is allowed and names nothing", text)
		}
	})
}

func TestMetadata(t *testing.T) {
	for text, want := range map[string]bool{
		"SELECT a FROM t": false, "SELECT a FROM t JOIN u USING (a)": false, "SELECT a FROM t LEFT JOIN u": true, "SELECT a FROM t natural join u": true,
		"SELECT a, MAX(b) FROM t": true, "SELECT a, `max`(b) FROM t": true, "(SELECT a FROM t) UNION (SELECT 1)": true, "WITH x AS (SELECT 1) SELECT * FROM x": true, "SELECT a FROM t GROUP BY a WITH ROLLUP": true,
	} {
		uses, refusal := Metadata(text, nil)
		if refusal != nil || uses.MayAddNulls != want {
			t.Errorf("%s: got %v, %v, want %v", text, uses.MayAddNulls, refusal, want)
		}
	}
	if _, refusal := Metadata("DELETE FROM t", nil); refusal == nil || !strings.Contains(refusal.Reason, "metadata only") {
		t.Errorf("got %v, want a refusal that names the mode", refusal)
	}
}

func TestParseVerb(t *testing.T) {
	tests := []struct{ text, readOnly, readWrite string }{
		{"BEGIN", "START TRANSACTION READ ONLY", "START TRANSACTION READ WRITE"},
		{"begin work ;", "START TRANSACTION READ ONLY", "START TRANSACTION READ WRITE"},
		{"START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY", "START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY", "START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY"},
		{"START TRANSACTION READ WRITE", "", "START TRANSACTION READ WRITE"},
		{"COMMIT /* x */", "COMMIT", "COMMIT"},
		{"COMMIT AND CHAIN", "", ""},
		{"ROLLBACK WORK TO `a``b`", "ROLLBACK TO SAVEPOINT `a``b`", "ROLLBACK TO SAVEPOINT `a``b`"},
		{"SET SESSION sql_mode = 'strict_all_tables', @@div_precision_increment := 3", "SET SESSION sql_mode = 'STRICT_ALL_TABLES', SESSION div_precision_increment = 3", "SET SESSION sql_mode = 'STRICT_ALL_TABLES', SESSION div_precision_increment = 3"},
		{"SET foreign_key_checks = 0", "", "SET SESSION foreign_key_checks = 0"},
		{"SET @ä = 'ö;' ; ", "SET @`ä` = ('ö;' \n)", "SET @`ä` = ('ö;' \n)"},
		{"SET @a = (1, 2), @b = f(1, 2) -- x", "SET @`a` = ((1, 2)\n), @`b` = (f(1, 2) -- x\n)", "SET @`a` = ((1, 2)\n), @`b` = (f(1, 2) -- x\n)"},
		{"SET @a = 1), (2", "", ""},
		{"SET autocommit = 1", "", ""},
		{"SET sql_mode = 'ANSI_QUOTES'", "", ""},
		{"SET TRANSACTION ISOLATION LEVEL READ COMMITTED", "SET TRANSACTION ISOLATION LEVEL READ COMMITTED", "SET TRANSACTION ISOLATION LEVEL READ COMMITTED"},
		{"SET SESSION TRANSACTION ISOLATION LEVEL SERIALIZABLE", "", "SET SESSION TRANSACTION ISOLATION LEVEL SERIALIZABLE"},
		{"SET transaction_isolation = 'Serializable'", "", "SET SESSION transaction_isolation = 'Serializable'"},
		{"SET tx_isolation = 'repeatable-read'", "SET SESSION tx_isolation = 'repeatable-read'", "SET SESSION tx_isolation = 'repeatable-read'"},
		{"USE `a b`", "USE `a b`", "USE `a b`"},
	}
	for _, test := range tests {
		for readOnly, want := range map[bool]string{true: test.readOnly, false: test.readWrite} {
			v, refusal := ParseVerb(test.text, readOnly)
			got := ""
			if v != nil {
				got = v.SQL
			}
			if got != want || (refusal != nil) != (want == "") {
				t.Errorf("%s (read-only %v): got %q, %v, want %q", test.text, readOnly, got, refusal, want)
			}
		}
	}
	if v, refusal := ParseVerb("SELECT 1", true); v != nil || refusal != nil {
		t.Errorf("a query: got %v, %v", v, refusal)
	}
	if v, _ := ParseVerb("SET max_statement_time = 1.5", true); v == nil || v.SQL != "" || !v.Timed || v.Millis != 1500 {
		t.Errorf("got %v, want a limit of 1500 ms", v)
	}
}

func FuzzParseVerb(f *testing.F) {
	for _, text := range []string{"BEGIN", "SET @a = (1), b = 'x'", "SET SESSION sql_mode=''", "ROLLBACK TO a", "START TRANSACTION READ ONLY,", "SET @", "SET", "USE `", "SET @a = ?;;"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		v, refusal := ParseVerb(text, true)
		if v != nil && (refusal != nil || v.Writes) {
			t.Errorf("%q: got %v, %v", text, v, refusal)
		}
	})
}
