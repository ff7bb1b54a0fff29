package bucket

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/smithy-go/middleware"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"github.com/postern-dev/postern/proto"
)

const (
	// refusedEvery is how often keys that the object store refuses are read again at most, while they
	// stay the same; deniedEvery where it may have refused something else: it does not say to HEAD.
	refusedEvery = time.Second
	deniedEvery  = 5 * time.Second
)

// keyring holds the credentials for keyLife, and reads them before that when the object store
// refuses them: whoever rotates them need not know of us. It is safe for concurrent use.
type keyring struct {
	read  func(context.Context) (Keys, error)
	cache *aws.CredentialsCache

	renewing sync.Mutex // held while they are read because of a refusal

	mu      sync.Mutex
	last    Keys
	version int       // of last
	vain    time.Time // when they were read because of a refusal, and were the same
}

func newKeyring(read func(context.Context) (Keys, error)) *keyring {
	k := &keyring{read: read}
	k.cache = aws.NewCredentialsCache(aws.CredentialsProviderFunc(k.retrieve))
	return k
}

func (k *keyring) retrieve(ctx context.Context) (aws.Credentials, error) {
	keys, err := k.read(ctx)
	if err != nil {
		return aws.Credentials{}, &proto.Error{Code: proto.CodeSourceCredentials, Message: err.Error()}
	}
	k.mu.Lock()
	if keys != k.last {
		k.last = keys
		k.version++
	}
	k.mu.Unlock()
	return aws.Credentials{
		AccessKeyID: keys.Access, SecretAccessKey: keys.Secret, SessionToken: keys.Session, Source: "agentd.yaml",
		CanExpire: true, Expires: time.Now().Add(keyLife),
	}, nil
}

// middleware makes a request that was refused for its credentials once more if there are others now.
// It is outside of the SDK's own attempts, which all have the credentials that the first one had.
func (k *keyring) middleware(stack *middleware.Stack) error {
	return stack.Finalize.Add(middleware.FinalizeMiddlewareFunc("RenewKeys", func(ctx context.Context, in middleware.FinalizeInput, next middleware.FinalizeHandler) (middleware.FinalizeOutput, middleware.Metadata, error) {
		request, ok := in.Request.(*smithyhttp.Request)
		if !ok {
			return next.HandleFinalize(ctx, in)
		}
		in.Request = request.Clone()
		version := k.now()
		out, metadata, err := next.HandleFinalize(ctx, in)
		every, maybe := doubted(err)
		if !maybe || ctx.Err() != nil || !k.renew(version, every) || request.RewindStream() != nil {
			return out, metadata, err
		}
		in.Request = request.Clone()
		return next.HandleFinalize(ctx, in)
	}), middleware.Before)
}

// doubted tells whether an error may be a refusal of the credentials, and how often to look for
// others then.
func doubted(err error) (every time.Duration, maybe bool) {
	var answered interface{ HTTPStatusCode() int }
	switch {
	case err == nil:
		return 0, false
	case slices.Contains(refused, s3Code(err)):
		return refusedEvery, true
	case errors.As(err, &answered) && (answered.HTTPStatusCode() == http.StatusForbidden || answered.HTTPStatusCode() == http.StatusUnauthorized):
		return deniedEvery, true
	}
	return 0, false
}

func (k *keyring) now() (version int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.version
}

// renew reads the credentials again after those of a version, or the ones before them, were refused,
// and tells whether there are others now.
func (k *keyring) renew(version int, every time.Duration) bool {
	k.renewing.Lock()
	defer k.renewing.Unlock()
	k.mu.Lock()
	others, wait := k.version > max(version, 1), time.Since(k.vain) < every
	k.mu.Unlock()
	if others || wait {
		return others
	}
	ctx, cancel := context.WithTimeout(context.Background(), requestTime)
	defer cancel()
	k.cache.Invalidate()
	_, _ = k.cache.Retrieve(ctx) // an error is told to whoever asks next
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.version > max(version, 1) {
		return true
	}
	k.vain = time.Now()
	return false
}
