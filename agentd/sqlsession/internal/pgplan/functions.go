package pgplan

import (
	"strings"

	"github.com/postern-dev/postern/proto/glob"
)

// Candidate is a function of the server's catalog that a name may mean.
type Candidate struct {
	Schema, Name string
	// BuiltIn is set for those that come with the server.
	BuiltIn bool
	// Volatility is i, s or v, as in pg_proc.
	Volatility string
	// Extension is the one that the function belongs to.
	Extension string
}

// Plannable tells whether the planner may run the function, and running the
// statement it: it looks at its arguments and nothing else, or at what every
// statement may know. globs are the policy's, each NAME or SCHEMA.NAME.
func (c Candidate) Plannable(globs []string) bool {
	switch {
	case allowedBy(globs, c.Schema, c.Name):
		return true
	case c.BuiltIn && c.Volatility == "i":
		return true
	case c.BuiltIn:
		return harmless[c.Name]
	}
	return pure[c.Extension] && (c.Volatility == "i" || c.Volatility == "s")
}

func allowedBy(globs []string, schema, name string) bool {
	for _, g := range globs {
		if s, n, ok := strings.Cut(g, "."); ok {
			if glob.Match(s, schema) && glob.Match(n, name) {
				return true
			}
		} else if glob.Match(g, name) {
			return true
		}
	}
	return false
}

// pure are the extensions of PostgreSQL and PostGIS and the like whose functions
// look at their arguments alone, the volatile ones apart. Only the owner of an
// extension can add to it.
var pure = set(`citext hstore pg_trgm ltree intarray cube earthdistance isn seg unaccent fuzzystrmatch pgcrypto uuid-ossp
	btree_gin btree_gist bloom postgis vector`)

// harmless are the built-in functions that are not immutable and yet tell nothing
// but of their arguments, the clock, the session's own name and settings of
// format, or chance.
var harmless = set(`now transaction_timestamp statement_timestamp clock_timestamp timeofday age date_trunc date_part extract date_bin
	to_char to_timestamp to_date to_number timezone make_timestamptz date time timetz timestamp timestamptz interval isfinite
	timestamptz_pl_interval timestamptz_mi_interval overlaps generate_series
	concat concat_ws format quote_literal quote_nullable array_to_string string_to_table regexp_split_to_table
	to_json to_jsonb row_to_json array_to_json json_build_array json_build_object jsonb_build_array jsonb_build_object
	json_agg jsonb_agg json_object_agg jsonb_object_agg json_agg_strict jsonb_agg_strict json_object_agg_unique jsonb_object_agg_unique
	json_object_agg_strict jsonb_object_agg_strict json_object_agg_unique_strict jsonb_object_agg_unique_strict json_objectagg json_arrayagg
	json_populate_record json_populate_recordset jsonb_populate_record jsonb_populate_recordset json_to_record json_to_recordset
	jsonb_to_record jsonb_to_recordset json_array_elements jsonb_path_query_tz jsonb_path_exists_tz jsonb_path_match_tz
	jsonb_path_query_array_tz jsonb_path_query_first_tz json_exists json_query json_value json_scalar json_serialize json_table
	to_tsvector to_tsquery plainto_tsquery phraseto_tsquery websearch_to_tsquery ts_headline ts_rank ts_rank_cd get_current_ts_config
	array_agg string_agg xmlagg xmlconcat2 xml text length octet_length encode decode convert convert_to convert_from
	pg_typeof pg_column_size current_user session_user current_database current_schema version pg_backend_pid
	random random_normal gen_random_uuid uuidv4 uuidv7 unnest lower upper numeric float8 int4 int8 bool char bpchar varchar name bytea
	inet_client_addr inet_client_port pg_client_encoding merge_action row_number rank dense_rank percent_rank cume_dist ntile lag lead
	first_value last_value nth_value mode percentile_cont percentile_disc array_append array_prepend array_cat array_position array_positions
	array_remove array_replace width_bucket enum_first enum_last enum_range num_nulls num_nonnulls money cash_words`)
