package audit_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib"
	_ "modernc.org/sqlite"

	"github.com/postern-dev/postern/controlplane/audit"
	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/e2e/storetest"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/auditchain"
)

var ctx = context.Background()

const org = "org_acme"

func newLog(s audit.Store) *audit.Log {
	return audit.New(audit.Config{Store: s, DefaultOrganization: store.DefaultOrganizationID})
}

func write(t *testing.T, l *audit.Log, n int) {
	t.Helper()
	for i := range n {
		if err := l.Append(ctx, auditchain.Entry{Organization: org, Action: "test", Statement: fmt.Sprint("select ", i)}); err != nil {
			t.Fatal(err)
		}
	}
}

func verified(t *testing.T, l *audit.Log, organization string, want uint64) {
	t.Helper()
	if n, err := l.Verify(ctx, organization); err != nil || n.Entries() != want {
		t.Errorf("verify %s: got %+v, %v, want %d", organization, n, err, want)
	}
}

func TestAppendAndList(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		l := newLog(s)
		verified(t, l, org, 0)
		write(t, l, 5)
		if err := l.Append(ctx, auditchain.Entry{Action: "start"}); err != nil {
			t.Fatal(err)
		}
		verified(t, l, org, 5)
		verified(t, l, store.DefaultOrganizationID, 1)
		sequences := func(from uint64, limit int) string {
			t.Helper()
			lines, err := l.List(ctx, org, from, limit)
			if err != nil {
				t.Fatal(err)
			}
			var all []string
			for _, line := range lines {
				e, err := auditchain.Decode(line)
				if err != nil {
					t.Fatal(err)
				}
				all = append(all, fmt.Sprint(e.Sequence))
			}
			return strings.Join(all, " ")
		}
		for _, test := range []struct {
			from  uint64
			limit int
			want  string
		}{{0, 2, "5 4"}, {2, 2, "2 3"}, {5, 0, "5"}, {6, 0, ""}, {0, 0, "5 4 3 2 1"}, {1 << 63, 1, ""}, {1<<64 - 1, 1, ""}} {
			if got := sequences(test.from, test.limit); got != test.want {
				t.Errorf("list from %d, %d: got %q, want %q", test.from, test.limit, got, test.want)
			}
		}
	})
}

func TestEntriesAreBounded(t *testing.T) {
	s := storetest.SQLite(t)
	l := newLog(s)
	worst := strings.Repeat("\x00", 1<<20)
	e := auditchain.Entry{Organization: org, Action: "test", Statement: worst, Error: worst, Actor: worst, Target: worst, Agent: "é" + worst, Remote: worst}
	if err := l.Append(ctx, e); err != nil {
		t.Fatal(err)
	}
	if err := l.Append(context.Background(), auditchain.Entry{Organization: org, Action: "\xff"}); err != nil {
		t.Fatal(err)
	}
	verified(t, l, org, 2)
	lines, err := l.List(ctx, org, 1, 1)
	if err != nil || len(lines[0]) > auditchain.MaxLine {
		t.Fatalf("a line of %d bytes, %v", len(lines[0]), err)
	}
	if got, err := auditchain.Decode(lines[0]); err != nil || !strings.Contains(got.Statement, "(cut, 1048576 bytes in all)") {
		t.Errorf("the statement does not say that it was cut: %v", err)
	}
}

// TestWritersTogether: two control planes write one chain from many goroutines.
func TestWritersTogether(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		logs := []*audit.Log{newLog(s), newLog(s)}
		const each, callers = 5, 40
		var wg sync.WaitGroup
		for i := range callers {
			wg.Go(func() {
				for range each {
					if err := logs[i%2].Append(ctx, auditchain.Entry{Organization: org, Action: "test"}); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		verified(t, logs[0], org, each*callers)
	})
}

// TestGroups: entries that wait for the disk go there together, and a caller
// that has given up does not stop the others.
func TestGroups(t *testing.T) {
	s := storetest.SQLite(t)
	slow := &counting{Store: s, first: make(chan struct{}), resume: make(chan struct{})}
	l := newLog(slow)
	gone, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := l.Append(gone, auditchain.Entry{Organization: org, Action: "test"}); err != nil {
			t.Error(err)
		}
	})
	<-slow.first
	cancel()
	for range 100 {
		wg.Go(func() {
			if err := l.Append(gone, auditchain.Entry{Organization: org, Action: "test"}); err != nil {
				t.Error(err)
			}
		})
	}
	for audit.Waiting(l, org) < 100 {
		time.Sleep(time.Millisecond)
	}
	close(slow.resume)
	wg.Wait()
	verified(t, l, org, 101)
	if slow.writes > 3 {
		t.Errorf("%d writes for 101 entries", slow.writes)
	}
}

type counting struct {
	audit.Store
	once          sync.Once
	first, resume chan struct{}
	writes        int
}

func (c *counting) AppendAudit(ctx context.Context, org string, prev auditchain.Head, lines [][]byte, head auditchain.Head) error {
	c.once.Do(func() { close(c.first); <-c.resume })
	c.writes++
	return c.Store.AppendAudit(ctx, org, prev, lines, head)
}

// TestLostAnswer: a write that was carried out but whose answer was lost leaves
// no gap and no fork.
func TestLostAnswer(t *testing.T) {
	s := storetest.SQLite(t)
	l := newLog(&forgetful{Store: s})
	var failed int
	for range 10 {
		if err := l.Append(ctx, auditchain.Entry{Organization: org, Action: "test"}); err != nil {
			failed++
			if proto.CodeOf(err) != proto.CodeUnavailable {
				t.Error(err)
			}
		}
	}
	if failed != 5 {
		t.Errorf("%d failed, want 5", failed)
	}
	verified(t, l, org, 10)
}

type forgetful struct {
	audit.Store
	n int
}

func (f *forgetful) AppendAudit(ctx context.Context, org string, prev auditchain.Head, lines [][]byte, head auditchain.Head) error {
	err := f.Store.AppendAudit(ctx, org, prev, lines, head)
	if f.n++; f.n%2 == 0 && err == nil {
		return &proto.Error{Code: proto.CodeUnavailable}
	}
	return err
}

func TestTampering(t *testing.T) {
	for name, open := range map[string]func(t *testing.T) (*store.Store, *sql.DB){"sqlite": openSQLite, "postgres": openPostgres} {
		t.Run(name, func(t *testing.T) {
			for _, test := range []struct {
				name, statement string
				want            uint64
				reason          string
			}{
				{"removed first", "DELETE FROM audit WHERE sequence = 1", 1, "removed"},
				{"removed", "DELETE FROM audit WHERE sequence = 4", 4, "removed"},
				{"removed last", "DELETE FROM audit WHERE sequence = 10", 10, "removed"},
				{"removed all", "DELETE FROM audit", 1, "removed"},
				{"removed last, head too", "DELETE FROM audit WHERE sequence = 10; UPDATE audit_heads SET sequence = 9", 9, "altered"},
				{"altered", "UPDATE audit SET line = CAST(replace(CAST(%s AS text), 'select 3', 'select 9') AS %s) WHERE sequence = 4", 4, "altered"},
				{"altered last", "UPDATE audit SET line = CAST(replace(CAST(%s AS text), 'select 9', 'select 3') AS %s) WHERE sequence = 10", 10, "altered"},
				{"altered owner", "UPDATE audit SET line = CAST(replace(CAST(%s AS text), 'org_acme', 'org_bolt') AS %s) WHERE sequence = 4", 4, "altered"},
				{"reordered", "UPDATE audit SET sequence = 99 WHERE sequence = 4; UPDATE audit SET sequence = 4 WHERE sequence = 5; UPDATE audit SET sequence = 5 WHERE sequence = 99", 4, "reordered"},
				{"moved to the end", "UPDATE audit SET sequence = 11 WHERE sequence = 4", 4, "removed or reordered"},
				{"last renumbered", "UPDATE audit SET sequence = 99 WHERE sequence = 10", 11, "reordered"},
				{"repeated", "INSERT INTO audit SELECT organization, 11, line FROM audit WHERE sequence = 10", 11, "repeated"},
				{"head moved back", "UPDATE audit_heads SET sequence = 8", 8, "altered"},
				{"head gone", "DELETE FROM audit_heads", 1, "added behind"},
			} {
				t.Run(test.name, func(t *testing.T) {
					s, db := open(t)
					l := newLog(s)
					write(t, l, 10)
					verified(t, l, org, 10)
					statement := test.statement
					if strings.Contains(statement, "%s") {
						line, kind := "line", "blob"
						if name == "postgres" {
							line, kind = "convert_from(line, 'utf8')", "bytea"
						}
						statement = fmt.Sprintf(statement, line, kind)
						if name == "postgres" {
							statement = strings.Replace(statement, "SET line = CAST(", "SET line = convert_to(", 1)
							statement = strings.Replace(statement, " AS bytea)", ", 'utf8')", 1)
						}
					}
					for one := range strings.SplitSeq(statement, "; ") {
						if result, err := db.Exec(one); err != nil {
							t.Fatalf("%s: %v", one, err)
						} else if n, err := result.RowsAffected(); n == 0 || err != nil {
							t.Fatalf("%s: nothing changed, %v", one, err)
						}
					}
					_, err := l.Verify(ctx, org)
					var broken *auditchain.BrokenError
					if !errors.As(err, &broken) || broken.Sequence != test.want || !strings.Contains(broken.Reason, test.reason) || !audit.IsBroken(err) {
						t.Errorf("got %v, want entry %d and %q", err, test.want, test.reason)
					}
				})
			}
		})
	}
}

func openSQLite(t *testing.T) (*store.Store, *sql.DB) {
	path := filepath.Join(t.TempDir(), "postern.db")
	s := storetest.Open(t, store.Config{SQLitePath: path})
	return s, openDB(t, "sqlite", path)
}

func openPostgres(t *testing.T) (*store.Store, *sql.DB) {
	cfg, role := storetest.PostgresConfig(t)
	s := storetest.Open(t, cfg)
	return s, openDB(t, "pgx", cfg.PostgresDSN+" password="+role.Password)
}

func openDB(t *testing.T, driver, dsn string) *sql.DB {
	t.Helper()
	db, err := sql.Open(driver, dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	return db
}

// TestRestart: another process goes on where the last one ended.
func TestRestart(t *testing.T) {
	path := filepath.Join(t.TempDir(), "postern.db")
	for i := range 3 {
		s, err := store.Open(ctx, store.Config{SQLitePath: path})
		if err != nil {
			t.Fatal(err)
		}
		l := newLog(s)
		write(t, l, 4)
		verified(t, l, org, uint64(4*(i+1)))
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
