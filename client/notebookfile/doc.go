// Package notebookfile reads and replaces notebook files, and keeps the kernel of a
// session (package proto/notebook) in step with a file that is edited.
//
// A file is replaced as a whole, durably, and only if it still is what was read: what
// an editor saves meanwhile is never overwritten.
package notebookfile
