package config

import (
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/postern-dev/postern/agentd/policy"
)

func TestAttachments(t *testing.T) {
	c, err := Parse("agentd.yaml", []byte(`
attachments:
  workspaces: ["lab-*", shared]
  read_only: [shared]
  host_mounts: [/srv/postern]
  cache: {max_bytes: 1GiB}
  max_unsent: 2GiB
  binds: [{name: data, path: /srv/data, read_only: true}, {name: scratch, path: /srv/scratch}]
`), nil)
	if err != nil {
		t.Fatal(err)
	}
	want := policy.Attachments{
		Enabled: true, Workspaces: []string{"lab-*", "shared"}, ReadOnly: []string{"shared"}, HostMounts: []string{"/srv/postern"},
		Cache: 1 << 30, Unsent: 2 << 30,
		Binds: []policy.AttachedBind{{Name: "data", Path: "/srv/data", ReadOnly: true}, {Name: "scratch", Path: "/srv/scratch"}},
	}
	if !reflect.DeepEqual(c.Attachments, want) {
		t.Errorf("got %+v, want %+v", c.Attachments, want)
	}
	for text, enabled := range map[string]bool{"attachments: {}": true, "url: https://cp.example.com": false} {
		c, err := Parse("agentd.yaml", []byte(text), nil)
		if err != nil || c.Attachments.Enabled != enabled || c.Attachments.Cache == 0 || c.Attachments.Unsent == 0 {
			t.Errorf("%s: %+v, %v", text, c, err)
		}
	}
}

func TestAttachmentsRefused(t *testing.T) {
	for text, want := range map[string]string{
		"workspaces: [Big]":                   "no name of a workspace",
		"workspaces: [../x]":                  "no name of a workspace",
		"read_only: ['']":                     "no name of a workspace",
		"host_mounts: [srv]":                  "no clean absolute path",
		"host_mounts: [/]":                    "no clean absolute path",
		"cache: {max_bytes: 1KiB}":            "not between",
		"max_unsent: many":                    "max_unsent",
		"binds: [{name: Data, path: /srv/d}]": "is no name",
		"binds: [{name: d, path: srv}]":       "no clean absolute path",
		"binds: [{name: d, path: /proc/1}]":   "may not see",

		"binds: [{name: d, path: /srv/d}, {name: d, path: /srv/e}]": "there twice",
		"binds: [{name: d, path: /srv/d, owner: me}]":               "owner",
		"buckets: [{name: raw, url: s}]":                            "buckets",
	} {
		_, err := Parse("agentd.yaml", []byte("attachments:\n  "+text), nil)
		var problems *Error
		if !errors.As(err, &problems) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "agentd.yaml:2") {
			t.Errorf("%s: %v", text, err)
		}
	}
}
