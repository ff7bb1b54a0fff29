// Package pgguard decides from a PostgreSQL parse tree, before anything of it
// reaches the database, whether a statement may run under a source's policy.
//
// [Check] walks the whole tree: a kind of node or of statement that is not known
// is refused ("not understood"), so that nothing new slips through. What the
// tree alone can't tell (which functions a name may mean, whether a relation is
// a view and what that calls) it asks a [Resolver], once, in one batch. Every
// path of statements uses it: single statements, sessions that stay, and
// PostgreSQL's own protocol.
//
// docs/sql.md tells users what is refused and why. Everything here is pure but
// for the Resolver, and safe for concurrent use.
package pgguard
