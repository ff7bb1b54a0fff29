// Package audit writes and verifies the organizations' hash-chained logs, one
// chain for each organization; what concerns the installation as a whole is in
// the default organization's. Package proto/auditchain has the entries' form.
//
// An entry is on the disk when Append returns. Entries that arrive while others
// are being written go to the disk together. Several control planes may write one
// chain: who finds that the chain has moved on seals its entries anew. All
// methods may be called concurrently. Retire drops old entries; one of the chain's own
// then stands for them.
package audit
