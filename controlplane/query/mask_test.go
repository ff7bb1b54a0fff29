package query

import (
	"context"
	"io"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// stored takes what would be stored.
type stored struct{ texts []string }

func (s *stored) note(q *posternv1.Query) {
	s.texts = append(s.texts, q.Sql, q.Error.GetMessage(), q.Error.GetSql().GetHint(), q.Error.GetSql().GetDetail())
}

func (s *stored) InsertQuery(_ context.Context, _, _ string, q *posternv1.Query) error {
	s.note(q)
	return nil
}

func (s *stored) FinishQuery(_ context.Context, _ string, q *posternv1.Query) error {
	s.note(q)
	return nil
}

func (s *stored) KeepRows(context.Context, string, string, []byte, time.Time) error { return nil }
func (s *stored) KeptRows(context.Context, string, string) ([]byte, error)          { return nil, nil }

func (s *stored) Append(_ context.Context, e Entry) error {
	s.note(e.Query)
	return nil
}

// TestStoredTexts: nothing that a source's patterns match is stored, in history or
// audit, of a statement and its error.
func TestStoredTexts(t *testing.T) {
	const secret = "4111111111111111"
	for name, test := range map[string]struct {
		patterns []string
		want     string
	}{
		"no patterns":      {nil, "SELECT '" + secret + "'"},
		"a pattern":        {[]string{`\b\d{13,19}\b`}, "SELECT '***'"},
		"of a newer agent": {[]string{`(`}, notKept},
	} {
		t.Run(name, func(t *testing.T) {
			var s stored
			r := NewRunner(Config{
				Logger: slog.New(slog.NewTextHandler(io.Discard, nil)), History: &s, Audit: &s, Metrics: NewMetrics(prometheus.NewRegistry()),
				Find: func(context.Context, string, string) (*posternv1.Agent, error) {
					return &posternv1.Agent{Id: "agt_1", Name: "host", Sources: []*posternv1.SourceInfo{{Name: "db", TextPatterns: test.patterns}}}, nil
				},
				Connect: func(string) (Agent, error) {
					return nil, &proto.Error{
						Code: proto.CodeSQL, Message: "near " + secret,
						SQL: &posternv1.SQLErrorDetail{Hint: "hint " + secret, Detail: "detail " + secret},
					}
				},
			})
			_, err := r.Start(t.Context(), Request{
				Principal: &posternv1.Principal{Organization: "org_1"}, Agent: "host", Source: "db",
				Statement: &posternv1.RunSQLRequest{Sql: "SELECT '" + secret + "'"},
			})
			if proto.CodeOf(err) != proto.CodeSQL {
				t.Fatalf("got %v", err)
			}
			all := strings.Join(s.texts, "\n")
			if len(test.patterns) > 0 && strings.Contains(all, secret) {
				t.Errorf("stored:\n%s", all)
			}
			if len(s.texts) != 12 || s.texts[0] != test.want || s.texts[4] != test.want {
				t.Errorf("got %q", s.texts)
			}
		})
	}
}
