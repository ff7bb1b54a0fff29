// Package auditchain is the hash chain of the audit logs that agent and control
// plane each keep. An entry is one line of canonical JSON:
//
//	{"sequence":1,"time":"2026-11-22T00:00:00.000Z",…,"prev":"<hex>","hash":"<hex>"}
//
// hash is SHA-256 over the 32 bytes of prev followed by the entry's own line with
// an empty hash; prev is the hash of the entry before, 32 zero bytes for the
// first. Removing, altering or reordering an entry breaks the chain at that
// place; cutting its end shows only against a head that somebody else holds,
// which is why the two sides exchange heads. Its beginning may be dropped if an entry of
// the chain stands for it (RetireAction); KeptVerifier verifies such a chain. The package does no
// I/O; a Verifier is for one goroutine.
package auditchain
