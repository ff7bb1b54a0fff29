// Package storetest opens throwaway metadata stores for tests, one per engine.
// Tests of any control plane package may import it. It stands here and not
// beside the store because it starts PostgreSQL.
package storetest
