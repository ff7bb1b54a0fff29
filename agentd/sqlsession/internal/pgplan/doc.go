// Package pgplan holds what a PostgreSQL source may be asked for a plan, and what
// of the plan may be told.
//
// [Read] walks a statement's parse tree and names every function and operator that
// planning it could call, as the planner runs functions on constants: who has the
// names asks the server what they are. [Structure] makes of the server's plan one
// without literals and with numbers rounded, or without any.
//
// It knows no connection. Only agentd's SQL session process imports it. Its
// functions are safe for concurrent use.
package pgplan
