package main

import (
	"context"

	"connectrpc.com/connect"
	gproto "google.golang.org/protobuf/proto"

	"github.com/postern-dev/postern/agentd/audit"
	"github.com/postern-dev/postern/agentd/host"
	"github.com/postern-dev/postern/agentd/report"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

var (
	_ host.Local = (*report.Reporter)(nil)
	_ report.Log = (*audit.Log)(nil)
)

// newReporter makes what tells the control plane of kernels' statements.
func (d *Daemon) newReporter() *report.Reporter {
	return report.New(report.Config{Logger: d.logger, Log: d.log, Send: func(ctx context.Context, m *posternv1.ReportStatementsRequest) (*posternv1.ReportStatementsResponse, error) {
		client, err := d.link.ClientFor(gproto.Size(m))
		if err != nil {
			return nil, err
		}
		response, err := client.ReportStatements(ctx, connect.NewRequest(m))
		if connect.CodeOf(err) == connect.CodeUnimplemented {
			return nil, proto.Errorf(proto.CodeVersionMismatch, "the control plane is of a version that does not take statements of kernels: upgrade it")
		}
		if err != nil {
			return nil, proto.FromConnect(err)
		}
		return response.Msg, nil
	}})
}
