package fusefs

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// long: POSTERN_LONG=1 runs suites whole.
var long = os.Getenv("POSTERN_LONG") == "1"

// amount is how much of something a test does: few, or, at full length, many.
func amount(few, many int) int {
	if long {
		return many
	}
	return few
}

// suite mounts a workspace for a program that takes a while.
func suite(t *testing.T) (*world, *mounted) {
	t.Helper()
	w := newWorld(t)
	m := w.mount(serving{})
	m.watchdog()
	return w, m
}

// same wants two trees to be the same, by diff(1).
func same(t *testing.T, a, b string) {
	t.Helper()
	if out, err := exec.Command("diff", "-r", "--no-dereference", a, b).CombinedOutput(); err != nil {
		t.Errorf("diff -r %s %s: %v: %.2000s", a, b, err, out)
	}
}

// TestUnzip unpacks many small files, here and natively, and compares; on another host, too.
func TestUnzip(t *testing.T) {
	files := "2000"
	if long {
		files = "50000"
	}
	w, m := suite(t)
	dir := t.TempDir()
	archive := filepath.Join(dir, "many.zip")
	run(t, dir, "/usr/bin/python3", "-c", `
import random, sys, zipfile
random.seed(7)
with zipfile.ZipFile(sys.argv[1], "w", zipfile.ZIP_DEFLATED) as z:
    for i in range(int(sys.argv[2])):
        z.writestr("d%d/e%d/file %d.txt" % (i % 50, i % 7, i), ("%d " % i) * random.choice((0, 1, 10, 300, 1500)))
`, archive, files)
	native := filepath.Join(dir, "native")
	here := filepath.Join(m.path, "unzipped")
	if err := errors.Join(os.Mkdir(native, 0o755), os.Mkdir(here, 0o755)); err != nil {
		t.Fatal(err)
	}
	run(t, native, "unzip", "-q", archive)
	began := time.Now()
	run(t, here, "unzip", "-q", archive)
	t.Logf("%s files in %v", files, time.Since(began))
	same(t, native, here)
	drained(t, m)
	same(t, native, filepath.Join(w.mount(serving{}).path, "unzipped"))
	if got := strings.TrimSpace(run(t, here, "sh", "-c", "find . -type f | wc -l")); got != files {
		t.Errorf("find sees %s files of %s", got, files)
	}
	run(t, m.path, "rm", "-r", "unzipped")
	if left, err := os.ReadDir(m.path); err != nil || len(left) > 0 {
		t.Errorf("after rm -r: %v, %v", left, err)
	}
}

// TestTar packs and unpacks a source tree, with modes and times: a part of Go's library, or the whole of Linux.
func TestTar(t *testing.T) {
	w, m := suite(t)
	pack := filepath.Join(t.TempDir(), "source.tar")
	if long {
		linux, err := filepath.Glob("../../../bin/linux-source/usr/src/linux-source-*.tar.xz")
		if err != nil || len(linux) != 1 {
			t.Fatalf("found %v, want one source of Linux: run packaging/dev/deps.sh linuxsource", linux)
		}
		run(t, ".", "sh", "-c", `xz -dc "$0" >"$1"`, linux[0], pack)
	} else {
		run(t, filepath.Join(strings.TrimSpace(run(t, t.TempDir(), "go", "env", "GOROOT")), "src"), "tar", "cf", pack, "net")
	}
	here, native := filepath.Join(m.path, "src"), filepath.Join(t.TempDir(), "native")
	if err := errors.Join(os.Mkdir(here, 0o755), os.Mkdir(native, 0o755)); err != nil {
		t.Fatal(err)
	}
	run(t, native, "tar", "xf", pack)
	began := time.Now()
	run(t, here, "tar", "xf", pack)
	t.Logf("%s files unpacked in %v", strings.TrimSpace(run(t, native, "sh", "-c", "find . | wc -l")), time.Since(began))
	// tar itself compares content, mode, owner and time of each.
	run(t, here, "tar", "df", pack)
	same(t, native, here)
	drained(t, m)
	other := filepath.Join(w.mount(serving{}).path, "src")
	run(t, other, "tar", "df", pack)
	again := filepath.Join(t.TempDir(), "again.tar")
	run(t, other, "tar", "cf", again, ".")
	run(t, native, "tar", "df", again)
}

// TestPandas works on files as notebooks do: CSV whole and in pieces, appended to, pickles, arrays that are
// mapped, for reading and for writing.
func TestPandas(t *testing.T) {
	rows := 20_000
	if long {
		rows = 2_000_000
	}
	w, m := suite(t)
	run(t, m.path, "/usr/bin/python3", "-c", `
import sys, numpy as np, pandas as pd
n = int(sys.argv[1])
rng = np.random.default_rng(1)
df = pd.DataFrame({"id": np.arange(n), "x": rng.normal(size=n).round(6), "name": [f"row {i % 977} é" for i in range(n)],
                   "at": pd.date_range("2026-01-01", periods=n, freq="s")})
df.to_csv("a.csv", index=False)
read = lambda f: pd.read_csv(f, parse_dates=["at"])
pd.testing.assert_frame_equal(read("a.csv"), df)
parts = list(pd.read_csv("a.csv", parse_dates=["at"], chunksize=n // 7))
pd.testing.assert_frame_equal(pd.concat(parts), df)
df.to_csv("a.csv", index=False, header=False, mode="a")
pd.testing.assert_frame_equal(read("a.csv"), pd.concat([df, df], ignore_index=True))
df.to_csv("a.csv.gz", index=False)
pd.testing.assert_frame_equal(read("a.csv.gz"), df)
df.to_pickle("a.pickle")
pd.testing.assert_frame_equal(pd.read_pickle("a.pickle"), df)
np.save("x.npy", df.x.to_numpy())
x = np.load("x.npy", mmap_mode="r+")
assert (x == df.x).all()
x[: n // 2] = 7
x.flush()
del x
assert (np.load("x.npy")[: n // 2] == 7).all()
big = np.memmap("map.bin", dtype=np.int64, mode="w+", shape=(n,))
big[:] = np.arange(n) * 3
big.flush()
del big
assert (np.fromfile("map.bin", dtype=np.int64) == np.arange(n) * 3).all()
`, strconv.Itoa(rows))
	drained(t, m)
	run(t, w.mount(serving{}).path, "/usr/bin/python3", "-c", `
import sys, numpy as np, pandas as pd
n = int(sys.argv[1])
df = pd.read_pickle("a.pickle")
pd.testing.assert_frame_equal(pd.read_csv("a.csv", parse_dates=["at"]), pd.concat([df, df], ignore_index=True))
pd.testing.assert_frame_equal(pd.read_csv("a.csv.gz", parse_dates=["at"]), df)
assert (np.load("x.npy", mmap_mode="r")[: n // 2] == 7).all()
assert (np.memmap("map.bin", dtype=np.int64, mode="r") == np.arange(n) * 3).all()
`, strconv.Itoa(rows))
}
