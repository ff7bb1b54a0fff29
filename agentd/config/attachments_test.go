package config

import (
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/agentd/policy"
	"github.com/postern-dev/postern/agentd/secret"
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

		"buckets: [{name: raw, url: s}]":                                                                "url",
		"buckets: [{name: Raw, bucket: raws}]":                                                          "is no name",
		"buckets: [{name: raw, bucket: r}]":                                                             "no name of a bucket",
		"buckets: [{name: raw, bucket: raws, prefix: a}]":                                               "prefix",
		"buckets: [{name: raw, bucket: raws, prefix: a//}]":                                             "prefix",
		"buckets: [{name: raw, bucket: raws, region: E U}]":                                             "region",
		"buckets: [{name: raw, bucket: raws}]":                                                          "access_key is missing",
		"buckets: [{name: raw, bucket: raws, access_key: {file: /k}, secret_key: {file: /k}, ttl: 1d}]": "ttl",
		"buckets: [{name: raw, bucket: raws, endpoint: h}]":                                             "not a URL",
		"buckets: [{name: raw, bucket: raws, endpoint: http://h}]":                                      "not encrypted",

		"buckets: [{name: raw, bucket: raws, endpoint: 'https://u:p@h'}]":                                                                                             "credentials",
		"buckets: [{name: raw, bucket: raws, access_key: {file: k}, secret_key: {file: /k}}]":                                                                         "not an absolute path",
		"buckets: [{name: raw, bucket: raws, access_key: {vault: {kv: a/b}}, secret_key: {file: /k}}]":                                                                "nothing of the Vault",
		"buckets: [{name: raw, bucket: raws, access_key: {vault: {role: database/creds/b}}, secret_key: {file: /k}}]":                                                 "use kv",
		"buckets: [{name: d, bucket: raws, access_key: {file: /k}, secret_key: {file: /k}}, {name: d, bucket: raws, access_key: {file: /k}, secret_key: {file: /k}}]": "there twice",
	} {
		_, err := Parse("agentd.yaml", []byte("attachments:\n  "+text), nil)
		var problems *Error
		if !errors.As(err, &problems) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "agentd.yaml:2") {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func TestBuckets(t *testing.T) {
	c, err := Parse("agentd.yaml", []byte(`
attachments:
  buckets:
    - {name: raw, bucket: acme-raw, prefix: exports/, read_only: true, access_key: {env: KEY}, secret_key: {credential: raw}, ttl: 1m}
    - {name: out, bucket: acme-out, region: eu-central-1, endpoint: "https://s3.example.com", path_style: true, access_key: {file: /k}, secret_key: {file: /s}, session_token: {file: /t}}
`), nil)
	if err != nil {
		t.Fatal(err)
	}
	want := []Bucket{
		{Name: "raw", Bucket: "acme-raw", Region: "us-east-1", Prefix: "exports/", AccessKey: secret.Ref{Env: "KEY"}, SecretKey: secret.Ref{Credential: "raw"}, TTL: time.Minute},
		{
			Name: "out", Bucket: "acme-out", Region: "eu-central-1", Endpoint: "https://s3.example.com", PathStyle: true,
			AccessKey: secret.Ref{File: "/k"}, SecretKey: secret.Ref{File: "/s"}, SessionToken: secret.Ref{File: "/t"},
		},
	}
	if !reflect.DeepEqual(c.Buckets, want) {
		t.Errorf("got %+v, want %+v", c.Buckets, want)
	}
	for name, readOnly := range map[string]bool{"raw": true, "out": false} {
		if got, reason := c.Attachments.Mount(name); got != readOnly || reason != "" {
			t.Errorf("%s: %v, %q", name, got, reason)
		}
	}
}
