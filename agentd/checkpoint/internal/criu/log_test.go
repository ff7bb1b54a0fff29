package criu

import (
	"slices"
	"strings"
	"testing"
)

func TestFirstErrorsAreTheRealOnes(t *testing.T) {
	const rlimit = "(00.000012) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted\n"
	for _, test := range []struct {
		name, log string
		lines     []string
		cause     Cause
	}{
		{"empty", "", nil, CauseUnknown},
		{"noise alone", rlimit, []string{"rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted"}, CauseRights},
		{
			"noise first", rlimit + "(00.03) Error (criu/sk-inet.c:191): inet: Connected TCP socket, consider using --tcp-established option.\n(00.04) Error (criu/cr-dump.c:2111): Dumping FAILED.\n",
			[]string{"inet: Connected TCP socket, consider using --tcp-established option."},
			CauseTCP,
		},
		{"no space", "Error (criu/image.c:1): Can't write: No space left on device\n", []string{"Can't write: No space left on device"}, CauseNoSpace},
		{"changed size", "Error (criu/files-reg.c:2164): File home/u/x has bad size 9 (expect 6)\n", []string{"File home/u/x has bad size 9 (expect 6)"}, CauseFileChanged},
		{"unix peer", "Error (criu/sk-unix.c:817): unix: External socket is used. Consider using --ext-unix-sk option.\n", []string{"unix: External socket is used. Consider using --ext-unix-sk option."}, CauseExternalSocket},
		{"a file's name that lies", "Error (criu/x.c:1): Can't open file a\x1b[2Jb\n", []string{"Can't open file a?[2Jb"}, CauseUnknown},
		{"long line", "Error (criu/x.c:1): " + strings.Repeat("x", 200_000) + "\nError (criu/x.c:1): second\n", []string{strings.Repeat("x", maxLineLen) + "...", "second"}, CauseUnknown},
	} {
		t.Run(test.name, func(t *testing.T) {
			lines := scanErrors(strings.NewReader(test.log))
			if !slices.Equal(lines, test.lines) {
				t.Errorf("got %.400q, want %.400q", lines, test.lines)
			}
			if got := causeOf(lines); got != test.cause {
				t.Errorf("cause %d, want %d", got, test.cause)
			}
		})
	}
}

func FuzzScanErrors(f *testing.F) {
	f.Add("Error (criu/x.c:1): y\n")
	f.Fuzz(func(t *testing.T, log string) {
		lines := scanErrors(strings.NewReader(log))
		if len(lines) > maxLines {
			t.Fatalf("%d lines", len(lines))
		}
		for _, l := range lines {
			if len(l) > maxLineLen+3 || strings.ContainsAny(l, "\n\x1b\x00") {
				t.Fatalf("%q", l)
			}
		}
		causeOf(lines)
	})
}
