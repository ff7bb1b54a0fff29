// Package dav serves workspaces by WebDAV (RFC 4918, classes 1 and 2), so that desktops
// and programs can mount them: /dav/ lists the caller's workspaces, /dav/NAME/ is one of them.
//
// The protocol itself is golang.org/x/net/webdav's. This package knows who asks (an API token, as
// password or bearer), turns its file system's calls into those of Files, and puts bounds around it: no listing of
// whole trees, directories of at most MaxEntries names, at most MaxLocks locks of an organization, which
// end after LockTime. Locks are kept in memory, by each control plane for itself: they keep clients of WebDAV from
// each other's way, and no one else from writing. Properties of clients' own are an extended attribute of
// their file. A file appears or is replaced when all of it has come; what
// is cut off leaves nothing.
//
// It keeps no goroutines but one for each PUT, which ends with it. All methods may be
// called concurrently.
package dav
