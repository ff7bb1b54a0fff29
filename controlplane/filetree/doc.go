// Package filetree holds the words that the metadata store and package workspace
// share about named file trees: rows, and what a transaction on them can do. It has
// no rules and no I/O; controlplane/workspace has the rules, controlplane/store the
// tables.
//
// A workspace's nodes are numbered. Number 1 is its root, number 2 a directory that
// nobody sees: the trash, whose entries are named by decimal numbers. Numbers up to
// LastReserved are never given to files.
package filetree
