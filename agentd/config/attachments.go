package config

import (
	"path/filepath"
	"regexp"

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
}

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
