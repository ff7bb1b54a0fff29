package blob

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"gocloud.dev/blob"
	"gocloud.dev/blob/fileblob"
	"gocloud.dev/blob/s3blob"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Open opens the object store at where: a directory, which is made if its parent is there,
// or "s3://BUCKET?region=R&endpoint=URL&prefix=P/&use_path_style=true". Credentials come
// from where the AWS SDK looks for them (environment, ~/.aws, an instance's role), never
// from the address. ctx bounds the opening, which does not reach out to the bucket: see
// Check.
func Open(ctx context.Context, where string, cfg Config) (*Store, error) {
	s := &Store{cfg: cfg}
	if !strings.Contains(where, "://") {
		var err error
		if s.dir, err = openDirectory(where); err != nil {
			return nil, fmt.Errorf("--blob %s: %w", where, err)
		}
		opened, err := fileblob.OpenBucket(s.dir.root, &fileblob.Options{DirFileMode: 0o700, NoTempDir: true, Metadata: fileblob.MetadataDontWrite})
		if err != nil {
			return nil, fmt.Errorf("--blob %s: %w", where, err)
		}
		s.bucket, s.name = cloud{opened}, where
		return s, nil
	}
	opened, err := openS3(ctx, where)
	if err != nil {
		return nil, fmt.Errorf("--blob: %w", err)
	}
	s.bucket, s.name = s3Bucket{cloud{opened}}, strings.SplitN(where, "?", 2)[0]
	return s, nil
}

// Validate reports what is wrong with an address, without opening anything.
func Validate(where string) error {
	if !strings.Contains(where, "://") {
		return nil
	}
	_, _, err := parseS3(where)
	return err
}

func parseS3(where string) (*url.URL, string, error) {
	u, err := url.Parse(where)
	switch {
	case err != nil:
		return nil, "", errors.New("it is not a URL") // which may hold anything
	case u.Scheme != "s3":
		return nil, "", fmt.Errorf("%s:// is not understood: give a directory or s3://BUCKET", u.Scheme)
	case u.User != nil:
		return nil, "", errors.New("credentials don't belong in the address: the AWS SDK takes them from its environment variables, files or the instance's role")
	case u.Host == "":
		return nil, "", errors.New("s3:// without a bucket's name")
	case u.Path != "" && u.Path != "/":
		return nil, "", fmt.Errorf("the path %q is not understood: say prefix=%s/", u.Path, strings.Trim(u.Path, "/"))
	}
	q := u.Query()
	if endpoint := q.Get("endpoint"); endpoint != "" {
		e, err := url.Parse(endpoint)
		switch {
		case err != nil || e.Scheme != "https" && e.Scheme != "http" || e.Host == "":
			return nil, "", errors.New("endpoint= must be https://HOST or https://HOST:PORT")
		case e.User != nil:
			return nil, "", errors.New("credentials don't belong in the endpoint: the AWS SDK takes them from its environment variables, files or the instance's role")
		}
	}
	prefix := q.Get("prefix")
	q.Del("prefix")
	// The SDK would answer for an altered object as it does for a network that fails, and it
	// would be asked for again. What is read is opened by its seal and hashed in any case.
	if !q.Has("response_checksum_validation") {
		q.Set("response_checksum_validation", "when_required")
	}
	u.RawQuery = q.Encode()
	u.Path = ""
	if prefix != "" && !strings.HasSuffix(prefix, "/") {
		return nil, "", fmt.Errorf("prefix=%s must end in a slash", prefix)
	}
	return u, prefix, nil
}

func openS3(ctx context.Context, where string) (*blob.Bucket, error) {
	u, prefix, err := parseS3(where)
	if err != nil {
		return nil, err
	}
	bucket, err := (&s3blob.URLOpener{}).OpenBucketURL(ctx, u)
	if err != nil {
		return nil, err
	}
	if prefix != "" {
		bucket = blob.PrefixedBucket(bucket, prefix)
	}
	return bucket, nil
}

// isFull reports that a directory's file system is full.
func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// directory makes what fileblob writes durable: it renames, but syncs nothing.
type directory struct {
	root string

	mu     sync.Mutex
	synced map[string]bool // directories whose own names are durable; at most maxSynced
}

const maxSynced = 100_000

// strandedAge is how old a temporary file must be to be taken for one that its writer
// left behind.
const strandedAge = time.Hour

func openDirectory(root string) (*directory, error) {
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, err
	}
	if err := os.Mkdir(root, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	info, err := os.Stat(root)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		return nil, errors.New("it is not a directory")
	}
	// Links on the way are the operator's, systemd's DynamicUser makes one. From here on
	// there are none.
	if root, err = filepath.EvalSymlinks(root); err != nil {
		return nil, err
	}
	if err := syncPath(filepath.Dir(root)); err != nil {
		return nil, err
	}
	d := &directory{root: root, synced: map[string]bool{}}
	return d, d.sweep()
}

// sweep removes temporary files that a process which was killed has left behind.
func (d *directory) sweep() error {
	stranded, err := filepath.Glob(filepath.Join(d.root, "v1", "*", "*", "*.tmp"))
	if err != nil {
		return err
	}
	for _, path := range stranded {
		if info, err := os.Lstat(path); err == nil && info.Mode().IsRegular() && time.Since(info.ModTime()) > strandedAge {
			os.Remove(path) //nolint:errcheck // the next start tries again
		}
	}
	return nil
}

func (d *directory) path(key string) string { return filepath.Join(d.root, filepath.FromSlash(key)) }

// sync makes objects that were written durable, with their names.
func (d *directory) sync(keys []string) error {
	var group errgroup.Group
	group.SetLimit(parallel)
	for _, key := range keys {
		group.Go(func() error { return syncPath(d.path(key)) })
	}
	if err := group.Wait(); err != nil {
		return err
	}
	return d.syncParents(keys)
}

// syncRemoved makes the removal of objects durable. Some never were: their writer was killed
// after it had noted them, before it made their directory.
func (d *directory) syncRemoved(keys []string) error {
	there := slices.DeleteFunc(slices.Clone(keys), func(key string) bool {
		_, err := os.Lstat(filepath.Dir(d.path(key)))
		return errors.Is(err, os.ErrNotExist)
	})
	return d.syncParents(there)
}

func (d *directory) syncParents(keys []string) error {
	dirs := map[string]bool{}
	for _, key := range keys {
		dirs[filepath.Dir(d.path(key))] = true
	}
	var group errgroup.Group
	group.SetLimit(parallel)
	for dir := range dirs {
		group.Go(func() error {
			if err := syncPath(dir); err != nil {
				return err
			}
			// A directory that is new is a name in the one above it.
			for at := dir; at != d.root && !d.isSynced(at); at = filepath.Dir(at) {
				if err := syncPath(filepath.Dir(at)); err != nil {
					return err
				}
				d.setSynced(at)
			}
			return nil
		})
	}
	return group.Wait()
}

func (d *directory) isSynced(dir string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.synced[dir]
}

func (d *directory) setSynced(dir string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.synced) >= maxSynced {
		clear(d.synced)
	}
	d.synced[dir] = true
}

func syncPath(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	err = unix.Fsync(fd)
	if cerr := unix.Close(fd); err == nil {
		err = cerr
	}
	if err != nil {
		return &os.PathError{Op: "sync", Path: path, Err: err}
	}
	return nil
}
