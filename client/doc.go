// Package client is the Go client of the control plane's public API, the one
// that the postern command uses.
//
//	c, err := client.New(client.Config{URL: "https://cp.example.com", Token: client.StaticToken(token)})
//	agents, err := c.Agents.ListAgents(ctx, connect.NewRequest(&posternv1.ListAgentsRequest{}))
//	rows, err := c.SQL(ctx, "edge-1", "warehouse", &posternv1.RunSQLRequest{Sql: "select 1"})
//
// A Client is safe for concurrent use and keeps connections open between calls;
// Close ends them. Calls that only read are sent once more if a kept connection
// turns out dead; a statement is never sent twice. The token goes to the URL's
// own host alone: a redirect is an error that names the new address.
//
// Errors of the server are *proto.Error with a code (see proto.CodeOf and
// proto.ExitCode), after proto.FromConnect for the Connect services; what goes
// wrong on the way there is one with code UNAVAILABLE and a line that says where.
//
// The package also keeps what `postern login` stores: see Credentials.
package client
