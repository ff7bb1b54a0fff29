package main

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"reflect"
	"sync"
	"time"

	"github.com/postern-dev/postern/agentd/attach/bucket"
	"github.com/postern-dev/postern/agentd/config"
	"github.com/postern-dev/postern/agentd/egress"
	"github.com/postern-dev/postern/agentd/secret"
	"github.com/postern-dev/postern/agentd/vault"
	"github.com/postern-dev/postern/proto"
)

// buckets are the object stores that mounts of this host reach through agentd, which alone
// has their credentials. What is not in the configuration any more is refused at once.
type buckets struct {
	daemon  *Daemon
	metrics *bucket.Metrics

	mu   sync.Mutex
	open map[string]*openBucket
}

type openBucket struct {
	store    *bucket.Store
	how      config.Bucket
	readOnly bool
	users    int
	old      bool // another one has its place; closed with the last user
}

// handler answers mountd.
func (b *buckets) handler() http.Handler { return bucket.Handler(b.find) }

// find gives the Store of a name, as the configuration has it now.
func (b *buckets) find(ctx context.Context, name string) (*bucket.Store, func(), error) {
	c := b.daemon.config.Load()
	may, ok := c.Attachments.Bucket(name)
	how, reached := c.Bucket(name)
	b.mu.Lock()
	defer b.mu.Unlock()
	o := b.open[name]
	if o != nil && (!ok || o.readOnly != may.ReadOnly || !reflect.DeepEqual(o.how, how)) {
		o.old = true
		delete(b.open, name)
		b.endLocked(o)
		o = nil
	}
	if !ok || !reached {
		return nil, nil, proto.Errorf(proto.CodePolicyDenied, "there is no bucket %.64q in attachments.buckets in agentd.yaml", name)
	}
	if o == nil {
		store, err := openStore(ctx, b.daemon.Executable, b.daemon.logger, c, how, may.ReadOnly, b.metrics, func(ctx context.Context, ref secret.Ref) (secret.Secret, error) {
			return b.daemon.readSecret(ctx, ref)
		})
		if err != nil {
			return nil, nil, err
		}
		o = &openBucket{store: store, how: how, readOnly: may.ReadOnly}
		b.open[name] = o
	}
	o.users++
	return o.store, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		o.users--
		b.endLocked(o)
	}, nil
}

func (b *buckets) endLocked(o *openBucket) {
	if o.old && o.users == 0 {
		o.store.Close() //nolint:errcheck // nothing of it is under way
	}
}

// close closes what nobody uses any more.
func (b *buckets) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for name, o := range b.open {
		o.old = true
		delete(b.open, name)
		b.endLocked(o)
	}
}

// bucketHeaderTime is how long an object store may take to begin an answer.
const bucketHeaderTime = 30 * time.Second

// openStore opens a bucket of the configuration. It reaches it as the tunnel is reached:
// through the same proxy, with the same authorities, and by a process of its own.
func openStore(ctx context.Context, executable string, logger *slog.Logger, c *config.Config, how config.Bucket, readOnly bool, metrics *bucket.Metrics, read func(context.Context, secret.Ref) (secret.Secret, error)) (*bucket.Store, error) {
	through := newEgress(executable, c, egress.Config{
		Name: "bucket " + how.Name, CAs: c.OuterCAs, Proxy: proxyFor(c), HeaderTime: bucketHeaderTime, Logger: logger,
	})
	store, err := bucket.Open(ctx, bucket.Config{
		Name: how.Name, Bucket: how.Bucket, Region: how.Region, Prefix: how.Prefix, Endpoint: how.Endpoint, PathStyle: how.PathStyle, ReadOnly: readOnly,
		Metrics: metrics, Transport: through, Closed: through.Close,
		Keys: func(ctx context.Context) (bucket.Keys, error) {
			var values [3]string
			for i, ref := range how.Refs() {
				if ref.IsZero() {
					continue
				}
				value, err := read(ctx, ref)
				if err != nil {
					return bucket.Keys{}, err
				}
				values[i] = value.Reveal()
			}
			return bucket.Keys{Access: values[0], Secret: values[1], Session: values[2]}, nil
		},
	})
	if err != nil {
		through.Close()
	}
	return store, err
}

// readSecret reads one of the host's own secrets, wherever it is.
func (d *Daemon) readSecret(ctx context.Context, ref secret.Ref) (secret.Secret, error) {
	return readRef(ctx, ref, d.secrets, d.vault)
}

func readRef(ctx context.Context, ref secret.Ref, env *secret.Environment, client *vault.Client) (secret.Secret, error) {
	switch {
	case ref.Vault == nil:
		return ref.Load(ctx, env)
	case client == nil: // refused by the configuration, unless it was added since the start
		return secret.Secret{}, errors.New("agentd started without vault in its configuration: restart it")
	}
	mount, path := ref.Vault.Split()
	field := ref.Vault.Field
	if field == "" {
		field = "password"
	}
	return client.KV(ctx, mount, path, field)
}
