// Package simulatedvault answers as a HashiCorp Vault does, as far as agentd
// asks: the KV v2 engine, AppRole, tokens that end, and the database engine with
// leases, whose users it really makes and drops. It is a simulation for tests:
// `make vault-test` runs the same tests against a real Vault.
package simulatedvault
