package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/postern-dev/postern/agentd/atomicfile"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"

	"github.com/postern-dev/postern/proto/auditchain"
)

// peerFile keeps the newest head of the organization's chain that the control plane told, in the state
// directory; the audit log has all of them.
const peerFile = "audit-peer.json"

type peerHead struct {
	Organization string `json:"organization"`
	Sequence     uint64 `json:"sequence"`
	Hash         []byte `json:"hash"`
}

// notePeer keeps the head of the organization's chain at the control plane in this host's own chain, once for
// each. It says what is wrong with it, as far as this host can tell; "" if nothing.
func (d *Daemon) notePeer(told *posternv1.AuditHead) string {
	head, err := auditchain.HeadFromProto(told)
	if err != nil || head.Sequence == 0 {
		return "" // of a version before
	}
	path := filepath.Join(d.state, peerFile)
	organization := d.identity.Agent().Organization
	var last peerHead
	if raw, err := os.ReadFile(path); err == nil {
		if err := json.Unmarshal(raw, &last); err != nil || last.Organization != organization {
			last = peerHead{}
		}
	}
	var known auditchain.Head
	known.Sequence = last.Sequence
	copy(known.Hash[:], last.Hash)
	if known == head {
		return ""
	}
	wrong := ""
	switch {
	case head.Sequence < known.Sequence:
		wrong = fmt.Sprintf("the control plane's audit log ends at entry %d, but had reached %d when it was last told to this host: entries were removed, or it was restored from a backup", head.Sequence, known.Sequence)
	case head.Sequence == known.Sequence:
		wrong = fmt.Sprintf("entry %d of the control plane's audit log is not the one that it told this host before: the log was rewritten", head.Sequence)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	entry := auditchain.Entry{
		Action: auditchain.PeerAction, Actor: "control plane", Organization: organization, Agent: d.identity.Agent().Name,
		Target: auditchain.PeerTarget(head), Outcome: "done",
	}
	if wrong != "" {
		entry.Outcome, entry.Error = "failed", wrong
	}
	if err := d.log.Append(ctx, entry); err != nil {
		d.logger.Error("head of the control plane's audit log not kept", "err", err)
		return wrong // it is tried again at the next hello
	}
	raw, err := json.Marshal(peerHead{organization, head.Sequence, head.Hash[:]})
	if err == nil {
		err = atomicfile.FS{}.Write(path, raw, 0o600)
	}
	if err != nil {
		d.logger.Error("head of the control plane's audit log not kept", "err", err)
	}
	return wrong
}
