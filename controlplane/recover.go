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

// recoverQueries ends what this control plane left running when it was killed,
// with a word in the history and in the audit log.
func recoverQueries(ctx context.Context, s *store.Store, log *audit.Log, logger *slog.Logger) error {
	n, err := s.FailRunningQueries(ctx, proto.Detail(errKilled), time.Now())
	if err != nil || n == 0 {
		return err
	}
	logger.Warn("queries of a killed control plane ended", "queries", n)
	return log.Append(ctx, auditchain.Entry{
		Time: time.Now(), Actor: "system", Action: "sql.lost", Outcome: "failed", Rows: uint64(n), Error: errKilled.Error(),
	})
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
