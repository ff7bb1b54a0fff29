// Package snapshot copies a kernel's private directory at the moment at which its
// memory is saved: CRIU takes memory, not files.
//
// A copy is made in two passes. The first runs beside the kernel and copies everything;
// the second runs while the kernel stands still and copies only what changed since, so
// that the standstill grows with the changes and not with the directory. Contents are
// shared with the original where the file system can (FICLONE), copied elsewhere.
//
// The directory belongs to a hostile user who changes it meanwhile: no symbolic link is
// followed, nothing outside is reached, special files are not opened, and the number of
// entries and of bytes is bounded.
//
// Only agentd/checkpoint's helper process imports it. A Copy is used by one goroutine.
package snapshot
