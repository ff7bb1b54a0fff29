// Package images reads and rewrites CRIU's image directories between a dump and a
// restore: a fork, and a kernel that moved, run as another user than the one whose
// memory was saved, and a rollback is refused before it begins if files that were open
// have changed.
//
// An image file is 8 bytes of magic and then entries: a little-endian uint32 size and a
// protobuf message of CRIU's (its images/*.proto; package crit of go-criu has them).
// Fields that a newer CRIU added travel as they are.
//
// Only agentd/checkpoint imports it. The images were authenticated by the store, or just
// written by CRIU; still every length is bounded.
package images
