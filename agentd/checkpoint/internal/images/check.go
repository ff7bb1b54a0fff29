package images

import (
	"fmt"
	"path/filepath"

	criu_core "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/mnt"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// innerTypes are the file systems that a kernel's tree has of its own.
var innerTypes = map[mnt.Fstype]bool{
	mnt.Fstype_PROC: true, mnt.Fstype_TMPFS: true, mnt.Fstype_DEVPTS: true, mnt.Fstype_MQUEUE: true,
}

// Check refuses images of another host that would be restored as more than a kernel: with
// another user than owner, with capabilities, without a seccomp filter, with a user
// namespace, or with a file system of their own. CRIU does as root what images say.
// It is a second wall: images come from an authenticated host.
func Check(dir string, owner Owners) error {
	paths, err := filepath.Glob(filepath.Join(dir, "core-*.img"))
	if err != nil {
		return err
	}
	if len(paths) == 0 {
		return fmt.Errorf("there is no process in them")
	}
	for _, path := range paths {
		var wrong error
		_, _, err := each(path, func() proto.Message { return new(criu_core.CoreEntry) }, 0, func(m proto.Message) bool {
			if wrong == nil {
				wrong = checkCore(m.(*criu_core.CoreEntry), owner)
			}
			return false
		})
		if err == nil {
			err = wrong
		}
		if err != nil {
			return fmt.Errorf("%s: %w", filepath.Base(path), err)
		}
	}
	if found, _ := filepath.Glob(filepath.Join(dir, "userns-*.img")); len(found) > 0 {
		return fmt.Errorf("they have a user namespace")
	}
	paths, err = filepath.Glob(filepath.Join(dir, "mountpoints-*.img"))
	if err != nil {
		return err
	}
	for _, path := range paths {
		var wrong error
		_, _, err := each(path, func() proto.Message { return new(mnt.MntEntry) }, 0, func(m proto.Message) bool {
			e := m.(*mnt.MntEntry)
			if e.GetExtKey() == "" && !innerTypes[mnt.Fstype(e.GetFstype())] && wrong == nil {
				wrong = fmt.Errorf("they mount a file system of type %s at %.100q", mnt.Fstype(e.GetFstype()), printable(e.GetMountpoint()))
			}
			return false
		})
		if err == nil {
			err = wrong
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// noNewPrivs and ambientCaps are fields of CRIU's creds_entry (images/creds.proto of CRIU
// 4.1).
const (
	noNewPrivs  = 18
	ambientCaps = 19
)

func checkCore(c *criu_core.CoreEntry, owner Owners) error {
	t := c.GetThreadCore()
	if t == nil || t.Creds == nil {
		if c.GetTc() == nil && t == nil {
			return nil // a process that ended, and waits to be reaped
		}
		return fmt.Errorf("a thread has no credentials")
	}
	k := t.Creds
	for _, uid := range []uint32{k.GetUid(), k.GetEuid(), k.GetSuid(), k.GetFsuid()} {
		if uid != owner.UID {
			return fmt.Errorf("a thread has user %d, and the kernel's is %d", uid, owner.UID)
		}
	}
	for _, gid := range append([]uint32{k.GetGid(), k.GetEgid(), k.GetSgid(), k.GetFsgid()}, k.Groups...) {
		if gid != owner.GID {
			return fmt.Errorf("a thread has group %d, and the kernel's is %d", gid, owner.GID)
		}
	}
	for _, set := range [][]uint32{k.CapInh, k.CapPrm, k.CapEff, k.CapBnd} {
		for _, bits := range set {
			if bits != 0 {
				return fmt.Errorf("a thread has capabilities")
			}
		}
	}
	// Fields that package crit does not know yet.
	noNewPrivileges := false
	for b := k.ProtoReflect().GetUnknown(); len(b) > 0; {
		field, kind, n := protowire.ConsumeTag(b)
		size := protowire.ConsumeFieldValue(field, kind, b[max(n, 0):])
		if n < 0 || size < 0 {
			return fmt.Errorf("a thread's credentials are malformed")
		}
		value := b[n : n+size]
		b = b[n+size:]
		v, _ := protowire.ConsumeVarint(value)
		switch {
		case field == noNewPrivs && kind == protowire.VarintType:
			noNewPrivileges = v == 1
		case field == ambientCaps && (kind != protowire.VarintType || v != 0):
			return fmt.Errorf("a thread has capabilities")
		}
	}
	if !noNewPrivileges {
		return fmt.Errorf("a thread may get privileges")
	}
	// CRIU gives the other threads of a process what its first one has.
	if leader := c.GetTc() != nil; (leader || t.SeccompMode != nil) && t.GetSeccompMode() != criu_core.SeccompMode_filter {
		return fmt.Errorf("a process has no seccomp filter")
	}
	return nil
}
