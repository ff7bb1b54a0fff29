package kernel

import (
	"bytes"
	"context"
	"encoding/json"
	"io"

	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
	"github.com/postern-dev/postern/proto/jupyter"
	"github.com/postern-dev/postern/proto/kernelstream"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// Attach asks for a kernel's channels.
type Attach struct {
	Kernel string
	// Client names who attaches, at most 128 bytes: see
	// posternv1.KernelChannelsRequest.
	Client string
	// Resume asks for what this client has not confirmed.
	Resume bool
	// After is the newest message that it has, for a host that has forgotten the client.
	After uint64
	// Again says that this client's stream was lost and its audit entry is written.
	Again bool
}

// maxClient bounds a client's name, in bytes.
const maxClient = 128

// Channels are a kernel's channels: a stream of package kernelstream. It is closed by
// its owner.
type Channels struct {
	io.ReadWriteCloser
	// Agent is the agent that has the kernel.
	Agent *posternv1.Agent
	// Retired is closed when the stream should be opened anew: the agent's tunnel makes
	// way for another one.
	Retired <-chan struct{}
}

// Attach opens a kernel's channels for its owner. ctx bounds the opening alone.
func (s *Service) Attach(ctx context.Context, c Caller, r Attach) (*Channels, error) {
	if len(r.Client) > maxClient {
		return nil, proto.Errorf(proto.CodeInvalid, "a client's session id has at most %d bytes", maxClient)
	}
	row, agent, l, err := s.reach(ctx, c, r.Kernel, true)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, agentTime)
	defer cancel()
	retired := l.Retired()
	stream, err := kernelstream.Dial(ctx, l, &posternv1.KernelChannelsRequest{KernelId: r.Kernel, Principal: c.Principal, Client: r.Client, Resume: r.Resume, AfterSequence: r.After})
	if err != nil && s.unheld(ctx, row, l, err) {
		if row, agent, l, err = s.reach(ctx, c, r.Kernel, true); err == nil {
			retired = l.Retired()
			stream, err = kernelstream.Dial(ctx, l, &posternv1.KernelChannelsRequest{KernelId: r.Kernel, Principal: c.Principal, Client: r.Client, Resume: r.Resume, AfterSequence: r.After})
		}
	}
	if !r.Again {
		aerr := s.audit(ctx, c, "kernel.attach", agent, r.Kernel, err, func(e *auditchain.Entry) { e.SessionID = r.Client })
		if aerr != nil && err == nil {
			stream.Close() //nolint:errcheck // nothing was done with it
			err = aerr
		}
	}
	if err != nil {
		return nil, s.gone(ctx, row, err)
	}
	return &Channels{ReadWriteCloser: stream, Agent: agent, Retired: retired}, nil
}

// Record writes the audit entry of a message that makes the kernel run code, before
// it is sent: of an execute_request the code and the expressions with it, of a
// debugger's evaluate the expression; other messages leave none. It fails when the entry can't be
// kept, and then the message must not be sent.
func (s *Service) Record(ctx context.Context, c Caller, agent *posternv1.Agent, kernel, client string, header jupyter.Header, m *posternv1.KernelMessage) error {
	code, runs := codeOf(header.Type, m.Content)
	if !runs {
		return nil
	}
	return s.audit(ctx, c, "kernel.execute", agent, kernel, nil, func(e *auditchain.Entry) {
		e.SessionID, e.Statement, e.Outcome = client, s.masks.code(agent, code), "sent"
	})
}

// codeOf is the code that a message makes the kernel run.
func codeOf(kind string, content []byte) (code string, runs bool) {
	switch kind {
	case "execute_request":
		var r struct {
			Code        string          `json:"code"`
			Expressions json.RawMessage `json:"user_expressions"`
		}
		if json.Unmarshal(content, &r) != nil {
			return string(content), true // the kernel may understand what we don't
		}
		if e := bytes.TrimSpace(r.Expressions); len(e) > 0 && string(e) != "{}" && string(e) != "null" {
			r.Code += "\n# user_expressions: " + string(e)
		}
		return r.Code, true
	case "debug_request":
		var r struct {
			Command   string `json:"command"`
			Arguments struct {
				Expression string `json:"expression"`
			} `json:"arguments"`
		}
		if json.Unmarshal(content, &r) != nil {
			return string(content), true
		}
		return r.Arguments.Expression, r.Command == "evaluate" || r.Arguments.Expression != ""
	}
	return "", false
}
