// Package checkpoint saves kernels and brings them back: dump, restore, rollback and
// fork of a kernel's process tree by CRIU.
//
// CRIU itself is driven by internal/criu, in helper processes of this same program
// (agentd main calls [HelperMain] for them). docs/kernels.md describes
// what an operator and a user see.
//
// Only agentd's main package imports it, and wires it with package kernel.
package checkpoint
