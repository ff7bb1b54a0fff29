package pagestore

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/postern-dev/postern/proto"
)

func acceptAll(*Meta) error { return nil }

func TestMoveToAnotherHost(t *testing.T) {
	here, there := openStore(t, t.TempDir()), openStore(t, t.TempDir(), func(o *Options) { o.Key = Key{42} })
	k := newSimulatedKernel(31, 8)
	first, _ := mustPut(t, here, meta("k1"), k.dump(t))
	k.run(50, 20)
	images := k.dump(t)
	m := meta("k1")
	m.Parent, m.Label, m.Protected, m.Host.Kernel = first.ID, "moved", true, "6.18"
	second, _ := mustPut(t, here, m, images)
	var stream bytes.Buffer
	if err := here.Export(t.Context(), second.ID, &stream, nil); err != nil {
		t.Fatal(err)
	}
	whole := bytes.Clone(stream.Bytes())
	if int64(len(whole)) > second.Size*6/10 {
		t.Errorf("%d bytes sent of %d", len(whole), second.Size)
	}
	// A host that it does not fit sends it back.
	refusal := proto.Errorf(proto.CodeInvalid, "another CPU")
	if _, _, err := there.Import(t.Context(), bytes.NewReader(whole), func(m *Meta) error {
		if m.Host.Kernel != "6.18" || m.Label != "moved" {
			t.Errorf("accept saw %+v", m)
		}
		return refusal
	}, nil); !errors.Is(err, refusal) {
		t.Errorf("got %v", err)
	}
	got, st, err := there.Import(t.Context(), bytes.NewReader(whole), func(m *Meta) error { m.Kernel = "k9"; return nil }, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got.ID != second.ID || got.Kernel != "k9" || !got.Protected || got.Size != second.Size || got.Parent != first.ID {
		t.Errorf("%+v is not %+v", got.Meta, second.Meta)
	}
	mustRestore(t, there, got.ID, images)
	if p, err := there.Verify(t.Context()); err != nil || len(p) > 0 {
		t.Errorf("verify: %v %v", p, err)
	}
	if _, _, err := there.Import(t.Context(), bytes.NewReader(whole), acceptAll, nil); proto.CodeOf(err) != proto.CodeAlreadyExists {
		t.Errorf("twice: %v", err)
	}
	// What is there already is stored once, also by a move.
	if err := there.Delete(got.ID); err != nil {
		t.Fatal(err)
	}
	mustPut(t, there, meta("k9"), images)
	_, st, err = there.Import(t.Context(), bytes.NewReader(whole), acceptAll, nil)
	if err != nil || st.New != 0 {
		t.Errorf("%d new bytes, %v", st.New, err)
	}
}

func TestMoveOfRandomTrees(t *testing.T) {
	here, there := openStore(t, t.TempDir()), openStore(t, t.TempDir(), func(o *Options) { o.Key = Key{42} })
	for seed := range uint64(5) {
		dir := filepath.Join(t.TempDir(), "tree")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		randomTree(t, rand.New(rand.NewPCG(seed, 8)), dir)
		c, _ := mustPut(t, here, meta("k1"), dir)
		var stream bytes.Buffer
		if err := here.Export(t.Context(), c.ID, &stream, nil); err != nil {
			t.Fatal(err)
		}
		if _, _, err := there.Import(t.Context(), &stream, acceptAll, nil); err != nil {
			t.Fatal(err)
		}
		mustRestore(t, there, c.ID, dir)
	}
}

func TestBadStreamsAreRefusedWhole(t *testing.T) {
	here := openStore(t, t.TempDir())
	c, _ := mustPut(t, here, meta("k1"), newSimulatedKernel(33, 1).dump(t))
	var stream bytes.Buffer
	if err := here.Export(t.Context(), c.ID, &stream, nil); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	there := openStore(t, dir)
	check := func(what string, r io.Reader) {
		t.Helper()
		_, _, err := there.Import(t.Context(), r, acceptAll, nil)
		if proto.CodeOf(err) != proto.CodeInvalid {
			t.Errorf("%s: %v: %v", what, proto.CodeOf(err), err)
		}
		if files := storeFiles(t, dir); len(files) != 0 {
			t.Fatalf("%s: left behind: %v", what, files)
		}
	}
	n := stream.Len()
	for _, cut := range []int{0, 1, 4, 100, n / 2, n - 8, n - 4, n - 1} {
		check("cut", bytes.NewReader(stream.Bytes()[:cut]))
	}
	check("more behind it", io.MultiReader(bytes.NewReader(stream.Bytes()), bytes.NewReader([]byte{1, 2, 3})))
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	plain, err := d.DecodeAll(stream.Bytes(), nil)
	if err != nil {
		t.Fatal(err)
	}
	e, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close() //nolint:errcheck // writes nowhere
	for _, cut := range []int{4, 8, 20, 300, len(plain) / 2, len(plain) - 1} {
		check("plain cut", bytes.NewReader(e.EncodeAll(plain[:cut], nil)))
	}
	check("plain and more", bytes.NewReader(e.EncodeAll(append(bytes.Clone(plain), 'E'), nil)))
	check("wrong count", bytes.NewReader(e.EncodeAll(append(bytes.Clone(plain[:len(plain)-1]), 99), nil)))
}
