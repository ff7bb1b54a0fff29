package config

import (
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/postern-dev/postern/agentd/policy"
)

// attachmentsFile is attachments: as written.
type attachmentsFile struct {
	Workspaces []string `yaml:"workspaces"`
	ReadOnly   []string `yaml:"read_only"`
	HostMounts []string `yaml:"host_mounts"`
	Cache      struct {
		MaxBytes string `yaml:"max_bytes"`
	} `yaml:"cache"`
	MaxUnsent string `yaml:"max_unsent"`
	Binds     []struct {
		Name     string `yaml:"name"`
		Path     string `yaml:"path"`
		ReadOnly bool   `yaml:"read_only"`
	} `yaml:"binds"`
	Buckets []bucketFile `yaml:"buckets"`
}

var workspaceForm = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)

// neverShown are directories that are the kernel's of Linux, or agentd's.
var neverShown = []string{"/proc", "/sys", "/dev", "/run", "/etc/postern", "/var/lib/postern-agentd"}

// workspaceGlob is what a pattern of workspaces' names may be.
var workspaceGlob = regexp.MustCompile(`^[a-z0-9*?][a-z0-9._*?-]{0,62}$`)

func (p *problems) attachments(in file, c *Config, at func(...any) int, there bool) {
	out := &c.Attachments
	*out = policy.Attachments{Cache: policy.DefaultAttachmentCache, Unsent: policy.DefaultAttachmentUnsent}
	if !there {
		return
	}
	a := in.Attachments
	line := func(keys ...any) int { return at(append([]any{"attachments"}, keys...)...) }
	out.Enabled = true
	out.Workspaces, out.ReadOnly, out.HostMounts = a.Workspaces, a.ReadOnly, a.HostMounts
	for key, list := range map[string][]string{"workspaces": a.Workspaces, "read_only": a.ReadOnly} {
		for i, pattern := range list {
			if !workspaceGlob.MatchString(pattern) {
				p.add(line(key, i), "attachments.%s: %q is no name of a workspace, nor a pattern of names with * and ?", key, pattern)
			}
		}
	}
	for i, path := range a.HostMounts {
		if !filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/" {
			p.add(line("host_mounts", i), "attachments.host_mounts: %q is no clean absolute path", path)
		}
	}
	for i, b := range a.Binds {
		switch {
		case !workspaceForm.MatchString(b.Name):
			p.add(line("binds", i), "attachments.binds: %q is no name: 1 to 63 of a-z, 0-9, - _ and ., beginning with a letter or digit", b.Name)
		case slices.ContainsFunc(out.Binds, func(other policy.AttachedBind) bool { return other.Name == b.Name }):
			p.add(line("binds", i), "attachments.binds: %q is there twice", b.Name)
		case !filepath.IsAbs(b.Path) || filepath.Clean(b.Path) != b.Path || b.Path == "/":
			p.add(line("binds", i), "attachments.binds: %q is no clean absolute path", b.Path)
		case slices.ContainsFunc(neverShown, func(dir string) bool { return b.Path == dir || strings.HasPrefix(b.Path, dir+"/") }):
			p.add(line("binds", i), "attachments.binds: kernels may not see %s", b.Path)
		}
		out.Binds = append(out.Binds, policy.AttachedBind{Name: b.Name, Path: b.Path, ReadOnly: b.ReadOnly})
	}
	p.buckets(a.Buckets, c, line)
	size := func(text string, into *uint64, keys ...any) {
		if text == "" {
			return
		}
		n, err := policy.ParseSize(text)
		switch {
		case err != nil:
			p.add(line(keys...), "attachments.%v: %v", keys[0], err)
		case n < 16<<20 || n > 1<<60:
			p.add(line(keys...), "attachments.%v: %s is not between 16 MiB and 1 EiB", keys[0], text)
		}
		*into = n
	}
	size(a.Cache.MaxBytes, &out.Cache, "cache", "max_bytes")
	size(a.MaxUnsent, &out.Unsent, "max_unsent")
}
