// Package tree is what a replica knows of its workspace: nodes, the names in
// directories, and the operations that the control plane has not yet confirmed.
//
// A State changes only by records, each a few bytes that say what is so from now on:
// "node 7 is ...", "in directory 1, a is node 7", "operation 12 is queued". Changing
// calls of a Batch apply a record and add it to the batch, whose bytes are one entry of the journal;
// Apply does the same from the journal. So a replica that reads its journal again is
// what it was, and applying a record twice is harmless.
//
// A node costs about 300 bytes of memory with its name. Nothing here locks: the
// replica does. Only packages below agentd/attach import this one.
package tree
