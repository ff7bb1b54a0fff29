package checkpoint

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"
)

// imageDir is a directory with an image and a log; gone tells whether it was removed.
func imageDir(t *testing.T) (dir string, remove func(), gone func() bool) {
	t.Helper()
	dir = t.TempDir()
	for _, name := range []string{"pages-1.img", "criu.log"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir, func() { os.RemoveAll(dir) }, func() bool { _, err := os.Stat(dir); return err != nil }
}

func TestKeptImagesAreOneForEachKernelAndBounded(t *testing.T) {
	k := newKept(slog.New(slog.NewTextHandler(t.Output(), nil)))
	defer k.close()
	first, removeFirst, goneFirst := imageDir(t)
	k.keep("kernel", "ckp_1", first, 1, removeFirst)
	to := t.TempDir()
	if k.link("ckp_2", to) {
		t.Error("linked images of another checkpoint")
	}
	if !k.link("ckp_1", to) {
		t.Fatal("not kept")
	}
	if names, _ := filepath.Glob(to + "/*"); len(names) != 1 {
		t.Errorf("linked %v, want the image without the log", names)
	}
	other, removeOther, goneOther := imageDir(t)
	k.keep("other", "ckp_3", other, 1, removeOther)
	second, removeSecond, goneSecond := imageDir(t)
	k.keep("kernel", "ckp_2", second, 1, removeSecond)
	if !goneFirst() || goneOther() || goneSecond() {
		t.Errorf("first gone: %v, other gone: %v, second gone: %v", goneFirst(), goneOther(), goneSecond())
	}
	if text, err := os.ReadFile(filepath.Join(to, "pages-1.img")); err != nil || string(text) != "pages-1.img" {
		t.Errorf("a linked image after its directory's end: %q, %v", text, err)
	}
	// What is too much is not kept, and takes what was there of its kernel with it.
	huge, removeHuge, goneHuge := imageDir(t)
	k.keep("other", "ckp_4", huge, available(), removeHuge)
	if !goneHuge() || !goneOther() || k.size != 1 {
		t.Errorf("huge gone: %v, other gone: %v, %d bytes", goneHuge(), goneOther(), k.size)
	}
	k.dropCheckpoint("ckp_2")
	if !goneSecond() || k.size != 0 || len(k.all) != 0 {
		t.Errorf("gone: %v, %d bytes, %d kept", goneSecond(), k.size, len(k.all))
	}
	k.close()
	late, removeLate, goneLate := imageDir(t)
	k.keep("kernel", "ckp_5", late, 1, removeLate)
	if !goneLate() {
		t.Error("kept after close")
	}
}
