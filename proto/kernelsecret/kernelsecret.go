package kernelsecret

import (
	"bytes"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/postern-dev/postern/proto"
)

const (
	// MinValue and MaxValue bound a value, in bytes. A shorter one could not be kept out
	// of outputs: it would stand in every other line by chance.
	MinValue, MaxValue = 8, 32 << 10
	// MaxPerKernel bounds the secrets of one kernel.
	MaxPerKernel = 64
)

var nameForm = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]{0,63}$`)

var (
	reserved         = []string{"PATH", "HOME", "USER", "LOGNAME", "SHELL", "PWD", "TERM", "LANG", "LANGUAGE", "TMPDIR", "TZ", "ENV", "IFS", "BASH_ENV", "GCONV_PATH"}
	reservedPrefixes = []string{"LD_", "LC_", "PYTHON", "IPYTHON", "POSTERN_", "JPY_", "JUPYTER_", "GLIBC_", "MALLOC_"}
)

// CheckName returns INVALID for what can't be a secret's name: it is that of a variable
// in the kernel's environment, and none that changes how programs run.
func CheckName(name string) error {
	if !nameForm.MatchString(name) {
		return proto.Errorf(proto.CodeInvalid, "%.80q is no name of a secret: it is a variable's in the kernel's environment, of at most 64 letters, digits and _", name)
	}
	upper := strings.ToUpper(name)
	if slices.Contains(reserved, upper) || slices.ContainsFunc(reservedPrefixes, func(p string) bool { return strings.HasPrefix(upper, p) }) {
		return proto.Errorf(proto.CodeInvalid, "%s is no name for a secret: programs take it as a setting", name)
	}
	return nil
}

// CheckValue returns INVALID for what can't be a secret's value. The error has nothing
// of it.
func CheckValue(name string, value []byte) error {
	switch {
	case len(value) < MinValue:
		return proto.Errorf(proto.CodeInvalid, "secret %s has less than %d bytes: so short a value can't be kept out of kernels' outputs", name, MinValue)
	case len(value) > MaxValue:
		return proto.Errorf(proto.CodeInvalid, "secret %s has more than %d bytes", name, MaxValue)
	case bytes.IndexByte(value, 0) >= 0 || !utf8.Valid(value):
		return proto.Errorf(proto.CodeInvalid, "secret %s is no text in UTF-8: encode it, with base64 say", name)
	}
	return nil
}
