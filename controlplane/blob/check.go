package blob

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"gocloud.dev/gcerrors"

	"github.com/postern-dev/postern/proto"
)

// checkTime bounds a check: longer than the SDK's own attempts at a bucket that answers
// slowly, shorter than systemd's patience with a start.
const checkTime = 30 * time.Second

// Check writes, reads and removes a small object of its own, v1/.check.RANDOM, and says in
// one line what is wrong: that there is no such bucket, that the credentials are refused,
// what they don't permit, or that nothing answers within 30 seconds. A store that is full
// passes: files must be removable. A process that is killed meanwhile leaves the object.
func (s *Store) Check(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, checkTime)
	defer cancel()
	var random [8]byte
	rand.Read(random[:]) //nolint:errcheck // it never fails
	key := "v1/.check." + hex.EncodeToString(random[:])
	body := []byte("Postern keeps chunks of files here.\n")
	if err := s.bucket.write(ctx, key, body); isFull(err) {
		s.cfg.Logger.Warn("no space is left in the object store", "blob", s.name)
		return nil
	} else if err != nil {
		return s.unusable(ctx, "written to", err)
	}
	got, err := s.bucket.read(ctx, key, make([]byte, len(body)+1))
	if err != nil {
		return s.unusable(ctx, "read", err)
	}
	if !bytes.Equal(got, body) {
		return s.unusable(ctx, "relied on", errors.New("it returns something else than was written"))
	}
	if err := s.bucket.remove(ctx, key); err != nil {
		return s.unusable(ctx, "removed from", err)
	}
	return nil
}

// refused are the codes for credentials that a server does not know or that don't hold;
// the last is versitygw's.
var refused = []string{"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "XAdminUserNotFound"}

// unusable is what an operator reads who gave an address that does not work.
func (s *Store) unusable(ctx context.Context, what string, err error) error {
	say := func(code proto.Code, format string, args ...any) error {
		return &proto.Error{Code: code, Message: fmt.Sprintf("--blob %s: ", s.name) + fmt.Sprintf(format, args...), Err: err}
	}
	switch code := s3Code(err); {
	case errors.Is(err, errNoBucket):
		return say(proto.CodeInvalid, "there is no such bucket at this endpoint: make it, or mend the name, region= or endpoint=")
	case slices.Contains(refused, code):
		return say(proto.CodeInvalid, "the object store refuses the credentials (%s): mend AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or wherever the AWS SDK has them from", code)
	case code == "AuthorizationHeaderMalformed" || code == "PermanentRedirect":
		return say(proto.CodeInvalid, "the bucket is in another region (%s): mend region= or endpoint=", code)
	case code == "AccessDenied" || gcerrors.Code(err) == gcerrors.PermissionDenied:
		return say(proto.CodeInvalid, "it can't be %s: permission denied; the credentials need GetObject, PutObject, DeleteObject and ListBucket", what)
	case code != "":
		return say(proto.CodeUnavailable, "it can't be %s: the object store answers %s", what, code)
	case strings.Contains(err.Error(), "get credentials"):
		return say(proto.CodeInvalid, "there are no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or another source that the AWS SDK knows")
	case ctx.Err() != nil:
		return say(proto.CodeUnavailable, "it does not answer within %v: is endpoint= right?", checkTime)
	}
	return say(proto.CodeUnavailable, "it can't be %s: %s", what, strings.Join(strings.Fields(err.Error()), " "))
}

// s3Code is the error's code in the terms of S3; "" if the server did not answer with one.
func s3Code(err error) string {
	var answered interface{ ErrorCode() string }
	if errors.As(err, &answered) {
		return answered.ErrorCode()
	}
	return ""
}

// errNoBucket is no "not found": a bucket that is not there says nothing about its objects.
var errNoBucket = errors.New("there is no such bucket")

func withoutBucket(err error) error {
	if s3Code(err) == "NoSuchBucket" {
		return fmt.Errorf("%w", errNoBucket)
	}
	return err
}
