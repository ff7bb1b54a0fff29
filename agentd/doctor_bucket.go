package main

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/postern-dev/postern/agentd/config"
	"github.com/postern-dev/postern/agentd/doctor"
	"github.com/postern-dev/postern/agentd/secret"
)

// bucketTime bounds the look at one bucket.
const bucketTime = 15 * time.Second

// examineBuckets lists each bucket of attachments.buckets, once. It changes nothing there.
func examineBuckets(ctx context.Context, r *doctor.Report, c *config.Config) {
	if len(c.Buckets) == 0 {
		return
	}
	client := newVault("", c, nil, slog.New(slog.DiscardHandler))
	if client != nil {
		defer client.Close() //nolint:errcheck // what is left of it ends by itself
	}
	for _, b := range c.Buckets {
		name := "bucket " + b.Name
		if slices.ContainsFunc(b.Refs(), func(ref secret.Ref) bool {
			return ref.Env != "" || ref.Vault != nil && c.Vault.Token.Env+c.Vault.SecretID.Env != ""
		}) {
			r.Add(name, doctor.Warning, "its keys, or what opens Vault, are in agentd's environment, which this command does not have", "mount it: agentd mount says what is wrong")
			continue
		}
		if err := lookAtBucket(ctx, c, b, func(ctx context.Context, ref secret.Ref) (secret.Secret, error) {
			return readRef(ctx, ref, nil, client)
		}); err != nil {
			r.Add(name, doctor.Failed, oneLine(err.Error()), "mounts of it give EIO until then")
			continue
		}
		r.Add(name, doctor.OK, fmt.Sprintf("%s can be listed", b.Bucket), "")
	}
}

func lookAtBucket(ctx context.Context, c *config.Config, b config.Bucket, read func(context.Context, secret.Ref) (secret.Secret, error)) error {
	ctx, cancel := context.WithTimeout(ctx, bucketTime)
	defer cancel()
	store, err := openStore(ctx, "", slog.New(slog.DiscardHandler), c, b, true, nil, read)
	if err != nil {
		return err
	}
	defer store.Close() //nolint:errcheck // it was only asked
	_, err = store.List(ctx, "", "", 1)
	return err
}
