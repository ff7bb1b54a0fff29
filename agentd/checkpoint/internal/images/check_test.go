package images

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/creds"
	criu_core "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/mnt"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// write writes an image file with one entry.
func write(t *testing.T, path string, m proto.Message) {
	t.Helper()
	raw, err := (proto.MarshalOptions{AllowPartial: true}).Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	b := binary.LittleEndian.AppendUint32(make([]byte, magicLen), uint32(len(raw)))
	if err := os.WriteFile(path, append(b, raw...), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestCheck(t *testing.T) {
	filter, none := criu_core.SeccompMode_filter, criu_core.SeccompMode_disabled
	for _, test := range []struct {
		name   string
		change func(dir string, c *criu_core.CoreEntry, m *mnt.MntEntry)
		want   string // empty: it is a kernel
	}{
		{"a kernel", func(string, *criu_core.CoreEntry, *mnt.MntEntry) {}, ""},
		{"root", func(_ string, c *criu_core.CoreEntry, _ *mnt.MntEntry) { c.ThreadCore.Creds.Suid = proto.Uint32(0) }, "has user 0"},
		{"another group", func(_ string, c *criu_core.CoreEntry, _ *mnt.MntEntry) { c.ThreadCore.Creds.Groups = []uint32{7, 0} }, "has group 0"},
		{"capabilities", func(_ string, c *criu_core.CoreEntry, _ *mnt.MntEntry) { c.ThreadCore.Creds.CapPrm = []uint32{0, 1} }, "capabilities"},
		{"a bounding set", func(_ string, c *criu_core.CoreEntry, _ *mnt.MntEntry) { c.ThreadCore.Creds.CapBnd = []uint32{1 << 21} }, "capabilities"},
		{"ambient capabilities", func(_ string, c *criu_core.CoreEntry, _ *mnt.MntEntry) {
			k := c.ThreadCore.Creds.ProtoReflect()
			k.SetUnknown(protowire.AppendVarint(protowire.AppendTag(k.GetUnknown(), ambientCaps, protowire.VarintType), 1))
		}, "capabilities"},
		{"new privileges", func(_ string, c *criu_core.CoreEntry, _ *mnt.MntEntry) {
			c.ThreadCore.Creds.ProtoReflect().SetUnknown(nil)
		}, "may get privileges"},
		{"no filter", func(_ string, c *criu_core.CoreEntry, _ *mnt.MntEntry) { c.ThreadCore.SeccompMode = nil }, "no seccomp filter"},
		{"the filter off in a thread", func(_ string, c *criu_core.CoreEntry, _ *mnt.MntEntry) { c.Tc, c.ThreadCore.SeccompMode = nil, &none }, "no seccomp filter"},
		{"no credentials", func(_ string, c *criu_core.CoreEntry, _ *mnt.MntEntry) { c.ThreadCore.Creds = nil }, "no credentials"},
		{"the host's disk", func(_ string, _ *criu_core.CoreEntry, m *mnt.MntEntry) {
			m.Fstype, m.ExtKey = proto.Uint32(uint32(mnt.Fstype_AUTO)), nil
		}, "mount a file system"},
		{"a user namespace", func(dir string, _ *criu_core.CoreEntry, _ *mnt.MntEntry) {
			if err := os.WriteFile(filepath.Join(dir, "userns-9.img"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}, "user namespace"},
	} {
		t.Run(test.name, func(t *testing.T) {
			id := func() *uint32 { return proto.Uint32(7) }
			k := &creds.CredsEntry{Uid: id(), Gid: id(), Euid: id(), Egid: id(), Suid: id(), Sgid: id(), Fsuid: id(), Fsgid: id(), CapPrm: []uint32{0, 0}, CapBnd: []uint32{0, 0}}
			k.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, noNewPrivs, protowire.VarintType), 1))
			c := &criu_core.CoreEntry{Tc: &criu_core.TaskCoreEntry{}, ThreadCore: &criu_core.ThreadCoreEntry{Creds: k, SeccompMode: &filter}}
			m := &mnt.MntEntry{Fstype: proto.Uint32(uint32(mnt.Fstype_UNSUPPORTED)), ExtKey: proto.String("host-usr"), Mountpoint: proto.String("/usr")}
			dir := t.TempDir()
			test.change(dir, c, m)
			write(t, filepath.Join(dir, "core-1.img"), c)
			write(t, filepath.Join(dir, "mountpoints-2.img"), m)
			err := Check(dir, Owners{7, 7})
			if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("got %v, want %q", err, test.want)
			}
		})
	}
	if err := Check(t.TempDir(), Owners{7, 7}); err == nil {
		t.Error("a directory without a process is taken for a kernel")
	}
}
