// Package api is the public API of the control plane: Connect services over
// HTTP for everything that is small (api.proto), plain streaming HTTP for the
// rows of a statement, and the probes of an operator (/healthz, /readyz,
// /metrics).
//
// Every request but the probes carries an API token. The token's organization
// is the only one the caller sees: what belongs to another is NOT_FOUND. Which
// role a procedure needs stands in one table (roles.go); a procedure that is not
// in it is refused.
package api
