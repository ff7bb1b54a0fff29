package workspace

import (
	"errors"

	"github.com/postern-dev/postern/proto"
)

// errQuota says that something does not fit into the workspace's quota.
var errQuota = errors.New("over quota")

// keptTimes bounds what is kept of a workspace, with old versions, trash and snapshots, as a
// multiple of its quota for what is there now.
const keptTimes = 4

// keep refuses a new content where too much is kept already. What is kept is never thrown away
// early for it: whoever can write could destroy the history so.
func (t *tree) keep(stored uint64) error {
	if quota := t.ws.QuotaBytes; quota > 0 && stored > 0 && (t.ws.KeptBytes+stored)/keptTimes > quota {
		t.full = keptBytesFull
		return errQuota
	}
	return t.mayKeep(1)
}

// charge counts nodes and bytes that come, or go if negative; over is set to let them
// come though they don't fit.
func (t *tree) charge(nodes, bytes int64, over bool) error {
	add := func(have uint64, n int64) uint64 {
		if n < 0 && uint64(-n) > have {
			return 0
		}
		return have + uint64(n)
	}
	moreNodes, moreBytes := add(t.ws.Nodes, nodes), add(t.ws.UsedBytes, bytes)
	if !over && (nodes > 0 && t.ws.QuotaNodes > 0 && moreNodes > t.ws.QuotaNodes || bytes > 0 && t.ws.QuotaBytes > 0 && moreBytes > t.ws.QuotaBytes) {
		t.full = quotaFull
		return errQuota
	}
	if !over && nodes > 0 {
		if err := t.mayAdd(uint64(nodes)); err != nil {
			return err
		}
	}
	t.ws.Nodes, t.ws.UsedBytes = moreNodes, moreBytes
	return nil
}

// quotaError is errQuota for people.
func (t *tree) quotaError() error {
	switch t.full {
	case keptRowsFull, organizationFull, organizationRowsFull:
		return t.rowsError()
	case keptBytesFull:
		return proto.Errorf(proto.CodeStorageFull, "workspace %s is full: old versions and trash have %d bytes, %d times its quota: have an operator empty the trash, keep fewer versions, or raise the quota",
			t.ws.Name, t.ws.KeptBytes, keptTimes)
	}
	return proto.Errorf(proto.CodeStorageFull, "workspace %s is full (%d bytes of %d, %d files and directories of %d): remove something, or have an operator raise its quota",
		t.ws.Name, t.ws.UsedBytes, t.ws.QuotaBytes, t.ws.Nodes, t.ws.QuotaNodes)
}
