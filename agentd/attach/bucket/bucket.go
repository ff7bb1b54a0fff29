package bucket

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/postern-dev/postern/proto"
)

const (
	// MaxKey bounds a key, in bytes: S3's limit.
	MaxKey = 1024
	// MaxName bounds a name, in bytes: Linux's limit.
	MaxName = 255
	// MaxPage bounds the entries of a Page: S3's limit.
	MaxPage = 1000
	// MaxObject bounds an object that is written, in bytes: 8192 parts of partSize.
	MaxObject = 8192 * partSize
	// MaxCopy bounds an object that is copied inside the bucket, in bytes: S3's limit.
	MaxCopy = 5 << 30
)

// Object is what a bucket says of an object.
type Object struct {
	Key      string    `json:"key"`
	Size     int64     `json:"size"`
	ETag     string    `json:"etag,omitempty"` // "": the listing did not say; Head does
	Modified time.Time `json:"modified"`
}

// Entry is a name in a directory.
type Entry struct {
	Name string `json:"name"`
	// Directory: there are keys below it; Object is nothing then.
	Directory bool   `json:"directory,omitempty"`
	Object    Object `json:"object,omitzero"`
}

// Page is a part of a directory, in the order of keys.
type Page struct {
	Entries []Entry `json:"entries"`
	// Marker: the directory has an object of its own, whose key ends in a slash.
	Marker bool `json:"marker,omitempty"`
	// Hidden counts the keys that cannot be files.
	Hidden int `json:"hidden,omitempty"`
	// Next asks for the next page; "": this was the last one.
	Next string `json:"next,omitempty"`
}

// Remote is a bucket. Errors that can be told apart: NotFound and Changed; others are
// *proto.Error, of POLICY_DENIED where the host's configuration or the bucket forbids it.
type Remote interface {
	// Head finds an object.
	Head(ctx context.Context, key string) (Object, error)
	// List gives a page of a directory, of at most limit entries (at most MaxPage).
	List(ctx context.Context, directory, token string, limit int) (Page, error)
	// Read writes n bytes of an object from off on to w, all or an error. Changed: it is not
	// the version that etag names any more.
	Read(ctx context.Context, key, etag string, off, n int64, w io.Writer) error
	// Write replaces an object by the size bytes of r; a failure leaves it as it was.
	Write(ctx context.Context, key string, r io.ReaderAt, size int64) (Object, error)
	// Copy makes dst of what src is, of at most MaxCopy bytes.
	Copy(ctx context.Context, dst, src string) (Object, error)
	// Delete removes an object; that there is none is no error.
	Delete(ctx context.Context, key string) error
}

// NotFound tells whether there is no such object.
func NotFound(err error) bool { return proto.CodeOf(err) == proto.CodeNotFound }

// Changed tells whether an object is another version than the one asked for.
func Changed(err error) bool { return errors.Is(err, errChanged) }

// Denied tells whether the configuration or the bucket does not allow it.
func Denied(err error) bool { return proto.CodeOf(err) == proto.CodePolicyDenied }

var errChanged = errors.New("the object has changed")

// ValidName tells whether a name in a bucket can be a file's.
func ValidName(name string) bool {
	switch {
	case name == "" || name == "." || name == ".." || len(name) > MaxName || !utf8.ValidString(name):
		return false
	case strings.ContainsRune(name, '/'):
		return false
	}
	for _, r := range name {
		if r < ' ' || r == 0x7f {
			return false
		}
	}
	return !escaped(name)
}

// escaped tells whether gocloud would take a part of a key for an escape: __0x2f__.
func escaped(key string) bool {
	_, rest, found := strings.Cut(key, "__0x")
	return found && strings.Contains(rest, "__")
}

// checkKey refuses what is no key of ours; a directory's ends in a slash.
func checkKey(key string) error {
	if key == "" || len(key) > MaxKey {
		return proto.Errorf(proto.CodeInvalid, "a key has 1 to %d bytes", MaxKey)
	}
	for _, name := range strings.Split(strings.TrimSuffix(key, "/"), "/") {
		if !ValidName(name) {
			return proto.Errorf(proto.CodeInvalid, "%.80q cannot be a file's name", name)
		}
	}
	return nil
}

func checkDirectory(directory string) error {
	if directory == "" {
		return nil
	}
	if !strings.HasSuffix(directory, "/") {
		return proto.Errorf(proto.CodeInvalid, "a directory ends in a slash")
	}
	return checkKey(directory)
}

func checkRange(off, n int64) error {
	if off < 0 || n < 0 || off > 1<<53 || n > 1<<40 {
		return proto.Errorf(proto.CodeInvalid, "not a range of an object: %d bytes at %d", n, off)
	}
	return nil
}

// progress ends a context when nothing has moved for a while.
type progress struct {
	io.Reader
	timer *time.Timer
	every time.Duration
}

func watch(ctx context.Context, r io.Reader, every time.Duration, what string) (context.Context, *progress, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	p := &progress{Reader: r, every: every}
	p.timer = time.AfterFunc(every, func() {
		cancel(proto.Errorf(proto.CodeTimeout, "%s: nothing has moved for %v", what, every))
	})
	return ctx, p, func() { p.timer.Stop(); cancel(nil) }
}

// Read implements io.Reader.
func (p *progress) Read(b []byte) (int, error) {
	n, err := p.Reader.Read(b)
	if n > 0 {
		p.timer.Reset(p.every)
	}
	return n, err
}

// exactly copies n bytes.
func exactly(w io.Writer, r io.Reader, n int64) (int64, error) {
	done, err := io.Copy(w, io.LimitReader(r, n))
	if err == nil && done < n {
		err = fmt.Errorf("the body ends after %d of %d bytes: %w", done, n, io.ErrUnexpectedEOF)
	}
	return done, err
}
