//go:build clients

package e2e

import (
	"regexp"
	"strings"
	"testing"
)

// TestJDBCMetadata: the real driver's DatabaseMetaData on a source in mode metadata, and
// on one of another mode, beside the same on the database itself.
func TestJDBCMetadata(t *testing.T) {
	e := newEndpoint(t, "jdbcmeta", append(shop[:len(shop):len(shop)], definitions...), "      mode: metadata\n")
	ask := func(env []string) []string {
		out := mustClient(t, env, "", "java", "-cp", "/usr/share/java/postgresql.jar", "clients/Metadata.java")
		if !strings.HasSuffix(out, "\nok\n") {
			t.Fatalf("got %s", out)
		}
		return strings.Split(strings.TrimSpace(out), "\n")
	}
	direct := ask(append(e.direct(), "PGHOST=127.0.0.1"))
	for source, told := range map[string]func(string) string{"shop": withoutData, "desk": func(line string) string { return dataIn[len(dataIn)-1].ReplaceAllString(line, "?") }} {
		got := ask(e.env(source))
		if len(got) != len(direct) {
			t.Errorf("%s: got %d lines, want %d", source, len(got), len(direct))
		}
		wrong := 0
		for i := range min(len(got), len(direct)) {
			if source == "shop" && (strings.Contains(got[i], "kanari") || strings.Contains(got[i], "771234")) {
				t.Errorf("%s tells %s", source, got[i])
			}
			if told(got[i]) != told(direct[i]) && wrong < 20 {
				wrong++
				t.Errorf("%s:\n got %s\nwant %s", source, got[i], direct[i])
			}
		}
	}
}

// dataIn are the fields in which mode metadata tells less: defaults, and what follows of
// them, expressions and numbers of rows; and the name of the database, which is a source's.
var dataIn = []*regexp.Regexp{
	regexp.MustCompile(`COLUMN_DEF=.*?( [A-Z_]+=|$)`), regexp.MustCompile(`CARDINALITY=.*?( [A-Z_]+=|$)`), regexp.MustCompile(`PAGES=.*?( [A-Z_]+=|$)`),
	regexp.MustCompile(`FILTER_CONDITION=.*?( [A-Z_]+=|$)`), regexp.MustCompile(`IS_AUTOINCREMENT=.*?( [A-Z_]+=|$)`), regexp.MustCompile(`^getCatalogs: TABLE_CAT=.*()$`),
}

func withoutData(line string) string {
	for _, field := range dataIn {
		line = field.ReplaceAllString(line, "?$1")
	}
	line = strings.ReplaceAll(line, "COLUMN_NAME=lower(word)", "COLUMN_NAME=(hidden)")
	return strings.ReplaceAll(line, "TYPE_NAME=serial", "TYPE_NAME=int4")
}
