package sqlsplittest

// Case is a text and the names of its placeholders, on the engines named.
type Case struct {
	Engines []string // as data sources have them
	Text    string
	Names   []string // sorted, each once
}

// Placeholders are the cases.
func Placeholders() []Case {
	all := []string{"postgres", "mysql", "sqlite"}
	pg, my, lite := all[:1], all[1:2], all[2:]
	return []Case{
		{all, "select :a, {{b}}, {{ c | list }}, {{c|identifier}}, x::int, ':no', /* :no */ :d -- :no\n", []string{"a", "b", "c", "d"}},
		{all, "{{1}} {{}} {{ {{a|}} :é :1", nil},
		{all, "", nil},
		{all, "select 1", nil},
		{all, "select :a1_b, :a, :a, {{a}}", []string{"a", "a1_b"}},
		{pg, `select "{{no}}", $$ :no $$, E'\':no', :d::text, $x$ :no`, []string{"d"}},
		{pg, "a[1:n] a[:n] a[(1):n] a[:n::int] := :b", []string{"b", "n"}},
		{pg, "a[1:n] a[{{x}}:n] a[b[1]:n]", []string{"x"}},
		{pg, "select array[:x, 2], :y", []string{"x", "y"}},
		{pg, "select `:a`, # :b", []string{"a", "b"}},
		{pg, "select e'' -- ' \n '\\' :no', :a", []string{"a"}},
		{pg, `select 'a\', :b, 'c\'`, []string{"b"}},
		{pg, "select /* /* :no */ :no */ :a", []string{"a"}},
		{my, "select ':no \\' {{no}}', \" :no\", {{a}} # :no it's", []string{"a"}},
		{my, "select 1--:a, `:no`, $$ :b $$", []string{"a", "b"}},
		{my, `select 'it\'s {{no}}', "a \" :no", 'b'':no', :b`, []string{"b"}},
		{my, "select /* /* :no */ :a # it's {{no}}\n, :b", []string{"a", "b"}},
		{lite, "select ':no\\', :a, [:no], `:no`, $x, $$ :b /* /* */ :c", []string{"a", "b", "c"}},
		{lite, "select [it's {{no}}], :a, \":no\"", []string{"a"}},
	}
}
