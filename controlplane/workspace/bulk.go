package workspace

import (
	"bufio"
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"

	protobuf "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/controlplane/filetree"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/filechunk"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

const (
	// maxFetch bounds the chunks that one request fetches.
	maxFetch = 256
	// storeBatch is how many chunks of a request are in memory, and written, at once;
	// maxStore bounds those of a request.
	storeBatch, maxStore = 16, 1024
	// maxFetchRequest bounds the list of hashes, in bytes.
	maxFetchRequest = maxFetch * (hashSize + 8)
)

const contentTypeChunks = "application/vnd.postern.chunks"

// fail answers a plain HTTP request with an error.
func (s *Service) fail(w http.ResponseWriter, r *http.Request, what string, err error) {
	if proto.CodeOf(err) == proto.CodeInternal && r.Context().Err() == nil {
		s.cfg.Logger.Error("request of files failed", "request", what, "err", err)
	}
	proto.WriteHTTPError(w, err)
}

// serveFetch sends chunks to an agent, in the order asked for.
func (s *Service) serveFetch(w http.ResponseWriter, r *http.Request) {
	a := s.cfg.Agent(r.Context())
	leave, err := s.busy.enter("bulk "+a.ID, agentBulk)
	if err != nil {
		s.fail(w, r, "fetch chunks", err)
		return
	}
	defer leave()
	ws, hashes, err := s.fetchRequest(w, r, a)
	if err != nil {
		s.fail(w, r, "fetch chunks", err)
		return
	}
	s.sendChunks(w, r, ws, hashes)
}

func (s *Service) fetchRequest(w http.ResponseWriter, r *http.Request, a Agent) (*filetree.Workspace, []filetree.Hash, error) {
	ws, err := s.forAgent(r.Context(), a, r.PathValue("workspace"))
	if err != nil {
		return nil, nil, err
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxFetchRequest))
	if err != nil {
		return nil, nil, proto.Errorf(proto.CodeInvalid, "the request did not arrive whole, or is longer than %d bytes", maxFetchRequest)
	}
	var request posternv1.FetchChunksRequest
	if err := protobuf.Unmarshal(body, &request); err != nil {
		return nil, nil, proto.Errorf(proto.CodeInvalid, "the request is no FetchChunksRequest")
	}
	hashes, err := toHashes(request.Hashes, maxFetch)
	return ws, hashes, err
}

// sendChunks sends frames. The answer says how long it is, so that nobody on its way has to
// look for its end.
func (s *Service) sendChunks(w http.ResponseWriter, r *http.Request, ws *filetree.Workspace, hashes []filetree.Hash) {
	begun := false
	begin := func() {
		if !begun {
			begun = true
			w.WriteHeader(http.StatusOK)
		}
	}
	found := func(bytes int64) {
		w.Header().Set("Content-Type", contentTypeChunks)
		w.Header().Set("Content-Length", strconv.FormatInt(bytes+int64(len(hashes))*filechunk.FrameHeader, 10))
	}
	var gone error // the agent does not listen any more
	err := s.cfg.Chunks.Each(r.Context(), ws.Organization, ws.Number, hashes, found, func(chunk []byte) error {
		begin()
		if gone = filechunk.WriteFrame(w, chunk); gone == nil {
			s.cfg.Metrics.moved("agent", "out", len(chunk))
		}
		return gone
	})
	switch {
	case gone != nil:
	case err == nil:
		begin() // of no chunks
	case !begun:
		w.Header().Del("Content-Length")
		s.fail(w, r, "fetch chunks", err)
	default:
		s.cfg.Logger.Warn("chunks not sent", "workspace", ws.ID, "err", err)
		panic(http.ErrAbortHandler) // the reader must not take this for the end
	}
}

// serveStore takes chunks from an agent.
func (s *Service) serveStore(w http.ResponseWriter, r *http.Request) {
	a := s.cfg.Agent(r.Context())
	leave, err := s.busy.enter("bulk "+a.ID, agentBulk)
	if err == nil {
		defer leave()
		var ws *filetree.Workspace
		if ws, err = s.forAgent(r.Context(), a, r.PathValue("workspace")); err == nil {
			err = s.takeChunks(w, r, ws, "agent")
		}
	}
	if err != nil {
		s.fail(w, r, "store chunks", err)
	}
}

// takeChunks stores the frames of a request and answers with their hashes.
func (s *Service) takeChunks(w http.ResponseWriter, r *http.Request, ws *filetree.Workspace, peer string) error {
	resp := &posternv1.StoreChunksResponse{}
	body := bufio.NewReaderSize(r.Body, 64<<10)
	var batch [][]byte
	var err error
	for ended := false; !ended; {
		var chunk []byte
		chunk, err = filechunk.ReadFrame(body, make([]byte, filechunk.Size))
		switch {
		case errors.Is(err, io.EOF):
			ended = true
		case errors.Is(err, filechunk.ErrFrame):
			return proto.Errorf(proto.CodeInvalid, "the body is not chunks in frames: %v", err)
		case err != nil:
			return proto.Errorf(proto.CodeInvalid, "the chunks did not arrive whole")
		default:
			batch = append(batch, chunk)
			s.cfg.Metrics.moved(peer, "in", len(chunk))
		}
		if len(resp.Hashes)+len(batch) > maxStore {
			return proto.Errorf(proto.CodeBodyTooLarge, "more than %d chunks in one request", maxStore)
		}
		if len(batch) == storeBatch || ended && len(batch) > 0 {
			hashes, err := s.cfg.Chunks.Put(r.Context(), ws.Organization, ws.Number, batch)
			if err != nil {
				return err
			}
			resp.Hashes = append(resp.Hashes, fromHashes(hashes)...)
			batch = nil
		}
	}
	encoded, err := protobuf.Marshal(resp)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/proto")
	w.Write(encoded) //nolint:errcheck // the caller has gone
	return nil
}

// AgentHandler serves AttachService and the chunks beside it, to agents on their tunnels;
// the paths are those of AgentPaths.
func (s *Service) AgentHandler() http.Handler {
	mux := http.NewServeMux()
	path, handler := attachHandler(s)
	mux.Handle(path, handler)
	mux.HandleFunc("POST "+attachPath+"{workspace}/fetch", s.serveFetch)
	mux.HandleFunc("POST "+attachPath+"{workspace}/store", s.serveStore)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		proto.WriteHTTPError(w, proto.Errorf(proto.CodeNotFound, "no such request on a tunnel: %s %q", r.Method, clip(r.URL.Path)))
	})
	return mux
}

const attachPath = "/postern/v1/attach/"

// IsAgentPath reports whether AgentHandler is to serve a path.
func IsAgentPath(path string) bool {
	return strings.HasPrefix(path, attachPath) || strings.HasPrefix(path, attachServicePath)
}
