// Package hub holds the live tunnels: it decides what a host may ask for by what
// its certificate proves, serves LinkService to agents, keeps the newest tunnel
// of each, and gives the rest of the control plane a way to reach one.
//
// A tunnel without a certificate may only register, one with an expired
// certificate may only rejoin; both are closed soon. A member must say hello
// before anything else. Every request on a tunnel is authorised again, so that a
// revoked agent stops at once even if its tunnel were still there.
//
// All methods are safe for concurrent use.
package hub
