package sandbox

import (
	"bytes"
	"debug/elf"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
)

// The machine code in initelf.go is what the assembler makes of the source
// beside it. Binutils have an assembler for the machine's own architecture; the
// other one is looked at where a cross assembler is installed.
func TestInitIsWhatItsSourceSays(t *testing.T) {
	for arch, code := range initCode {
		as := "as"
		if arch != runtime.GOARCH {
			as = map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[arch] + "-linux-gnu-as"
			if _, err := exec.LookPath(as); err != nil {
				continue
			}
		}
		object := filepath.Join(t.TempDir(), "init.o")
		if out, err := exec.Command(as, "-o", object, filepath.Join("initasm", "init_"+arch+".s")).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s (run packaging/dev/deps.sh jupyter)", err, out)
		}
		f, err := elf.Open(object)
		if err != nil {
			t.Fatal(err)
		}
		text, err := f.Section(".text").Data()
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(text, code) {
			t.Errorf("%s: the source makes %x, the code is %x", arch, text, code)
		}
		_ = f.Close()
	}
}

func TestInitIsSmall(t *testing.T) {
	for arch := range initCode {
		program, err := initFor(arch)
		if err != nil {
			t.Fatal(err)
		}
		f, err := elf.NewFile(bytes.NewReader(program))
		if err != nil {
			t.Fatalf("%s: %v", arch, err)
		}
		if len(program) > 4096 || len(f.Progs) != 2 || f.Entry != f.Progs[0].Vaddr+64+2*56 {
			t.Errorf("%s: %d bytes, %+v", arch, len(program), f.FileHeader)
		}
	}
	if _, err := initFor("mips"); err == nil {
		t.Error("there is an init for mips")
	}
}
