package bucket

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/ratelimit"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go/middleware"
	"gocloud.dev/blob"
	"gocloud.dev/blob/s3blob"
	"gocloud.dev/gcerrors"

	"github.com/postern-dev/postern/proto"
)

const (
	// partSize is what an upload sends at once, and uploadParts how many of them at a time: one
	// upload takes 24 MiB of memory.
	partSize    = 8 << 20
	uploadParts = 3
	// maxUploads bounds the uploads at once; more wait.
	maxUploads = 4
	// firstPause is the longest wait before a second attempt; it doubles, up to lastPause.
	firstPause = 50 * time.Millisecond
	lastPause  = 2 * time.Second
	// attempts bounds how often something is tried.
	attempts = 8
	// requestTime bounds one attempt at something small.
	requestTime = 10 * time.Second
	// stallTime is how long an upload may stand still.
	stallTime = 30 * time.Second
	// keyLife is how long credentials are used before they are read again.
	keyLife = time.Minute
)

// Keys are what a bucket is opened with. Their text is never part of an error.
type Keys struct{ Access, Secret, Session string }

// Config says which bucket, and by what.
type Config struct {
	// Name is what the host calls it, for errors.
	Name string
	// Bucket, Region and Prefix: Prefix is "" or ends in a slash, and is what the mount shows.
	Bucket, Region, Prefix string
	// Endpoint is the URL of an object store; "" is AWS's own.
	Endpoint string
	// PathStyle puts the bucket's name in the path instead of the host's name.
	PathStyle bool
	// ReadOnly refuses what would change it.
	ReadOnly bool
	// Keys reads the credentials: when they are used and were read more than a minute ago, and at most once a
	// second when the object store refuses them. Its error is one line without them.
	Keys func(context.Context) (Keys, error)
	// Metrics is optional.
	Metrics *Metrics
	// Transport is what requests go through; nil means one of the Store's own, without a proxy.
	Transport http.RoundTripper
	// Closed is called once, at the end of Close; optional.
	Closed func()
}

// Store is a Remote by S3 itself. Close it once.
type Store struct {
	cfg     Config
	bucket  *blob.Bucket
	s3      bool
	close   func()
	uploads chan struct{}
}

var _ Remote = (*Store)(nil)

// Open makes a Store; it does not reach out to the bucket.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	through, done := cfg.Transport, cfg.Closed
	if through == nil {
		transport := &http.Transport{
			ForceAttemptHTTP2: false, MaxIdleConnsPerHost: 64, IdleConnTimeout: time.Minute,
			DialContext:         (&net.Dialer{Timeout: 5 * time.Second, KeepAlive: 15 * time.Second}).DialContext,
			TLSHandshakeTimeout: 10 * time.Second, ResponseHeaderTimeout: stallTime,
			TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12},
		}
		through, done = transport, func() {
			transport.CloseIdleConnections()
			if cfg.Closed != nil {
				cfg.Closed()
			}
		}
	}
	keys := newKeyring(cfg.Keys)
	options := s3.Options{
		Region: cfg.Region, Credentials: keys.cache, UsePathStyle: cfg.PathStyle,
		APIOptions: []func(*middleware.Stack) error{keys.middleware},
		HTTPClient: &http.Client{Transport: through, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }},
		// What is not AWS's own does not know newer checksums.
		RequestChecksumCalculation: aws.RequestChecksumCalculationWhenRequired,
		ResponseChecksumValidation: aws.ResponseChecksumValidationWhenRequired,
		Retryer: retry.NewStandard(func(o *retry.StandardOptions) {
			o.MaxAttempts, o.MaxBackoff = 5, 500*time.Millisecond
			o.RateLimiter = ratelimit.None // attempts are bounded by number and by the context
		}),
	}
	if cfg.Endpoint != "" {
		options.BaseEndpoint = aws.String(cfg.Endpoint)
	}
	b, err := s3blob.OpenBucket(ctx, s3.New(options), cfg.Bucket, &s3blob.Options{RequestChecksumCalculation: aws.RequestChecksumCalculationWhenRequired})
	if err != nil {
		return nil, fmt.Errorf("bucket %s: %w", cfg.Name, err)
	}
	s := newStore(b, cfg)
	s.s3 = true
	if done != nil {
		s.close = done
	}
	return s, nil
}

func newStore(b *blob.Bucket, cfg Config) *Store {
	return &Store{cfg: cfg, bucket: b, close: func() {}, uploads: make(chan struct{}, maxUploads)}
}

// Close closes it; nothing of it may be under way.
func (s *Store) Close() error {
	err := s.bucket.Close()
	s.close()
	return err
}

// s3Code is the error's code in the terms of S3; "" if the server did not answer with one.
func s3Code(err error) string {
	var answered interface{ ErrorCode() string }
	if errors.As(err, &answered) {
		return answered.ErrorCode()
	}
	return ""
}

// refused are the codes for credentials that a server does not know or that don't hold;
// the last is versitygw's.
var refused = []string{"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "XAdminUserNotFound"}

// never tells whether trying again cannot help.
func never(err error) bool {
	var coded *proto.Error
	if errors.As(err, &coded) || errors.Is(err, errChanged) {
		return true
	}
	switch gcerrors.Code(err) {
	case gcerrors.NotFound, gcerrors.PermissionDenied, gcerrors.InvalidArgument, gcerrors.FailedPrecondition:
		return true
	}
	code := s3Code(err)
	return code == "NoSuchBucket" || code == "AccessDenied" || code == "PreconditionFailed" || code == "InvalidRange" ||
		code == "AuthorizationHeaderMalformed" || code == "PermanentRedirect" || code == "EntityTooLarge" ||
		code == "InvalidBucketName" || slices.Contains(refused, code)
}

// failure is an error in words, and with a code.
func (s *Store) failure(ctx context.Context, what string, err error) error {
	if err == nil {
		return nil
	}
	say := func(code proto.Code, format string, args ...any) error {
		return &proto.Error{Code: code, Message: fmt.Sprintf("bucket %s: ", s.cfg.Name) + fmt.Sprintf(format, args...), Err: err}
	}
	var coded *proto.Error
	if errors.As(err, &coded) {
		return &proto.Error{Code: coded.Code, Message: fmt.Sprintf("bucket %s: %s", s.cfg.Name, coded.Message), Err: err}
	}
	if cause := context.Cause(ctx); errors.As(cause, &coded) {
		return cause
	}
	switch code := s3Code(err); {
	case errors.Is(err, errChanged), code == "PreconditionFailed":
		return fmt.Errorf("bucket %s: %w", s.cfg.Name, errChanged)
	case code == "NoSuchBucket" || code == "InvalidBucketName":
		return say(proto.CodeSourceConfig, "there is no such bucket at this endpoint: mend bucket, region or endpoint in attachments.buckets")
	case slices.Contains(refused, code):
		return say(proto.CodeSourceCredentials, "the object store refuses the credentials (%s): mend access_key and secret_key in attachments.buckets", code)
	case code == "AuthorizationHeaderMalformed" || code == "PermanentRedirect":
		return say(proto.CodeSourceConfig, "it is in another region (%s): mend region or endpoint in attachments.buckets", code)
	case code == "AccessDenied" || gcerrors.Code(err) == gcerrors.PermissionDenied:
		return say(proto.CodePolicyDenied, "the credentials do not permit to %s", what)
	case gcerrors.Code(err) == gcerrors.NotFound:
		return say(proto.CodeNotFound, "there is no such object")
	case ctx.Err() != nil && errors.Is(ctx.Err(), context.Canceled):
		return say(proto.CodeCancelled, "%s: taken back", what)
	case code != "":
		return say(proto.CodeUnavailable, "it cannot %s: the object store answers %s", what, code)
	}
	return say(proto.CodeUnavailable, "it cannot %s: %s", what, strings.Join(strings.Fields(err.Error()), " "))
}

// again does something until it works.
func (s *Store) again(ctx context.Context, what string, do func(context.Context) error) error {
	pause := firstPause
	var before error
	for attempt := 1; ; attempt++ {
		try, cancel := context.WithTimeout(ctx, requestTime)
		err := do(try)
		cancel()
		if errors.Is(err, context.DeadlineExceeded) && before != nil {
			err = before // says more
		}
		before = err
		if err == nil || ctx.Err() != nil || never(err) || attempt == attempts {
			return s.failure(ctx, what, err)
		}
		if !sleep(ctx, pause) {
			return s.failure(ctx, what, err)
		}
		pause = min(2*pause, lastPause)
	}
}

func sleep(ctx context.Context, most time.Duration) bool {
	t := time.NewTimer(most/2 + rand.N(most/2+1))
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// Head implements Remote.
func (s *Store) Head(ctx context.Context, key string) (o Object, err error) {
	if err := checkKey(key); err != nil {
		return o, err
	}
	err = s.again(ctx, "look for an object", func(ctx context.Context) error {
		o, err = s.head(ctx, key)
		return err
	})
	return o, err
}

func (s *Store) head(ctx context.Context, key string) (Object, error) {
	a, err := s.bucket.Attributes(ctx, s.cfg.Prefix+key)
	if err != nil {
		return Object{}, err
	}
	return Object{Key: key, Size: a.Size, ETag: a.ETag, Modified: a.ModTime}, nil
}

// List implements Remote.
func (s *Store) List(ctx context.Context, directory, token string, limit int) (page Page, err error) {
	if err := checkDirectory(directory); err != nil {
		return page, err
	}
	if limit < 1 || limit > MaxPage {
		return page, proto.Errorf(proto.CodeInvalid, "a page has 1 to %d entries", MaxPage)
	}
	at := []byte(token)
	if token == "" {
		at = blob.FirstPageToken
	}
	prefix := s.cfg.Prefix + directory
	err = s.again(ctx, "list objects", func(ctx context.Context) error {
		found, next, err := s.bucket.ListPage(ctx, at, limit, &blob.ListOptions{Prefix: prefix, Delimiter: "/"})
		if err != nil {
			return err
		}
		page = Page{Next: string(next)}
		for _, o := range found {
			s.entry(&page, directory, prefix, o)
		}
		return nil
	})
	return page, err
}

// entry adds what a listing has found, or counts it as hidden.
func (s *Store) entry(page *Page, directory, prefix string, o *blob.ListObject) {
	raw, etag := o.Key, ""
	var object types.Object
	var common types.CommonPrefix
	switch {
	case o.As(&object):
		raw, etag = aws.ToString(object.Key), aws.ToString(object.ETag)
	case o.As(&common):
		raw = aws.ToString(common.Prefix)
	}
	if raw == prefix {
		page.Marker = true
		return
	}
	name, under := strings.CutPrefix(o.Key, prefix)
	if o.IsDir {
		name = strings.TrimSuffix(name, "/")
	}
	if raw != o.Key || !under || !ValidName(name) || len(directory)+len(name) > MaxKey {
		page.Hidden++
		return
	}
	e := Entry{Name: name, Directory: o.IsDir}
	if !o.IsDir {
		e.Object = Object{Key: directory + name, Size: o.Size, ETag: etag, Modified: o.ModTime}
	}
	page.Entries = append(page.Entries, e)
}

// Read implements Remote. A body that breaks off is fetched on from there.
func (s *Store) Read(ctx context.Context, key, etag string, off, n int64, w io.Writer) error {
	if err := errors.Join(checkKey(key), checkRange(off, n)); err != nil {
		return err
	}
	if n == 0 {
		return nil
	}
	pause := firstPause
	for attempt := 1; ; attempt++ {
		done, err := s.read(ctx, key, etag, off, n, w)
		off, n = off+done, n-done
		if done > 0 {
			attempt, pause = 1, firstPause
		}
		if n == 0 {
			return nil
		}
		if err == nil {
			err = io.ErrUnexpectedEOF
		}
		if ctx.Err() != nil || never(err) || attempt == attempts || !sleep(ctx, pause) {
			return s.failure(ctx, "read an object", err)
		}
		pause = min(2*pause, lastPause)
	}
}

// taker is where a body goes. Its own errors are told from the body's.
type taker struct {
	io.Writer
	err error
}

// Write implements io.Writer.
func (t *taker) Write(b []byte) (int, error) {
	n, err := t.Writer.Write(b)
	if err != nil {
		t.err = err
	}
	return n, err
}

func (s *Store) read(ctx context.Context, key, etag string, off, n int64, w io.Writer) (int64, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if !s.s3 && etag != "" {
		if o, err := s.head(ctx, key); err != nil {
			return 0, err
		} else if o.ETag != etag {
			return 0, errChanged
		}
	}
	stalled := errors.New("the object store sends nothing")
	timer := time.AfterFunc(requestTime, func() { cancel(stalled) })
	defer timer.Stop()
	r, err := s.bucket.NewRangeReader(ctx, s.cfg.Prefix+key, off, n, &blob.ReaderOptions{BeforeRead: func(as func(any) bool) error {
		var in *s3.GetObjectInput
		if etag != "" && as(&in) {
			in.IfMatch = aws.String(etag)
		}
		return nil
	}})
	if err != nil {
		return 0, err
	}
	defer r.Close() //nolint:errcheck // it was read, or not
	to := &taker{Writer: w}
	done, err := exactly(to, &progress{Reader: r, timer: timer, every: requestTime}, n)
	if to.err != nil {
		return done, &proto.Error{Code: proto.CodeCancelled, Message: "whoever asked has gone", Err: to.err}
	}
	return done, err
}

// mayWrite refuses changes where the configuration does.
func (s *Store) mayWrite() error {
	if s.cfg.ReadOnly {
		return proto.Errorf(proto.CodePolicyDenied, "bucket %s is read-only on this host: see attachments.buckets in agentd.yaml", s.cfg.Name)
	}
	return nil
}

// Write implements Remote.
func (s *Store) Write(ctx context.Context, key string, r io.ReaderAt, size int64) (Object, error) {
	return s.WriteStream(ctx, key, io.NewSectionReader(r, 0, size), size)
}

// WriteStream is Write of a body that can be read once; a failure that the SDK's own
// attempts at a part do not get over is the caller's to try again.
func (s *Store) WriteStream(ctx context.Context, key string, r io.Reader, size int64) (o Object, err error) {
	switch err := errors.Join(s.mayWrite(), checkKey(key)); {
	case err != nil:
		return o, err
	case size > MaxObject:
		return o, proto.Errorf(proto.CodeBodyTooLarge, "bucket %s: %d bytes are more than %d", s.cfg.Name, size, int64(MaxObject))
	}
	select {
	case s.uploads <- struct{}{}:
		defer func() { <-s.uploads }()
	case <-ctx.Done():
		return o, s.failure(ctx, "write an object", ctx.Err())
	}
	up, from, stop := watch(ctx, r, stallTime, "bucket "+s.cfg.Name)
	defer stop()
	w, err := s.bucket.NewWriter(up, s.cfg.Prefix+key, &blob.WriterOptions{
		BufferSize: partSize, MaxConcurrency: uploadParts, ContentType: "application/octet-stream", DisableContentTypeDetection: true,
	})
	if err != nil {
		return o, s.failure(up, "write an object", err)
	}
	if _, err := exactly(w, from, size); err != nil {
		stop() // closing would make an object of what has come
		return o, s.failure(up, "write an object", errors.Join(err, ignore(w.Close())))
	}
	// The last parts are on their way.
	from.timer.Reset(4 * stallTime)
	if err := w.Close(); err != nil {
		return o, s.failure(up, "write an object", err)
	}
	return s.Head(ctx, key)
}

// ignore drops the error of closing what has failed already.
func ignore(error) error { return nil }

// Copy implements Remote.
func (s *Store) Copy(ctx context.Context, dst, src string) (o Object, err error) {
	if err := errors.Join(s.mayWrite(), checkKey(dst), checkKey(src)); err != nil {
		return o, err
	}
	err = s.again(ctx, "copy an object", func(ctx context.Context) error {
		return s.bucket.Copy(ctx, s.cfg.Prefix+dst, s.cfg.Prefix+src, nil)
	})
	if err != nil {
		return o, err
	}
	return s.Head(ctx, dst)
}

// Delete implements Remote.
func (s *Store) Delete(ctx context.Context, key string) error {
	if err := errors.Join(s.mayWrite(), checkKey(key)); err != nil {
		return err
	}
	err := s.again(ctx, "remove an object", func(ctx context.Context) error { return s.bucket.Delete(ctx, s.cfg.Prefix+key) })
	if NotFound(err) {
		return nil
	}
	return err
}
