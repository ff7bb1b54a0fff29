package workspace

import (
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"path"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/controlplane/filetree"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/filechunk"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

const (
	// maxRequest bounds a request with a list of chunks, in bytes: that of a file of
	// 1.4 TiB without holes.
	maxRequest = 48 << 20
	// userBulk bounds the transfers that one token has under way at once.
	userBulk = 16
)

var attachServicePath = "/" + posternv1connect.AttachServiceName + "/"

func attachHandler(s *Service) (string, http.Handler) {
	return posternv1connect.NewAttachServiceHandler(attach{s: s}, s.options()...)
}

func (s *Service) options() []connect.HandlerOption {
	return []connect.HandlerOption{
		connect.WithReadMaxBytes(maxRequest),
		connect.WithRecover(func(_ context.Context, spec connect.Spec, _ http.Header, r any) error {
			s.cfg.Logger.Error("panic in a request", "request", spec.Procedure, "err", r)
			return proto.ConnectError(proto.Errorf(proto.CodeInternal, "internal error: the detail is in the server's log"))
		}),
	}
}

// FileHandler serves FileService: its path, and the handler.
func (s *Service) FileHandler() (string, http.Handler) {
	return posternv1connect.NewFileServiceHandler(files{s: s}, s.options()...)
}

// ServeFile serves GET, HEAD and PUT of /api/v1/files/{workspace}/{path...}.
func (s *Service) ServeFile(w http.ResponseWriter, r *http.Request) {
	c := s.cfg.Caller(r.Context())
	leave, err := s.busy.enter("user "+c.TokenId, userBulk)
	if err == nil {
		defer leave()
		if r.Method == http.MethodPut {
			err = s.upload(w, r, c)
		} else {
			err = s.download(w, r, c)
		}
	}
	if err != nil {
		s.fail(w, r, "transfer a file", err)
	}
}

// filePath is the path that a request names; net/http has undone the escapes.
func filePath(r *http.Request) []byte { return []byte("/" + r.PathValue("path")) }

// download sends a file.
func (s *Service) download(w http.ResponseWriter, r *http.Request, c Caller) error {
	var version uint64
	if text := r.URL.Query().Get("version"); text != "" {
		var err error
		if version, err = strconv.ParseUint(text, 10, 63); err != nil || version == 0 {
			return proto.Errorf(proto.CodeInvalid, "version=%q is no number of a version", clip(text))
		}
	}
	body, ws, err := s.open(r.Context(), c, r.PathValue("workspace"), filePath(r), version)
	if err != nil {
		return err
	}
	e := entryFor(c, "file.get", ws.Name, filePath(r))
	e.Bytes = body.size
	if version != 0 {
		e.Target += "@" + strconv.FormatUint(version, 10)
	}
	if r.Method != http.MethodHead {
		if err := s.audited(r.Context(), e, nil); err != nil {
			return err
		}
	}
	h := w.Header()
	h.Set("ETag", `"`+body.etag+`"`)
	h.Set("X-Postern-Version", strconv.FormatUint(body.version, 10))
	h.Set("Content-Type", contentType(string(filePath(r))))
	h.Set("Content-Disposition", "attachment")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "private, no-cache")
	http.ServeContent(&abortingWriter{ResponseWriter: w, body: body}, r, "", time.Unix(0, body.mtime), body)
	if body.err != nil && r.Context().Err() == nil {
		s.cfg.Logger.Warn("file not sent whole", "workspace", ws.ID, "err", body.err)
		panic(http.ErrAbortHandler) // the reader must not take this for the end
	}
	return nil
}

func contentType(name string) string {
	if t := mime.TypeByExtension(path.Ext(name)); t != "" {
		return t
	}
	return "application/octet-stream"
}

// abortingWriter counts what was sent.
type abortingWriter struct {
	http.ResponseWriter
	body *body
}

// Write implements io.Writer.
func (a *abortingWriter) Write(p []byte) (int, error) {
	n, err := a.ResponseWriter.Write(p)
	a.body.s.cfg.Metrics.moved("user", "out", n)
	return n, err
}

// body reads a version of a file. It has a few chunks in memory. It is an io.ReadSeeker,
// not for concurrent use; err is what broke it.
type body struct {
	s       *Service
	ctx     context.Context // the request's
	ws      *filetree.Workspace
	id      uint64
	version uint64
	size    uint64
	mtime   int64
	etag    string
	inline  []byte

	at     int64
	names  [][]byte // of chunks from the index first on
	first  uint64
	chunks map[uint64][]byte // by index; nil: a hole
	err    error
}

// open opens a file, or one of its versions.
func (s *Service) open(ctx context.Context, c Caller, workspace string, at []byte, version uint64) (*body, *filetree.Workspace, error) {
	b := &body{s: s, ctx: ctx, chunks: map[uint64][]byte{}}
	w, err := s.read(ctx, c, workspace, func(t *tree) error {
		n, _, err := t.find(at)
		if err != nil {
			return err
		}
		if n.Type != filetree.File {
			return proto.Errorf(proto.CodeInvalid, "%s:%s is no file", t.ws.Name, clip(string(at)))
		}
		return b.load(t, &n.Node, version)
	})
	b.ws = w
	return b, w, err
}

func (b *body) load(t *tree, n *filetree.Node, version uint64) error {
	b.id, b.version, b.mtime = n.ID, n.Version, n.Mtime
	if version != 0 {
		b.version = version
	}
	if b.version == 0 {
		b.etag, b.inline = filechunk.ETag(0, nil), []byte{}
		return nil
	}
	v, err := t.tx.Version(t.ctx, n.ID, b.version)
	if err != nil {
		return err
	}
	if v == nil {
		return proto.Errorf(proto.CodeNotFound, "the file has no version %d: it may have been too old to be kept", b.version)
	}
	if b.version != n.Version {
		b.mtime = v.Created.UnixNano()
	}
	b.size, b.inline, b.etag = v.Size, v.Inline, fmt.Sprintf("%x", v.ETag)
	if v.Size == 0 {
		b.inline = []byte{}
	}
	return nil
}

// Seek implements io.Seeker.
func (b *body) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += b.at
	case io.SeekEnd:
		offset += int64(b.size)
	}
	if offset < 0 {
		return 0, errors.New("seek before the beginning")
	}
	b.at = offset
	return offset, nil
}

// readAhead is how many chunks a download has in memory.
const readAhead = 4

// Read implements io.Reader.
func (b *body) Read(p []byte) (int, error) {
	if b.err != nil {
		return 0, b.err
	}
	if uint64(b.at) >= b.size {
		return 0, io.EOF
	}
	if b.inline != nil {
		n := copy(p, b.inline[b.at:])
		b.at += int64(n)
		return n, nil
	}
	index := uint64(b.at) / filechunk.Size
	chunk, have := b.chunks[index]
	if !have {
		if b.err = b.fetch(index); b.err != nil {
			return 0, b.err
		}
		chunk = b.chunks[index]
	}
	offset := int(uint64(b.at) % filechunk.Size)
	length := filechunk.Length(b.size, index)
	var n int
	if chunk == nil {
		n = min(len(p), length-offset)
		clear(p[:n])
	} else {
		if len(chunk) != length {
			b.err = fmt.Errorf("chunk %d of file %d has %d bytes, not %d", index, b.id, len(chunk), length)
			return 0, b.err
		}
		n = copy(p, chunk[offset:])
	}
	b.at += int64(n)
	return n, nil
}

// fetch gets a chunk and those that follow.
func (b *body) fetch(index uint64) error {
	if index < b.first || index >= b.first+uint64(len(b.names)) {
		err := b.s.cfg.Store.ReadFiles(b.ctx, b.ws.Organization, b.ws.ID, func(tx filetree.Tx) error {
			v, err := tx.Version(b.ctx, b.id, b.version)
			if err != nil {
				return err
			}
			if v == nil {
				return proto.Errorf(proto.CodeNotFound, "version %d of the file was removed while it was being read", b.version)
			}
			b.names, _, err = chunksOf(b.ctx, tx, v, index, filetree.SegmentChunks)
			b.first = index
			return err
		})
		if err != nil {
			return err
		}
		if len(b.names) == 0 {
			return fmt.Errorf("file %d has no chunk %d", b.id, index)
		}
	}
	clear(b.chunks)
	var hashes []filetree.Hash
	var at []uint64
	for i := index; i < min(index+readAhead, b.first+uint64(len(b.names))); i++ {
		if name := b.names[i-b.first]; len(name) > 0 {
			hashes, at = append(hashes, filetree.Hash(name)), append(at, i)
		} else {
			b.chunks[i] = nil
		}
	}
	chunks, err := b.s.cfg.Chunks.Get(b.ctx, b.ws.Organization, b.ws.Number, hashes)
	for i := range chunks {
		b.chunks[at[i]] = chunks[i]
	}
	return err
}

// upload stores the body of a request as a file. If-Match may name the version ("3") or
// the ETag that it replaces, If-None-Match: * that there is none.
func (s *Service) upload(w http.ResponseWriter, r *http.Request, c Caller) error {
	ws, err := s.orMake(r.Context(), c, r.PathValue("workspace"))
	if err != nil {
		return err
	}
	p := put{path: filePath(r), parents: true}
	if p.base, err = s.precondition(r, c, ws); err != nil {
		return err
	}
	if p.content, err = s.receive(r.Context(), ws, r.Body); err != nil {
		return err
	}
	info, err := s.putFile(r.Context(), c, ws.ID, p)
	if err != nil {
		return err
	}
	if info.Conflict != nil {
		// A conflict was kept; but who named a base wants to know before all else.
		w.Header().Set("X-Postern-Kept-As", strconv.Quote(string(info.Conflict.KeptAs)))
	}
	w.Header().Set("ETag", `"`+info.Etag+`"`)
	w.Header().Set("X-Postern-Version", strconv.FormatUint(info.Node.Version, 10))
	w.WriteHeader(http.StatusCreated)
	return nil
}

// orMake finds a workspace, or makes it.
func (s *Service) orMake(ctx context.Context, c Caller, name string) (*filetree.Workspace, error) {
	w, err := s.cfg.Store.Workspace(ctx, c.Organization, name)
	if proto.CodeOf(err) != proto.CodeNotFound || strings.HasPrefix(name, workspacePrefix) { // an id is no name
		return w, err
	}
	w, err = s.create(ctx, c.Organization, name)
	if proto.CodeOf(err) == proto.CodeAlreadyExists { // somebody else, just now
		return s.cfg.Store.Workspace(ctx, c.Organization, name)
	}
	return w, s.audited(ctx, entryFor(c, "workspace.create", clip(name), nil), err)
}

func (s *Service) precondition(r *http.Request, c Caller, ws *filetree.Workspace) (*uint64, error) {
	var none uint64
	if r.Header.Get("If-None-Match") == "*" {
		return &none, nil
	}
	match := strings.Trim(strings.TrimSpace(r.Header.Get("If-Match")), `"`)
	if match == "" {
		return nil, nil
	}
	if version, err := strconv.ParseUint(match, 10, 63); err == nil {
		return &version, nil
	}
	b, _, err := s.open(r.Context(), c, ws.ID, filePath(r), 0)
	switch {
	case proto.CodeOf(err) == proto.CodeNotFound:
		none = filetree.NoBase
		return &none, nil
	case err != nil:
		return nil, err
	case b.etag != match && match != "*":
		none = filetree.NoBase // nothing has this version: it is a conflict
		return &none, nil
	}
	return &b.version, nil
}

// uploadBatch is how many chunks of an upload are in memory at once.
const uploadBatch = 8

// readChunk fills a chunk, or what is left; last tells that the stream is at its end. It is
// not io.ReadFull, whose io.ErrUnexpectedEOF a broken connection gives, too.
func readChunk(from io.Reader, chunk []byte) (n int, last bool, err error) {
	for n < len(chunk) {
		m, err := from.Read(chunk[n:])
		n += m
		if errors.Is(err, io.EOF) {
			return n, true, nil
		}
		if err != nil {
			return n, false, err
		}
	}
	return n, false, nil
}

// receive stores a stream as chunks.
func (s *Service) receive(ctx context.Context, ws *filetree.Workspace, from io.Reader) (content, error) {
	var c content
	var batch [][]byte
	flush := func() error {
		_, err := s.cfg.Chunks.Put(ctx, ws.Organization, ws.Number, batch)
		batch = nil
		return err
	}
	for {
		chunk := make([]byte, filechunk.Size)
		n, last, err := readChunk(from, chunk)
		chunk = chunk[:n]
		if err != nil {
			return c, proto.Errorf(proto.CodeInvalid, "the file did not arrive whole")
		}
		s.cfg.Metrics.moved("user", "in", n)
		if n > 0 {
			c.size += uint64(n)
			if last && c.size <= filechunk.MaxInline {
				c.inline = chunk
				return c, nil
			}
			if c.size > filechunk.MaxFile {
				return c, proto.Errorf(proto.CodeBodyTooLarge, "a file has at most %d bytes", uint64(filechunk.MaxFile))
			}
			name := filechunk.Name(chunk)
			c.chunks = append(c.chunks, name)
			if name != nil {
				batch = append(batch, chunk)
			}
		}
		if len(batch) == uploadBatch || last && len(batch) > 0 {
			if err := flush(); err != nil {
				return c, err
			}
		}
		if last {
			return c, nil
		}
	}
}

// ServeChunks serves POST /api/v1/chunks/{workspace}.
func (s *Service) ServeChunks(w http.ResponseWriter, r *http.Request) {
	c := s.cfg.Caller(r.Context())
	leave, err := s.busy.enter("user "+c.TokenId, userBulk)
	if err == nil {
		defer leave()
		var ws *filetree.Workspace
		if ws, err = s.cfg.Store.Workspace(r.Context(), c.Organization, r.PathValue("workspace")); err == nil {
			err = s.takeChunks(w, r, ws, "user")
		}
	}
	if err != nil {
		s.fail(w, r, "store chunks", err)
	}
}
