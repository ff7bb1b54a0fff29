// Package workspace serves workspaces: named file trees of an organization, for agents
// that mount them (AttachService, in the tunnel) and for users (FileService and plain
// HTTP). It has the rules: what an operation does, what a conflict is and where it is
// kept, what is charged to a quota, what goes to the trash. The tables are package
// store's, the contents package blob's.
//
// Every change of a node gets the workspace's next number (seq). All changes of a
// request are one transaction on the workspace, in which nobody else changes it.
//
// Memory: a request holds the nodes that it touches, at most 500 operations' worth, and at
// most a few MiB of contents; an agent has a bounded number of requests under way.
package workspace
