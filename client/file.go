package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// FilePath is a place in a workspace.
type FilePath struct {
	// Workspace is its name or id.
	Workspace string
	// Path begins with "/" and has no empty, "." or ".." part; "/" is the workspace itself. Its
	// bytes need not be UTF-8.
	Path string
}

// String is WORKSPACE:/path.
func (p FilePath) String() string { return p.Workspace + ":" + p.Path }

// Base is the last part of the path; empty for the workspace itself.
func (p FilePath) Base() string { return p.Path[strings.LastIndexByte(p.Path, '/')+1:] }

// Join is what name, of one or several parts, means below p.
func (p FilePath) Join(name string) FilePath {
	return FilePath{Workspace: p.Workspace, Path: strings.TrimSuffix(p.Path, "/") + "/" + name}
}

// ParseFilePath reads WORKSPACE[:[/]path].
func ParseFilePath(text string) (FilePath, error) {
	workspace, path, _ := strings.Cut(text, ":")
	if workspace == "" || strings.Contains(workspace, "/") {
		return FilePath{}, fmt.Errorf("%q names no file of a workspace: write WORKSPACE:/path", text)
	}
	p := FilePath{Workspace: workspace, Path: "/"}
	for part := range strings.SplitSeq(path, "/") {
		switch part {
		case "", ".":
		case "..":
			return FilePath{}, fmt.Errorf("%q: a path in a workspace has no \"..\"", text)
		default:
			if err := checkName(part); err != nil {
				return FilePath{}, fmt.Errorf("%q: %w", text, err)
			}
			p = p.Join(part)
		}
	}
	return p, nil
}

// checkName reports what keeps a name from being one in a workspace and on a file system.
func checkName(name string) error {
	switch {
	case name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00"):
		return fmt.Errorf("%q is no file name", name)
	case len(name) > 255:
		return fmt.Errorf("a name of %d bytes: at most 255", len(name))
	}
	return nil
}

// filesURL is where the contents of p are.
func (c *Client) filesURL(kind string, p FilePath, query url.Values) string {
	var b strings.Builder
	b.WriteString(c.base.String())
	b.WriteString("/api/v1/" + kind + "/" + url.PathEscape(p.Workspace))
	if kind != "chunks" {
		for part := range strings.SplitSeq(strings.TrimPrefix(p.Path, "/"), "/") {
			b.WriteString("/" + url.PathEscape(part))
		}
	}
	if len(query) > 0 {
		b.WriteString("?" + query.Encode())
	}
	return b.String()
}

// send makes a plain HTTP request; a status other than 2xx becomes its error.
func (c *Client) send(ctx context.Context, method, address string, header http.Header, body []byte) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, address, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	for name, values := range header {
		req.Header[name] = values
	}
	resp, err := c.http.Do(req)
	if err != nil {
		var public *proto.Error
		if errors.As(err, &public) { // without *url.Error's prefix
			return nil, public
		}
		return nil, err
	}
	if resp.StatusCode/100 != 2 {
		defer resp.Body.Close() //nolint:errcheck // it was only read
		return nil, proto.ReadHTTPError(resp)
	}
	return resp, nil
}

const (
	// patience is how long transfers wait for a control plane that does not answer before
	// they give up; what was done until then is there when they are begun again.
	patience = time.Minute
	// retryFirst and retryMost are how long is waited between two attempts.
	retryFirst, retryMost = 200 * time.Millisecond, 5 * time.Second
)

// again calls f until it succeeds, fails for good, or was without success for patience.
// f must be safe to repeat, and may call moved when something was done.
func again(ctx context.Context, f func(moved func()) error) error {
	last, wait := time.Now(), retryFirst
	for {
		err := f(func() { last, wait = time.Now(), retryFirst })
		if err == nil || !transient(err) || ctx.Err() != nil || time.Since(last) > patience {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
		wait = min(2*wait, retryMost)
	}
}

// Slowly calls f again for as long as the control plane only says that it is asked too often; at
// most for a minute.
func Slowly(ctx context.Context, f func() error) error {
	var last error
	err := again(ctx, func(func()) error {
		last = f()
		switch proto.CodeOf(last) {
		case proto.CodeRateLimited, proto.CodeOverloaded:
			return last
		}
		return nil
	})
	if err != nil {
		return err
	}
	return last
}

// transient reports whether err may be gone at the next attempt.
func transient(err error) bool {
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		return true
	}
	switch proto.CodeOf(err) {
	case proto.CodeUnavailable, proto.CodeTimeout, proto.CodeRateLimited, proto.CodeOverloaded:
		return true
	}
	return false
}

// GetFile tells what is at p.
func (c *Client) GetFile(ctx context.Context, p FilePath) (*posternv1.FileInfo, error) {
	var info *posternv1.FileInfo
	err := Slowly(ctx, func() error {
		resp, err := c.Files.GetFile(ctx, connect.NewRequest(&posternv1.FileRequest{Workspace: p.Workspace, Path: []byte(p.Path)}))
		if err == nil {
			info = resp.Msg
		}
		return err
	})
	return info, err
}

// ListFiles calls take for all that is in the directory p, and below it if recursive, a
// directory before what is in it. It holds a page in memory, not the list.
func (c *Client) ListFiles(ctx context.Context, p FilePath, recursive bool, take func(*posternv1.FileInfo) error) error {
	req := &posternv1.ListFilesRequest{Workspace: p.Workspace, Path: []byte(p.Path), Recursive: recursive}
	for {
		var page *posternv1.ListFilesResponse
		err := again(ctx, func(func()) error {
			resp, err := c.Files.ListFiles(ctx, connect.NewRequest(req))
			if err == nil {
				page = resp.Msg
			}
			return err
		})
		if err != nil {
			return err
		}
		for _, f := range page.Files {
			if err := take(f); err != nil {
				return err
			}
		}
		if len(page.NextPageToken) == 0 {
			return nil
		}
		req.PageToken = page.NextPageToken
	}
}

func nodeTime(n *posternv1.Node) time.Time { return time.Unix(0, n.GetMtimeNs()) }
