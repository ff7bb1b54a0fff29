package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	public "github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/filechunk"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// batchChunks are asked for and sent in one request.
	batchChunks = 8
	// batches are under way at once, of all uploads of an Uploader: they bound its memory, with
	// filechunk.Size each chunk, to 48 MiB.
	batches = 6
	// maxStored bounds the answer to a batch of chunks, in bytes.
	maxStored = 64 << 10
)

// Uploader sends files into workspaces. Files may be sent by several goroutines at once;
// together they use at most 48 MiB.
type Uploader struct {
	client *Client
	// room holds a buffer for each batch that is not under way; nil: not made yet.
	room chan []byte
	// Progress is told how many bytes more are settled, and how many of them had to be sent; optional.
	Progress func(settled, sent int64)
}

// NewUploader returns an Uploader.
func (c *Client) NewUploader() *Uploader {
	u := &Uploader{client: c, room: make(chan []byte, batches), Progress: func(int64, int64) {}}
	for range batches {
		u.room <- nil
	}
	return u
}

// Upload says what becomes of a content.
type Upload struct {
	To FilePath
	// Mode are the permission bits; 0: 0644.
	Mode uint32
	// ModTime is when the content changed; zero: now.
	ModTime time.Time
	// Base is the version that it replaces, 0 for none: if another is there, both are kept. Nil:
	// whatever is there is replaced.
	Base *uint64
	// Parents makes the directories that are missing.
	Parents bool
}

// Upload sends what r has. It sends only chunks that the workspace has not, and waits a
// minute for a control plane that does not answer; begun anew it goes on where it was.
func (u *Uploader) Upload(ctx context.Context, what Upload, r io.Reader) (*posternv1.FileInfo, error) {
	commit := what.request()
	if err := u.content(ctx, commit, r); err != nil {
		return nil, err
	}
	var info *posternv1.FileInfo
	err := again(ctx, func(func()) error {
		resp, err := u.client.Files.CommitFile(ctx, connect.NewRequest(commit))
		if err == nil {
			info = resp.Msg
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	if want := filechunk.ETag(commit.Size, chunksOf(commit)); info.Etag != want && info.Conflict == nil {
		return nil, fmt.Errorf("%s is not what was sent: checksum %.12s, sent %.12s: send it again", what.To, info.Etag, want)
	}
	return info, nil
}

// UploadAll sends small contents, at most MaxUploadAll of at most filechunk.MaxInline bytes, in one
// request. The errors are those of each.
func (u *Uploader) UploadAll(ctx context.Context, workspace string, what []Upload, contents [][]byte) ([]error, error) {
	r := &posternv1.CommitFilesRequest{Workspace: workspace}
	for i, w := range what {
		commit := w.request()
		commit.Size, commit.Inline = uint64(len(contents[i])), contents[i]
		r.Files = append(r.Files, commit)
	}
	var results []*posternv1.CommitFileResult
	err := again(ctx, func(func()) error {
		resp, err := u.client.Files.CommitFiles(ctx, connect.NewRequest(r))
		if err == nil {
			results = resp.Msg.Results
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	if len(results) != len(what) {
		return nil, fmt.Errorf("the control plane answered for %d of %d files", len(results), len(what))
	}
	errs := make([]error, len(what))
	for i, result := range results {
		switch {
		case result.Error != nil:
			errs[i] = public.FromDetail(result.Error)
		case result.File.GetEtag() != filechunk.ETag(r.Files[i].Size, filechunk.Names(contents[i])):
			errs[i] = fmt.Errorf("%s is not what was sent: send it again", what[i].To)
		default:
			u.Progress(int64(len(contents[i])), int64(len(contents[i])))
		}
	}
	return errs, nil
}

// MaxUploadAll bounds the files of one UploadAll.
const MaxUploadAll = 256

func (w Upload) request() *posternv1.CommitFileRequest {
	r := &posternv1.CommitFileRequest{
		Workspace: w.To.Workspace, Path: []byte(w.To.Path), Mode: w.Mode, BaseVersion: w.Base, Parents: w.Parents,
	}
	if !w.ModTime.IsZero() {
		r.MtimeNs = w.ModTime.UnixNano()
	}
	return r
}

// Symlink makes a symbolic link with that target at to.
func (c *Client) Symlink(ctx context.Context, to FilePath, target string, parents bool) (*posternv1.FileInfo, error) {
	var info *posternv1.FileInfo
	err := again(ctx, func(func()) error {
		resp, err := c.Files.CommitFile(ctx, connect.NewRequest(&posternv1.CommitFileRequest{
			Workspace: to.Workspace, Path: []byte(to.Path), Symlink: []byte(target), Parents: parents,
		}))
		if err == nil {
			info = resp.Msg
		}
		return err
	})
	return info, err
}

// MakeDirectory makes a directory with those above it; no error if it is there.
func (c *Client) MakeDirectory(ctx context.Context, p FilePath) error {
	return again(ctx, func(func()) error {
		_, err := c.Files.MakeDirectory(ctx, connect.NewRequest(&posternv1.MakeDirectoryRequest{Workspace: p.Workspace, Path: []byte(p.Path), Parents: true}))
		return err
	})
}

func chunksOf(c *posternv1.CommitFileRequest) [][]byte {
	if len(c.Inline) > 0 {
		return filechunk.Names(c.Inline)
	}
	return c.Chunks
}

// content stores what r has, and notes in commit what it is.
func (u *Uploader) content(ctx context.Context, commit *posternv1.CommitFileRequest, r io.Reader) error {
	g, ctx := errgroup.WithContext(ctx)
	var parts []*[][]byte // the names of each batch, which its goroutine finds
	var failed error
	for last := false; !last && failed == nil; {
		var room []byte
		select {
		case room = <-u.room:
		case <-ctx.Done():
			if err := g.Wait(); err != nil {
				return err
			}
			return ctx.Err()
		}
		if room == nil {
			room = make([]byte, filechunk.Size*batchChunks)
		}
		n, err := io.ReadFull(r, room)
		batch := room[:n]
		commit.Size += uint64(n)
		switch {
		case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
			last = true
		case err != nil:
			failed = fmt.Errorf("read: %w", err)
		}
		if failed != nil || n == 0 || last && len(parts) == 0 && n <= filechunk.MaxInline {
			if failed == nil && n > 0 {
				commit.Inline = bytes.Clone(batch)
				u.Progress(int64(n), int64(n))
			}
			u.room <- room
			break
		}
		names := new([][]byte)
		parts = append(parts, names)
		g.Go(func() error {
			defer func() { u.room <- room }()
			*names = filechunk.Names(batch)
			sent, err := u.store(ctx, commit.Workspace, batch, *names)
			if err == nil {
				u.Progress(int64(n), sent)
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for _, names := range parts {
		commit.Chunks = append(commit.Chunks, *names...)
	}
	return failed
}

// store sees to it that the control plane has the chunks of batch, and tells how many bytes it sent.
func (u *Uploader) store(ctx context.Context, workspace string, batch []byte, names [][]byte) (sent int64, err error) {
	var solid [][]byte
	for _, name := range names {
		if len(name) > 0 {
			solid = append(solid, name)
		}
	}
	if len(solid) == 0 {
		return 0, nil
	}
	err = again(ctx, func(func()) error {
		resp, err := u.client.Files.MissingFileChunks(ctx, connect.NewRequest(&posternv1.MissingFileChunksRequest{Workspace: workspace, Hashes: solid}))
		if err != nil {
			return err
		}
		missing := map[string]bool{}
		for _, name := range resp.Msg.Hashes {
			missing[string(name)] = true
		}
		var body bytes.Buffer
		var want [][]byte
		for i, name := range names {
			if !missing[string(name)] || len(name) == 0 {
				continue
			}
			delete(missing, string(name)) // twice in one batch: once is enough
			if err := filechunk.WriteFrame(&body, chunkOf(batch, i)); err != nil {
				return err
			}
			want = append(want, name)
		}
		if len(want) == 0 {
			return nil
		}
		if err := u.send(ctx, workspace, body.Bytes(), want); err != nil {
			return err
		}
		sent = int64(body.Len())
		return nil
	})
	return sent, err
}

func chunkOf(batch []byte, i int) []byte {
	return batch[i*filechunk.Size : min(len(batch), (i+1)*filechunk.Size)]
}

// send stores frames, whose names must come back.
func (u *Uploader) send(ctx context.Context, workspace string, frames []byte, want [][]byte) error {
	header := http.Header{"Content-Type": {"application/octet-stream"}}
	resp, err := u.client.send(ctx, http.MethodPost, u.client.filesURL("chunks", FilePath{Workspace: workspace}, nil), header, frames)
	if err != nil {
		return err
	}
	defer resp.Body.Close() //nolint:errcheck // it was only read
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxStored))
	if err != nil {
		return err
	}
	var stored posternv1.StoreChunksResponse
	if err := proto.Unmarshal(raw, &stored); err != nil {
		return fmt.Errorf("the answer to stored chunks can't be read: %w", err)
	}
	if len(stored.Hashes) != len(want) {
		return fmt.Errorf("the control plane stored %d chunks of %d", len(stored.Hashes), len(want))
	}
	for i := range want {
		if !bytes.Equal(stored.Hashes[i], want[i]) {
			return fmt.Errorf("the control plane stored another chunk than was sent: checksum %x, sent %x", stored.Hashes[i][:min(6, len(stored.Hashes[i]))], want[i][:6])
		}
	}
	return nil
}
