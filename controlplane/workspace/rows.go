package workspace

import "github.com/postern-dev/postern/proto"

// minKeptRows is what every workspace may keep, in rows, however small its quota of nodes is:
// a hundred versions of each of its files should not be too many.
const minKeptRows = 10_000

// fullness is what a change does not fit into.
type fullness int

const (
	// quotaFull: the workspace's quota, of bytes or nodes.
	quotaFull fullness = iota
	// keptBytesFull: the bytes that are kept, keptTimes the quota.
	keptBytesFull
	// keptRowsFull: the rows that are kept, keptTimes the quota of nodes or minKeptRows.
	keptRowsFull
	// organizationFull: the nodes of all workspaces of the organization.
	organizationFull
	// organizationRowsFull: the rows that are kept of them.
	organizationRowsFull
)

// siblings are the organization's other workspaces.
type siblings struct{ nodes, rows uint64 }

// others counts them, once in a transaction.
func (t *tree) others() (*siblings, error) {
	if t.siblings == nil {
		nodes, rows, err := t.tx.Siblings(t.ctx)
		if err != nil {
			return nil, err
		}
		t.siblings = &siblings{nodes, rows}
	}
	return t.siblings, nil
}

// fewerRows counts a row that is gone.
func (t *tree) fewerRows() { t.ws.KeptRows -= min(1, t.ws.KeptRows) }

// mayKeep refuses rows that come, of nodes, versions or snapshots, where too many are kept.
// As with bytes, nothing of the history goes for them.
func (t *tree) mayKeep(rows uint64) error {
	have := t.ws.KeptRows + rows
	if quota := t.ws.QuotaNodes; quota > 0 && have > minKeptRows && (have-1)/keptTimes >= quota {
		t.full = keptRowsFull
		return errQuota
	}
	if t.organization == 0 {
		return nil
	}
	others, err := t.others()
	if err != nil {
		return err
	}
	if have += others.rows; have > minKeptRows && (have-1)/keptTimes >= t.organization {
		t.full = organizationRowsFull
		return errQuota
	}
	return nil
}

// mayAdd refuses nodes that come where the organization has too many, or too many rows are
// kept; with 0, where that is so already.
func (t *tree) mayAdd(nodes uint64) error {
	if t.organization > 0 {
		others, err := t.others()
		if err != nil {
			return err
		}
		if t.ws.Nodes+nodes+others.nodes > t.organization {
			t.full = organizationFull
			return errQuota
		}
	}
	return t.mayKeep(nodes)
}

// rowsError is errQuota for people, where rows are what is full.
func (t *tree) rowsError() error {
	switch t.full {
	case organizationFull:
		return proto.Errorf(proto.CodeStorageFull, "the organization has %d files and directories of %d: remove something, or have the control plane's --organization-files raised",
			t.ws.Nodes+t.siblings.nodes, t.organization)
	case organizationRowsFull:
		return proto.Errorf(proto.CodeStorageFull, "the organization's files, old versions and trash have %d rows, %d times its %d files: have an operator empty the trash, keep fewer versions, or raise --organization-files",
			t.ws.KeptRows+t.siblings.rows, keptTimes, t.organization)
	default:
		return proto.Errorf(proto.CodeStorageFull, "workspace %s is full: its files, old versions and trash have %d rows, %d times its quota of %d files and directories: have an operator empty the trash, keep fewer versions, or raise the quota",
			t.ws.Name, t.ws.KeptRows, keptTimes, t.ws.QuotaNodes)
	}
}
