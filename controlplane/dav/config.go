package dav

import (
	"context"
	"io"
	"net/http"
	"time"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// Prefix is where a Server's paths begin.
	Prefix = "/dav/"
	// MaxEntries bounds the directories that can be listed.
	MaxEntries = 100_000
	// MaxLocks bounds the locks of an organization.
	MaxLocks = 10_000
	// LockTime is how long a lock lasts that is not refreshed.
	LockTime = time.Hour
	// maxBody bounds the body of every request but PUT, in bytes.
	maxBody = 1 << 20
	// maxToken bounds a token's text, in bytes.
	maxToken = 4096
)

// Caller is who asks.
type Caller struct {
	*posternv1.Principal
	// Remote is the address the request came from.
	Remote string
}

// Tokens knows the API tokens.
type Tokens interface {
	// Authenticate returns whose token it is, or UNAUTHENTICATED, RATE_LIMITED or
	// ORGANIZATION_DISABLED. remote limits failures.
	Authenticate(ctx context.Context, bearer, remote string) (Caller, error)
}

// Files are the workspaces of the caller's organization, as the caller's role allows. Paths begin
// with "/" and are clean. Errors are *proto.Error.
type Files interface {
	Workspaces(ctx context.Context, c Caller) ([]*posternv1.Workspace, error)
	Get(ctx context.Context, c Caller, workspace, path string) (*posternv1.FileInfo, error)
	// List calls take for what is in a directory.
	List(ctx context.Context, c Caller, workspace, path string, take func(*posternv1.FileInfo) error) error
	MakeDirectory(ctx context.Context, c Caller, workspace, path string) error
	// Move fails with ALREADY_EXISTS if something is at to.
	Move(ctx context.Context, c Caller, workspace, from, to string) error
	// SetAttribute changes an extended attribute of what is there in one step; change gets what
	// it is, nil if there is none, and gives what it becomes, nil for none.
	SetAttribute(ctx context.Context, c Caller, workspace, path, name string, change func(old []byte) ([]byte, error)) error
	// Remove puts what is there into the trash, with all that is below.
	Remove(ctx context.Context, c Caller, workspace, path string) error
	// Read opens the content that info tells of, from byte from on.
	Read(ctx context.Context, c Caller, workspace string, info *posternv1.FileInfo, from int64) (io.ReadCloser, error)
	// Write makes a file of all that r has, in place of what is there; nothing if r fails.
	Write(ctx context.Context, c Caller, workspace, path string, r io.Reader) (*posternv1.FileInfo, error)
}

// Limiter bounds how often a key may do something; see package ratelimit.
type Limiter interface {
	Allow(key string) bool
}

// Config is what a Server needs. All fields are required.
type Config struct {
	Tokens Tokens
	Files  Files
	// Permit fails for a caller whose role does not allow to read files, or to write them.
	Permit func(p *posternv1.Principal, write bool) error
	// Remote is the address that a request comes from.
	Remote func(*http.Request) string
	// Requests bounds the requests of each token, by its id.
	Requests Limiter
}
