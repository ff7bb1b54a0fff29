package workspace

import (
	"bytes"
	"fmt"
	"regexp"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/postern-dev/postern/controlplane/filetree"
	"github.com/postern-dev/postern/proto"
)

const (
	// maxPath bounds a path, in bytes.
	maxPath = 64 << 10
	// maxTarget bounds a symbolic link's target, in bytes.
	maxTarget = 4095
	// Bounds of extended attributes: how many, a name's bytes, and all values' together.
	maxXattrs, maxXattrName, maxXattrBytes = 64, 255, 64 << 10
	// modeBits are the permissions that are kept: no setuid, no setgid.
	modeBits = 0o1777
	// conflictsName is the directory, in the root, that takes what has no other place.
	conflictsName = ".conflicts"
)

var workspaceName = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)

// checkWorkspaceName fails for what is no name of a workspace.
func checkWorkspaceName(name string) error {
	if !workspaceName.MatchString(name) {
		return proto.Errorf(proto.CodeInvalid, "%q is no name for a workspace: 1 to 63 of a-z, 0-9, '-', '_' and '.', beginning with a letter or digit", clip(name))
	}
	if strings.HasPrefix(name, workspacePrefix) {
		return proto.Errorf(proto.CodeInvalid, "%q is no name for a workspace: %s begins ids", clip(name), workspacePrefix)
	}
	return nil
}

// checkName fails for what is no name of an entry.
func checkName(name []byte) error {
	switch {
	case len(name) == 0:
		return proto.Errorf(proto.CodeInvalid, "a name is empty")
	case len(name) > filetree.MaxName:
		return proto.Errorf(proto.CodeInvalid, "the name %q has %d bytes: at most %d", clip(string(name)), len(name), filetree.MaxName)
	case bytes.IndexByte(name, '/') >= 0 || bytes.IndexByte(name, 0) >= 0:
		return proto.Errorf(proto.CodeInvalid, "the name %q has a slash or a zero byte", clip(string(name)))
	case string(name) == "." || string(name) == "..":
		return proto.Errorf(proto.CodeInvalid, "the name %q means a directory itself", name)
	}
	return nil
}

// splitPath takes a path apart; the root has no parts. Slashes that are repeated or at
// the end don't count.
func splitPath(path []byte) ([][]byte, error) {
	switch {
	case len(path) == 0 || path[0] != '/':
		return nil, proto.Errorf(proto.CodeInvalid, "the path %q does not begin with a slash", clip(string(path)))
	case len(path) > maxPath:
		return nil, proto.Errorf(proto.CodeInvalid, "a path of %d bytes: at most %d", len(path), maxPath)
	}
	var parts [][]byte
	for part := range bytes.SplitSeq(path, []byte("/")) {
		if len(part) == 0 {
			continue
		}
		if err := checkName(part); err != nil {
			return nil, err
		}
		parts = append(parts, part)
	}
	if len(parts) > maxDepth {
		return nil, proto.Errorf(proto.CodeInvalid, "the path has %d parts: at most %d", len(parts), maxDepth)
	}
	return parts, nil
}

// joinPath is the reverse of splitPath.
func joinPath(parts [][]byte) []byte {
	if len(parts) == 0 {
		return []byte("/")
	}
	return append([]byte("/"), bytes.Join(parts, []byte("/"))...)
}

// conflictName is "BASE (conflict HOST 2026-11-22 12.00.00)EXT", cut to fit, with the
// n-th number if n is above 1.
func conflictName(name []byte, host string, at time.Time, n int) []byte {
	mark := " (conflict " + cut([]byte(cleanHost(host)), 64) + " " + at.UTC().Format("2006-01-02 15.04.05")
	if n > 1 {
		mark += fmt.Sprintf(" %d", n)
	}
	mark += ")"
	base, ext := name, []byte(nil)
	if i := bytes.LastIndexByte(name, '.'); i > 0 && len(name)-i <= 16 {
		base, ext = name[:i], name[i:]
	}
	room := filetree.MaxName - len(mark) - len(ext)
	return append([]byte(cut(base, room)+mark), ext...)
}

// cut cuts text to at most n bytes, between characters where it has some.
func cut(text []byte, n int) string {
	if len(text) <= n {
		return string(text)
	}
	for i := n; i > n-utf8.UTFMax && i > 0; i-- {
		if utf8.RuneStart(text[i]) {
			return string(text[:i])
		}
	}
	return string(text[:n])
}

func cleanHost(host string) string {
	if host == "" {
		return "api"
	}
	return strings.Map(func(r rune) rune {
		if r == '/' || r < ' ' || r == utf8.RuneError {
			return '_'
		}
		return r
	}, host)
}

// clip bounds a caller's text within an error.
func clip(text string) string {
	if len(text) > 80 {
		return strings.ToValidUTF8(text[:80], "") + "…"
	}
	return text
}
