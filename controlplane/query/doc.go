// Package query runs statements on agents for whoever is allowed to ask: it
// finds the agent, sends the statement down its tunnel, hands the rows on as
// they come, and leaves one history entry and one audit entry however it ends.
// The API comes through here.
//
// A Result must be finished, always: Finish releases the stream and writes the
// entries. Rows are never kept: back-pressure reaches from the reader of
// Result.Body through the tunnel to the database.
//
// Statements of PostgreSQL clients don't come through a Runner: their hosts tell of
// them, and a Journal keeps history and audit of that, in batches.
package query
