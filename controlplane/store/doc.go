// Package store keeps the control plane's metadata: organizations, API tokens,
// registration keys, agents and their certificates, authorities, the history of
// queries, and the audit chains.
//
// It has two engines with one behaviour: SQLite (one file, WAL, every
// acknowledged write synced, one writer) and PostgreSQL. Several control planes
// may share one PostgreSQL; migrations then run once.
//
// Methods speak proto messages and standard-library types, so capability
// packages can declare the few methods they need as interfaces of their own and
// never import this package; controlplane/main.go wires them. Times come from
// the caller and are kept in UTC with milliseconds. Every look-up on behalf of a
// tenant names the organization's id, and what belongs to another is NOT_FOUND.
//
// Errors are *proto.Error where a caller can act on them: NOT_FOUND,
// ALREADY_EXISTS, INVALID, STORAGE_FULL, UNAVAILABLE and the KEY_ codes;
// everything else is a fault of ours (INTERNAL). All methods may be called
// concurrently. No secret is stored in the clear: tokens and keys as SHA-256,
// the CA's private key sealed by package pki.
package store
