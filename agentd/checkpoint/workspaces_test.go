package checkpoint

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/postern-dev/postern/proto"
)

func TestTakeVersions(t *testing.T) {
	for name, test := range map[string]struct {
		content []byte // nil: there is none
		want    fileTimes
		code    proto.Code
	}{
		"none":      {},
		"of none":   {content: []byte(`{}`), want: fileTimes{}},
		"of two":    {content: []byte(`{"/work/lab/a": 12, "/work/lab/b": 9007199254740993}`), want: fileTimes{"/work/lab/a": 12, "/work/lab/b": 9007199254740993}},
		"not JSON":  {content: []byte(`{"/work`), code: proto.CodeInvalid},
		"no times":  {content: []byte(`{"/work/lab/a": "x"}`), code: proto.CodeInvalid},
		"too large": {content: bytes.Repeat([]byte{' '}, maxVersions+1), code: proto.CodeInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, versionsFile)
			if test.content != nil {
				if err := os.WriteFile(path, test.content, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			got, err := takeVersions(dir)
			if test.code != 0 {
				if proto.CodeOf(err) != test.code {
					t.Errorf("got %v, %v, want %v", got, err, test.code)
				}
				return
			}
			if err != nil || !reflect.DeepEqual(got, test.want) {
				t.Errorf("got %v, %v, want %v", got, err, test.want)
			}
			if _, err := os.Lstat(path); !os.IsNotExist(err) {
				t.Errorf("the file stays: %v", err)
			}
		})
	}
}

func TestFilesOnWorkspaces(t *testing.T) {
	dir := t.TempDir()
	work := map[string]string{dir + "/lab": "/host/lab", dir + "/lab2": "/host/2"}
	for inside, want := range map[string]string{
		dir + "/lab/a/b": "/host/lab/a/b", dir + "/lab2/a": "/host/2/a", dir + "/lab": "", dir + "/other/a": "", "": "",
	} {
		if got := outside(inside, work); got != want {
			t.Errorf("%s is at %q, want %q", inside, got, want)
		}
	}
	if err := os.Mkdir(dir+"/lab", 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{dir + "/lab/one", dir + "/two"} {
		f, err := os.Create(name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close() //nolint:errcheck // nothing is written
	}
	if got := openOn([]int{os.Getpid(), 1 << 30}, work); !reflect.DeepEqual(got, []string{dir + "/lab/one"}) {
		t.Errorf("open are %v", got)
	}
}
