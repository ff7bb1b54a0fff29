package mysqlguard

import (
	"maps"
	"slices"
)

// Harmless are the names of the functions that may be called, sorted, for tests of what
// the server does with them.
func Harmless() []string { return slices.Sorted(maps.Keys(harmless)) }

// keywords are words before a parenthesis that call nothing.
var keywords = set(`select from where on and or xor not in exists any some all as using join union except intersect minus distinct
 distinctrow having by values value row over partition when then else case between like rlike regexp div mod interval straight_join lateral
 index key keys columns column path against window with recursive limit offset return end
 binary character char varchar nchar decimal dec numeric fixed float double real datetime timestamp time year signed unsigned integer int
 bit varbinary national array of is escape separator order group default rows range groups filter`)

// softKeywords are those of them that some versions do not know: there a stored
// function may have the name.
var softKeywords = set("filter groups path columns offset escape end return against lateral except intersect minus fixed over window of")

// harmless are functions of the server's own that change nothing that a later
// session could see, read no file and wait for nobody. Names that only one of MySQL
// and MariaDB has are safe on the other as long as it has no stored function of that
// name: the caller looks. The families st_, mbr and json_ are harmless as a whole.
// Not here: get_lock and release_lock, load_file, benchmark, master_pos_wait and its
// like, uuid_short, nextval, lastval, setval, last_insert_id with an argument, des_*,
// sys_*, name_const, gtid_*.
var harmless = set(`
 abs acos asin atan atan2 ceil ceiling conv cos cot crc32 crc32c degrees exp floor ln log log10 log2 mod pi pow power radians rand round
 sign sin sqrt tan truncate greatest least interval isnull if ifnull nullif coalesce nvl nvl2 decode_oracle
 ascii bin bit_count bit_length char char_length character_length chr concat concat_ws elt export_set field find_in_set format
 from_base64 hex insert instr lcase left length lengthb locate lower lpad ltrim make_set mid natural_sort_key oct octet_length ord position
 quote regexp_instr regexp_like regexp_replace regexp_substr repeat replace reverse right rpad rtrim sformat soundex space strcmp substr
 substring substring_index to_base64 to_char trim ucase unhex upper weight_string
 adddate addtime add_months convert_tz curdate current_date current_time current_timestamp curtime date date_add date_format date_sub
 datediff day dayname dayofmonth dayofweek dayofyear extract from_days from_unixtime get_format hour last_day localtime localtimestamp
 makedate maketime microsecond minute month monthname now period_add period_diff quarter sec_to_time second str_to_date subdate subtime
 sysdate time time_format time_to_sec timediff timestamp timestampadd timestampdiff to_days to_number to_seconds unix_timestamp utc_date
 utc_time utc_timestamp week weekday weekofyear year yearweek
 cast convert binary
 aes_decrypt aes_encrypt compress decode encode encrypt kdf md5 random_bytes sha sha1 sha2 uncompress uncompressed_length password
 old_password validate_password_strength statement_digest statement_digest_text
 connection_id current_role current_user database schema session_user system_user user version charset coercibility collation found_rows
 row_count icu_version
 inet_aton inet_ntoa inet6_aton inet6_ntoa is_ipv4 is_ipv4_compat is_ipv4_mapped is_ipv6
 is_uuid uuid uuid_to_bin bin_to_uuid sys_guid uuid_v4 uuid_v7
 any_value grouping
 avg bit_and bit_or bit_xor count group_concat max median min percentile_cont percentile_disc std stddev stddev_pop stddev_samp sum
 var_pop var_samp variance
 cume_dist dense_rank first_value lag last_value lead nth_value ntile percent_rank rank row_number
 column_add column_check column_create column_delete column_exists column_get column_json column_list
 extractvalue updatexml member match
 asbinary astext aswkb aswkt centroid area envelope equals contains crosses disjoint intersects overlaps touches within x y
 dimension distance_sphere endpoint exteriorring geomcollfromtext geomcollfromwkb geometrycollection geometryfromtext geometryfromwkb
 geometryn geometrytype geomfromtext geomfromwkb glength interiorringn isclosed isempty isring issimple linefromtext linefromwkb linestring
 linestringfromtext linestringfromwkb mlinefromtext mlinefromwkb mpointfromtext mpointfromwkb mpolyfromtext mpolyfromwkb multilinestring
 multipoint multipolygon numgeometries numinteriorrings numpoints point pointfromtext pointfromwkb pointn pointonsurface polyfromtext
 polyfromwkb polygon polygonfromtext polygonfromwkb srid startpoint buffer boundary
 vec_distance vec_distance_euclidean vec_distance_cosine vec_fromtext vec_totext vector_dim string_to_vector vector_to_string to_vector from_vector
 sleep is_free_lock is_used_lock ps_current_thread_id ps_thread_id format_bytes format_pico_time
 seq nested ordinality
`)
