// Package kernelmove carries a kernel from one host to another through the control plane,
// which passes bytes on and can't read them: see MoveHostService for the steps around it.
//
//	host A                        control plane                        host B
//	export ◀── POST, Upgrade ─────              ───── POST, Upgrade ──▶ import
//	hello, cargo ───────────────▶ copies at the pace of the slower ───▶
//	answers ◀────────────────────                ◀──────────────────── answers, result
//
// What A sends, and B's answers to it, are of package agentd/checkpoint/internal/convoy,
// which only hosts know. B sends frames: a letter, 4 bytes of length (big-endian), bytes.
//
//	'A'  for A, to be passed on; at most MaxAnswer
//	'R'  when B has everything, or refuses: an ErrorDetail as JSON, {} for success; at
//	     most MaxResult. It is the last one
//
// A stream that ends without a result was lost.
//
// Anyone may import this package.
package kernelmove
