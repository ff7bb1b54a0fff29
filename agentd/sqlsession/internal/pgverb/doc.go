// Package pgverb reads the statements of PostgreSQL that make sense only in a
// session that stays: transaction control, settings, prepared statements and
// cursors. Their grammar is small enough to be read by tokens alone, strictly:
// what has not exactly one of the forms known here is refused. Those that carry no
// query are written anew from what was read, so that nothing of the user's own text
// reaches the server.
//
// It holds the rules that sessions and PostgreSQL's own protocol share: which
// settings may be set, and how transactions of a read-only source begin. It knows
// no connection and judges no query: the query within PREPARE and DECLARE is handed
// back for that. Only agentd's SQL session process imports it. Its functions are
// safe for concurrent use.
package pgverb
