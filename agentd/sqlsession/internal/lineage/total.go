package lineage

import (
	"strconv"
	"strings"

	pgquery "github.com/pganalyze/pg_query_go/v6"
)

func set(words string) map[string]bool {
	m := make(map[string]bool)
	for _, w := range strings.Fields(words) {
		m[w] = true
	}
	return m
}

// totals are functions of the system that never fail, and take no longer for
// one value than for another, whatever they are given.
var totals = set(`lower upper initcap btrim ltrim rtrim concat concat_ws length char_length character_length octet_length bit_length reverse
	md5 quote_literal quote_nullable quote_ident ascii to_json to_jsonb row_to_json array_to_json json_build_array jsonb_build_array
	array_agg json_agg jsonb_agg xmlagg min max avg count bool_and bool_or every stddev stddev_pop stddev_samp variance var_pop var_samp sum
	first_value last_value lag lead nth_value num_nulls num_nonnulls array_length cardinality array_to_string starts_with strpos
	coalesce greatest least nullif pg_typeof format_type pg_get_expr json_typeof jsonb_typeof hashtext sha224 sha256 sha384 sha512
	any_value mode rank dense_rank row_number percent_rank cume_dist isfinite`)

// totalsOfConstants are the same if their arguments, but for the first, are
// constants: those fail for all values or for none.
var totalsOfConstants = set(`left right substr substring split_part position replace translate to_char date_trunc date_part extract age
	round trunc ceil ceiling floor sign abs overlay string_agg lpad rpad encode json_build_object jsonb_build_object
	percentile_cont percentile_disc timezone date`)

func (a *analyzer) totalCall(s *scope, f *pgquery.FuncCall, name string) bool {
	switch {
	case totals[name]:
		return true
	case name == "date_trunc" || name == "date_part" || name == "extract" || name == "timezone" || name == "percentile_cont" || name == "percentile_disc":
		return len(f.Args) > 0 && constant(f.Args[0])
	case name == "json_build_object" || name == "jsonb_build_object":
		for i := 0; i < len(f.Args); i += 2 {
			if !constant(f.Args[i]) {
				return false
			}
		}
		return true
	case totalsOfConstants[name]:
		return len(f.Args) > 0 && allConstant(f.Args[1:])
	}
	return false
}

// total tells whether an operator never fails.
func (a *analyzer) total(s *scope, e *pgquery.A_Expr, name string, left, right taint) bool {
	if constant(e.Lexpr) && constant(e.Rexpr) {
		return true
	}
	switch e.Kind {
	case pgquery.A_Expr_Kind_AEXPR_LIKE, pgquery.A_Expr_Kind_AEXPR_ILIKE:
		return goodPattern(e.Rexpr)
	case pgquery.A_Expr_Kind_AEXPR_DISTINCT, pgquery.A_Expr_Kind_AEXPR_NOT_DISTINCT, pgquery.A_Expr_Kind_AEXPR_IN, pgquery.A_Expr_Kind_AEXPR_NULLIF,
		pgquery.A_Expr_Kind_AEXPR_BETWEEN, pgquery.A_Expr_Kind_AEXPR_NOT_BETWEEN, pgquery.A_Expr_Kind_AEXPR_BETWEEN_SYM, pgquery.A_Expr_Kind_AEXPR_NOT_BETWEEN_SYM:
		return true
	case pgquery.A_Expr_Kind_AEXPR_OP, pgquery.A_Expr_Kind_AEXPR_OP_ANY, pgquery.A_Expr_Kind_AEXPR_OP_ALL:
	default:
		return false
	}
	switch name {
	case "=", "<>", "!=", "<", ">", "<=", ">=", "||":
		return true
	case "->", "->>", "#>", "#>>":
		return constant(e.Rexpr)
	case "~~", "!~~", "~~*", "!~~*":
		return goodPattern(e.Rexpr)
	case "+", "-":
		return e.Lexpr != nil && a.column(s, e.Lexpr, left) && (a.column(s, e.Rexpr, right) || small(e.Rexpr, 1e6)) ||
			small(e.Lexpr, 1e6) && a.column(s, e.Rexpr, right)
	case "*":
		return a.column(s, e.Lexpr, left) && small(e.Rexpr, 100) || small(e.Lexpr, 100) && a.column(s, e.Rexpr, right)
	case "/":
		return a.column(s, e.Lexpr, left) && small(e.Rexpr, 1e6) && !small(e.Rexpr, 1e-6)
	}
	return false
}

// goodPattern tells whether a pattern of LIKE fails for no text: one that ends
// in its escape character fails for some.
func goodPattern(n *pgquery.Node) bool {
	pattern := n.GetAConst().GetSval()
	return pattern != nil && !strings.HasSuffix(pattern.Sval, `\`)
}

// column tells whether an expression is a masked column itself. With a small
// number it overflows near the end of its type only, where values are not found.
func (a *analyzer) column(s *scope, n *pgquery.Node, t taint) bool {
	return n.GetColumnRef() != nil && t.plain
}

// small tells whether an expression is a number up to limit, either sign.
func small(n *pgquery.Node, limit float64) bool {
	c := n.GetAConst()
	if c == nil || c.Isnull {
		return false
	}
	switch v := c.Val.(type) {
	case *pgquery.A_Const_Ival:
		f := float64(v.Ival.GetIval())
		return f <= limit && f >= -limit
	case *pgquery.A_Const_Fval:
		f, err := strconv.ParseFloat(v.Fval.GetFval(), 64)
		return err == nil && f <= limit && f >= -limit
	}
	return false
}
