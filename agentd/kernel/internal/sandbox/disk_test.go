package sandbox

import (
	"context"
	"testing"
)

func TestDiskLimit(t *testing.T) {
	spec := testSpec(t, `
import os, time
i = 0
while True:
    with open("file%d" % i, "wb") as f: f.write(os.urandom(1 << 20)); os.fsync(f.fileno())
    i += 1
    if i == 6: print("six", flush=True); time.sleep(2.5); print("still there", flush=True)`)
	spec.Limits.Disk = 8 << 20
	exit, out := run(t, spec)
	if exit.Reason != "killed: over its disk limit of 8 MiB" || out != "six\nstill there\n" {
		t.Errorf("got %+v: %s", exit, out)
	}
}

func TestOneFileStaysWithinTheDiskLimit(t *testing.T) {
	spec := testSpec(t, `
import os
try:
    with open("/tmp/big", "wb") as f:
        for i in range(100): f.write(bytes(1 << 20))
except OSError as e: print(e.strerror, os.path.getsize("/tmp/big"))`)
	spec.Limits.Disk = 4 << 20
	if exit, out := run(t, spec); out != "File too large 4194304\n" {
		t.Errorf("%s: %s", exit.Reason, out)
	}
}

func TestWhatCannotBeCountedIsOver(t *testing.T) {
	spec := testSpec(t, `
import os, time
for i in range(400):
    os.mkdir("d"); os.chdir("d")
time.sleep(1000)`)
	spec.Limits.Disk = 1 << 30
	s := start(t, spec)
	exit, err := s.Wait(context30(t))
	if err != nil || exit.Code != 137 || exit.Reason[:16] != "killed: more tha" {
		t.Errorf("got %+v, %v", exit, err)
	}
}

// Links lead nowhere, and what is linked twice counts twice.
func TestDiskUse(t *testing.T) {
	spec := testSpec(t, `
import os, time
os.symlink("/", "all"); os.symlink("/usr", "/tmp/usr")
os.makedirs("a/b/c")
open("a/b/c/file", "wb").write(bytes(1 << 20))
print("ready"); time.sleep(1000)`)
	s := start(t, spec)
	waitFor(t, "ready", logHas(spec, "ready"))
	used, err := s.DiskUse(context.Background())
	if err != nil || used < 1<<20 || used > 2<<20 {
		t.Errorf("%d bytes, %v", used, err)
	}
}
