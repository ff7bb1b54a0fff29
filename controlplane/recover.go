package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/postern-dev/postern/controlplane/audit"
	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
)

// errKilled is how queries end whose control plane died.
var errKilled = proto.Errorf(proto.CodeUnavailable, "the control plane died while the query was under way; its host cancelled it in the database")

// recoverQueries ends what a control plane left running when it was killed, this one or
// another replica: each query gets the audit entry that it would have got at its
// end. The entries come first, so a second kill may repeat one but never loses one.
func recoverQueries(ctx context.Context, s *store.Store, log *audit.Log, logger *slog.Logger, replica string) error {
	lost, err := s.LostQueriesOf(ctx, replica)
	if err != nil || len(lost) == 0 {
		return err
	}
	for organization, queries := range lost {
		for _, q := range queries {
			err := log.Append(ctx, auditchain.Entry{
				Time: time.Now(), Organization: organization, Actor: "token " + q.TokenName, Action: "sql.run",
				Agent: q.Agent, Source: q.Source, QueryID: q.Id, Statement: q.Sql, Outcome: "failed", Error: errKilled.Error(),
				DurationMillis: time.Since(q.Started.AsTime()).Milliseconds(),
			})
			if err != nil {
				return err
			}
		}
	}
	n, err := s.FailRunningQueriesOf(ctx, replica, proto.Detail(errKilled), time.Now())
	logger.Warn("queries of a killed control plane ended", "replica", replica, "queries", n)
	return err
}

// replicaName tells this control plane from others on the same database, also
// after a restart. It is kept in DATA/replica.
func replicaName(data string) (string, error) {
	path := filepath.Join(data, "replica")
	text, err := os.ReadFile(path)
	if err == nil && strings.TrimSpace(string(text)) != "" {
		return strings.TrimSpace(string(text)), nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("--data: %w", err)
	}
	name := rand.Text()
	if err := os.WriteFile(path, []byte(name+"\n"), 0o600); err != nil {
		return "", fmt.Errorf("--data: %w", err)
	}
	return name, nil
}
