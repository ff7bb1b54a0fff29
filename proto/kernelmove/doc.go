// Package kernelmove carries a kernel from one host to another through the control plane,
// which passes bytes on and can't read them: see MoveHostService for the steps around it.
//
//	host A                        control plane                        host B
//	export ◀── POST, Upgrade ─────              ───── POST, Upgrade ──▶ import
//	hello, cargo ───────────────▶ copies at the pace of the slower ───▶
//	                              ◀─────────────────────────────────── result
//
// What A sends is of package agentd/checkpoint/internal/convoy, which only hosts know. B
// answers with one frame when it has everything, or refuses: 4 bytes of length
// (big-endian, at most MaxResult) and an ErrorDetail as JSON, {} for success. A stream
// that ends without it was lost.
//
// Anyone may import this package.
package kernelmove
