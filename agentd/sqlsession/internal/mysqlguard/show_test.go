package mysqlguard

import (
	"testing"
)

func TestParseShow(t *testing.T) {
	for text, want := range map[string]string{
		"show databases": "SHOW DATABASES", "SHOW SCHEMAS LIKE 'a%';": "SHOW DATABASES LIKE 'a%'", "show tables": "SHOW TABLES", "SHOW FULL TABLES IN `a``b` LIKE 'x\\'y'": "SHOW FULL TABLES FROM `a``b` LIKE 'x\\'y'",
		"show table status from shop": "SHOW TABLE STATUS FROM `shop`", "show columns from t": "SHOW COLUMNS FROM `t`", "show full fields in t in shop like \"a\"": "SHOW FULL COLUMNS FROM `shop`.`t` LIKE \"a\"",
		"show columns from a.b from c": "SHOW COLUMNS FROM `c`.`b`", "SHOW INDEXES FROM shop . t": "SHOW INDEX FROM `shop`.`t`", "show keys in t": "SHOW INDEX FROM `t`", "show create table `t 1`": "SHOW CREATE TABLE `t 1`", "show create view a.v": "SHOW CREATE VIEW `a`.`v`",
		"describe t": "SHOW COLUMNS FROM `t`", "desc a.t /* x */ ;": "SHOW COLUMNS FROM `a`.`t`", "desc t id": "SHOW COLUMNS FROM `t` LIKE 'id'", "desc t `i'd`": "SHOW COLUMNS FROM `t` LIKE 'i''d'", "desc t '%d'": "SHOW COLUMNS FROM `t` LIKE '%d'",
		"show variables like 'version'": "SHOW VARIABLES LIKE 'version'", "show global variables": "SHOW GLOBAL VARIABLES", "show character set": "SHOW CHARACTER SET", "show collation like 'utf8%'": "SHOW COLLATION LIKE 'utf8%'",
	} {
		s, refusal := ParseShow(text)
		if refusal != nil || s.Text != want || !IsShow(text) {
			t.Errorf("%q: got %v, %v, want %q", text, s, refusal, want)
		}
	}
	for _, text := range []string{
		"show", "describe", "desc a.", "show tables where 1", "show tables from", "show tables like x", "show tables like 'a' 'b'", "show columns from t where Field = (select 1)", "show full databases", "show index from t where 1", "show create function f", "show create user root", "show grants", "show processlist", "show engine innodb status",
		"show master status", "show binlog events", "show status", "show warnings", "show create table t; drop table t", "show tables limit 1", "describe select 1", "desc t a b", "desc format=json select 1", "show columns from t like ?", "show tables like concat('a')", "show /*! create user */ tables", "show tables from a.b", "show create table t t", "show table", "show triggers", "show events", "show open tables", "show plugins",
		"show columns from t from a from b", "show extended columns from t", "show create database d", "describe t = 1", "show tables like N'a'",
	} {
		if s, refusal := ParseShow(text); refusal == nil {
			t.Errorf("%q: got %q, want a refusal", text, s.Text)
		}
	}
}

// Whatever is let through is of our own words: it can be read again to the same.
func FuzzParseShow(f *testing.F) {
	for _, text := range []string{"show full columns from `a`.b from c like 'x'", "desc t 'a", "show tables like 'a\\", "show create view `x", "show tables -- x\n like 'a'", " ", ";"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s, refusal := ParseShow(text)
		if refusal != nil {
			return
		}
		again, refusal := ParseShow(s.Text)
		if refusal != nil || *again != *s {
			t.Errorf("%q: became %q, and that %v, %v", text, s.Text, again, refusal)
		}
	})
}
