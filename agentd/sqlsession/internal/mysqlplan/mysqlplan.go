package mysqlplan

import (
	"encoding/json"
	"slices"
	"strings"

	"github.com/postern-dev/postern/agentd/sqlsession/internal/plandoc"
)

// Full makes one line of canonical JSON of the server's plan, all of which is kept.
// text, which may be nil, sees every text in it and returns what to tell.
func Full(plan []byte, text func(string) string) ([]byte, error) {
	top, err := decode(plan)
	if err != nil {
		return nil, err
	}
	return plandoc.Encode(top, text), nil
}

// Structure makes a plan without literals: tables, keys, columns of keys and how they
// are read, and estimates as powers of ten. Conditions, expressions and what is not
// known to be harmless are left out. text is Full's.
func Structure(plan []byte, text func(string) string) ([]byte, error) {
	top, err := decode(plan)
	if err != nil {
		return nil, err
	}
	return plandoc.Encode(reduce(top), text), nil
}

func decode(plan []byte) ([]plandoc.Member, error) {
	v, err := plandoc.Decode(plan)
	if err != nil {
		return nil, err
	}
	top, ok := v.([]plandoc.Member)
	if !ok || !slices.ContainsFunc(top, func(m plandoc.Member) bool {
		_, is := m.Value.([]plandoc.Member)
		return is && (m.Key == "query_block" || m.Key == "query_plan")
	}) {
		return nil, plandoc.ErrGarbled
	}
	return top, nil
}

// The members that Structure keeps, by what their values are. A member of another kind
// than its list says is left out.
var (
	// parts hold objects, or lists of them.
	parts = keys(`query_block query_plan nested_loop table inputs inputs_from_select_list
		ordering_operation grouping_operation duplicates_removal buffer_result windowing
		union_result intersect_result except_result unary_result query_specifications query_specification recursive_union
		materialized materialized_from_subquery attached_subqueries optimized_away_subqueries select_list_subqueries having_subqueries
		order_by_subqueries group_by_subqueries update_value_subqueries subqueries expression_cache
		read_sorted_file filesort temporary_table window_functions_computation sorts block-nl-join range-checked-for-each-record
		index_merge union intersect sort_union range rowid_filter cost_info`)
	// names hold names, or lists of them.
	names = keys(`table_name schema_name alias key index_name possible_keys used_key_parts key_columns`)
	// columns are those of names that hold columns of a key.
	columns = keys(`used_key_parts key_columns`)
	// words hold a word of the server's.
	words = keys(`access_type index_access_type join_type join_algorithm buffer_type using_join_buffer semijoin_strategy subquery_location query_type`)
	flags = keys(`using_index using_filesort using_temporary_table using_index_for_group_by using_MRR dependent cacheable covering distinct subquery
		union deduplication recursive not_exists reverse backward_scan`)
	estimates = keys(`rows rows_examined_per_scan rows_produced_per_join estimated_rows estimated_total_cost estimated_first_row_cost
		cost query_cost read_cost eval_cost prefix_cost sort_cost loops`)
	// closed hold one of these texts of the server's.
	closed = map[string][]string{
		"operation": {"UNION", "UNION ALL", "INTERSECT", "INTERSECT ALL", "EXCEPT", "EXCEPT ALL"},
		"message": {
			"No tables used", "Impossible WHERE", "Impossible HAVING", "Zero limit", "Select tables optimized away", "Impossible WHERE noticed after reading const tables",
			"no matching row in const table", "const row not found", "No matching min/max row", "no matching row", "unique row not found",
		},
	}
)

func keys(list string) map[string]bool {
	s := make(map[string]bool)
	for _, k := range strings.Fields(list) {
		s[k] = true
	}
	return s
}

func reduce(object []plandoc.Member) []plandoc.Member {
	kept := []plandoc.Member{}
	made := madeUp(object)
	for _, m := range object {
		if v, ok := told(m, made); ok {
			kept = append(kept, plandoc.Member{Key: m.Key, Value: v})
		}
	}
	return kept
}

// madeUp tells whether the object is of a table or key that the server makes for the
// statement (<derived2>, <auto_key0>): its columns may have names that the server has
// made of expressions, with the literals in them.
func madeUp(object []plandoc.Member) bool {
	return slices.ContainsFunc(object, func(m plandoc.Member) bool {
		name, ok := m.Value.(string)
		return ok && (m.Key == "table_name" || m.Key == "key" || m.Key == "index_name") && strings.HasPrefix(name, "<")
	})
}

// told is what of a member's value is told; ok is false for nothing.
func told(m plandoc.Member, made bool) (value any, ok bool) {
	switch v := m.Value.(type) {
	case []plandoc.Member:
		if parts[m.Key] {
			return reduce(v), true
		}
	case []any:
		return list(m.Key, v, made)
	case string:
		switch {
		case names[m.Key] && !(made && columns[m.Key]), words[m.Key] && isWord(v), slices.Contains(closed[m.Key], v):
			return v, true
		case m.Key == "key_length" && strings.Trim(v, "0123456789,") == "":
			return v, true
		case estimates[m.Key]:
			return plandoc.Magnitude(json.Number(v)), true
		}
	case json.Number:
		switch {
		case estimates[m.Key]:
			return plandoc.Magnitude(v), true
		case m.Key == "select_id" && len(v) < 4:
			return v, true
		}
	case bool:
		if flags[m.Key] {
			return v, true
		}
	}
	return nil, false
}

// list is what is told of a list.
func list(key string, values []any, made bool) (value any, ok bool) {
	kept := []any{}
	for _, e := range values {
		switch e := e.(type) {
		case []plandoc.Member:
			if parts[key] {
				kept = append(kept, reduce(e))
			}
		case string:
			if names[key] && !(made && columns[key]) {
				kept = append(kept, e)
			}
		}
	}
	return kept, len(kept) > 0
}

// isWord tells whether text can be a word of the server's, such as eq_ref or hash join.
func isWord(text string) bool {
	return len(text) <= 40 && strings.Trim(text, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_ ") == ""
}
