package kernelsecret_test

import (
	"strings"
	"testing"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/kernelsecret"
)

func TestCheckName(t *testing.T) {
	for name, good := range map[string]bool{
		"TOKEN": true, "_x9": true, strings.Repeat("A", 64): true, "MY_PATH": true,
		"": false, "9A": false, "A-B": false, "A=B": false, "A\n": false, "Ä": false, strings.Repeat("A", 65): false,
		"PATH": false, "Path": false, "LD_PRELOAD": false, "PYTHONPATH": false, "POSTERN_SOCKET": false, "HOME": false, "BASH_ENV": false,
	} {
		err := kernelsecret.CheckName(name)
		if (err == nil) != good || err != nil && proto.CodeOf(err) != proto.CodeInvalid {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestCheckValue(t *testing.T) {
	for value, good := range map[string]bool{
		"12345678": true, "söme-töken": true, "line\nline\n": true, strings.Repeat("x", kernelsecret.MaxValue): true,
		"": false, "1234567": false, "1234567\x00": false, "12345678\xff": false, strings.Repeat("x", kernelsecret.MaxValue+1): false,
	} {
		err := kernelsecret.CheckValue("N", []byte(value))
		if (err == nil) != good {
			t.Errorf("%.20q: %v", value, err)
		}
		if err != nil && len(value) > 3 && strings.Contains(err.Error(), value[:4]) {
			t.Errorf("the error tells of the value: %v", err)
		}
	}
}
