// Package mountd is the process that serves all mounts of a host: `agentd mountd`, started
// and watched by the keeper (package fdkeeper). agentd's restart and upgrade do not touch
// it; its own crash, hang or upgrade is taken over in place by its successor.
//
// Words: a workspace is opened once (Open in Config, the replica of package replica). It
// is mounted as at most two superblocks: a squashed one for kernels, where every caller
// counts as the owner of everything, and one for the host itself with POSIX owners and
// permissions. A holder is whoever asked for a mount: "host:/srv/data" or "kernel:ID".
// A superblock lives while it has holders; the workspace stays open until what it has not
// sent is sent. Holders live in the keeper's blob, so they outlive this process, like the
// mounts themselves.
//
// mountd asks agentd for what the control plane has, through a unix socket; it has no
// identity and no network of its own. What may be mounted is decided by agentd and, with
// the same configuration file, again here.
package mountd
