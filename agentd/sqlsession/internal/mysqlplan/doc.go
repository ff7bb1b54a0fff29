// Package mysqlplan decides what of a plan of MySQL or MariaDB may be told: EXPLAIN
// FORMAT=JSON, whose members differ by product and version. [Structure] keeps those
// that are known to hold no part of a condition or expression; a member that a later
// version brings is left out.
//
// It knows no connection. Only agentd's SQL session process imports it. Its functions
// are safe for concurrent use.
package mysqlplan
