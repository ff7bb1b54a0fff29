package config

import (
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/postern-dev/postern/agentd/policy"
	"github.com/postern-dev/postern/agentd/secret"
)

// bucketFile is one of attachments.buckets as written.
type bucketFile struct {
	Name         string     `yaml:"name"`
	Bucket       string     `yaml:"bucket"`
	Region       string     `yaml:"region"`
	Endpoint     string     `yaml:"endpoint"`
	Prefix       string     `yaml:"prefix"`
	PathStyle    bool       `yaml:"path_style"`
	ReadOnly     bool       `yaml:"read_only"`
	AccessKey    secret.Ref `yaml:"access_key"`
	SecretKey    secret.Ref `yaml:"secret_key"`
	SessionToken secret.Ref `yaml:"session_token"`
	TTL          string     `yaml:"ttl"`
}

// Bucket is how a bucket of attachments is reached. What may be done with it is in the
// policy, under the same name.
type Bucket struct {
	Name, Bucket, Region, Endpoint, Prefix string
	PathStyle                              bool
	// AccessKey and SecretKey are always set, SessionToken perhaps.
	AccessKey, SecretKey, SessionToken secret.Ref
	// TTL is how long names, sizes and times are believed; 0: the default.
	TTL time.Duration
}

// maxBuckets bounds the buckets of one host.
const maxBuckets = 64

var (
	// bucketForm is what S3 takes for a bucket's name, and a little more of what others take.
	bucketForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{2,254}$`)
	regionForm = regexp.MustCompile(`^[a-z0-9-]{1,64}$`)
)

func (p *problems) buckets(list []bucketFile, c *Config, line func(...any) int) {
	out := &c.Attachments
	if len(list) > maxBuckets {
		p.add(line("buckets"), "attachments.buckets: %d are more than %d", len(list), maxBuckets)
		return
	}
	for i, b := range list {
		at := line("buckets", i)
		add := func(format string, args ...any) { p.add(at, "attachments.buckets: "+format, args...) }
		if b.Region == "" {
			b.Region = "us-east-1"
		}
		switch {
		case !workspaceForm.MatchString(b.Name):
			add("%q is no name: 1 to 63 of a-z, 0-9, - _ and ., beginning with a letter or digit", b.Name)
		case slices.ContainsFunc(c.Buckets, func(other Bucket) bool { return other.Name == b.Name }):
			add("%q is there twice", b.Name)
		case slices.ContainsFunc(out.Binds, func(other policy.AttachedBind) bool { return other.Name == b.Name }):
			add("%q is a name of attachments.binds already", b.Name)
		case !bucketForm.MatchString(b.Bucket):
			add("%s: bucket: %q is no name of a bucket", b.Name, b.Bucket)
		case !regionForm.MatchString(b.Region):
			add("%s: region: %q is no name of a region such as eu-central-1", b.Name, b.Region)
		case b.Prefix != "" && (!strings.HasSuffix(b.Prefix, "/") || strings.HasPrefix(b.Prefix, "/") || strings.Contains(b.Prefix, "//") || len(b.Prefix) > 512):
			add("%s: prefix: %q is none such as exports/2026/", b.Name, b.Prefix)
		}
		if b.Endpoint != "" {
			u, err := url.Parse(b.Endpoint)
			switch {
			case err != nil, u.Scheme != "https" && u.Scheme != "http", u.Hostname() == "", u.RawQuery != "", u.Fragment != "", strings.Trim(u.Path, "/") != "":
				add("%s: endpoint: it is not a URL such as https://s3.example.com", b.Name)
			case u.User != nil:
				add("%s: endpoint: credentials don't belong in it: use access_key and secret_key", b.Name)
			case u.Scheme == "http" && u.Hostname() != "localhost" && !strings.HasPrefix(u.Hostname(), "127.") && u.Hostname() != "::1":
				add("%s: endpoint: %s is not encrypted: use https", b.Name, b.Endpoint)
			}
		}
		for _, k := range []struct {
			key string
			ref secret.Ref
		}{{"access_key", b.AccessKey}, {"secret_key", b.SecretKey}, {"session_token", b.SessionToken}} {
			key, ref := k.key, k.ref
			if ref.IsZero() {
				if key != "session_token" {
					add("%s: %s is missing: say {file: ...}, {env: ...}, {credential: ...} or {vault: {kv: ...}}", b.Name, key)
				}
				continue
			}
			if err := ref.Validate(); err != nil {
				add("%s: %s: %v", b.Name, key, err)
			} else if ref.Dynamic() {
				add("%s: %s: vault: role is for databases: use kv", b.Name, key)
			} else if ref.Vault != nil && c.Vault.Address == "" {
				add("%s: %s: vault: the file says nothing of the Vault: add vault: {address: ..., token: {file: ...}} at its top", b.Name, key)
			}
		}
		ttl := time.Duration(0)
		if b.TTL != "" {
			var err error
			if ttl, err = time.ParseDuration(b.TTL); err != nil || ttl < 100*time.Millisecond || ttl > time.Hour {
				add("%s: ttl: %q is not between 100ms and 1h", b.Name, b.TTL)
			}
		}
		c.Buckets = append(c.Buckets, Bucket{
			Name: b.Name, Bucket: b.Bucket, Region: b.Region, Endpoint: b.Endpoint, Prefix: b.Prefix, PathStyle: b.PathStyle,
			AccessKey: b.AccessKey, SecretKey: b.SecretKey, SessionToken: b.SessionToken, TTL: ttl,
		})
		out.Buckets = append(out.Buckets, policy.AttachedBucket{Name: b.Name, ReadOnly: b.ReadOnly})
	}
}

// Bucket is the bucket of this name, if there is one.
func (c *Config) Bucket(name string) (Bucket, bool) {
	for _, b := range c.Buckets {
		if b.Name == name {
			return b, true
		}
	}
	return Bucket{}, false
}

// Refs are the secrets that it is opened with.
func (b Bucket) Refs() []secret.Ref { return []secret.Ref{b.AccessKey, b.SecretKey, b.SessionToken} }
