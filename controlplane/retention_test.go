package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/postern-dev/postern/controlplane/audit"
	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/proto/auditchain"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

// A server drops what is too old when it starts, and says from where on it verifies.
func TestAuditRetention(t *testing.T) {
	s := startServer(t, func(o *Options) {
		o.AuditRetention = 400 * 24 * time.Hour
		if err := os.Mkdir(o.Data, 0o700); err != nil {
			t.Fatal(err)
		}
		before, err := store.Open(t.Context(), store.Config{SQLitePath: filepath.Join(o.Data, "controlplane.db")})
		if err != nil {
			t.Fatal(err)
		}
		entries := []auditchain.Entry{}
		for _, days := range []int{500, 450, 401, 399, 1} {
			entries = append(entries, auditchain.Entry{Time: time.Now().AddDate(0, 0, -days), Action: "test"})
		}
		if err := audit.New(audit.Config{Store: before, DefaultOrganization: store.DefaultOrganizationID}).AppendAll(t.Context(), entries); err != nil {
			t.Fatal(err)
		}
		if err := before.Close(); err != nil {
			t.Fatal(err)
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	api := posternv1connect.NewAuditServiceClient(as(s.token), s.url)
	for {
		reports, err := api.VerifyAudit(ctx, connect.NewRequest(&posternv1.VerifyAuditRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		report := reports.Msg.Reports[0]
		if !report.Ok {
			t.Fatalf("got %v", report)
		}
		if strings.HasPrefix(report.Message, "from entry 4 on: those before were retired on ") {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	list, err := api.ListAudit(ctx, connect.NewRequest(&posternv1.ListAuditRequest{From: 1, Limit: 100}))
	if err != nil {
		t.Fatal(err)
	}
	text := ""
	for _, line := range list.Msg.Entries {
		text += string(line) + "\n"
	}
	if !strings.HasPrefix(text, `{"sequence":4,`) || strings.Count(text, `"action":"audit.retire","target":"entries up to 3, hash `) != 1 {
		t.Errorf("got %s", text)
	}
}

func TestAge(t *testing.T) {
	for text, want := range map[string]time.Duration{"400d": 400 * 24 * time.Hour, "36h": 36 * time.Hour, "1d": 24 * time.Hour} {
		var a age
		if err := a.Set(text); err != nil || time.Duration(a) != want || a.String() == "" {
			t.Errorf("%s: got %s, %v", text, a.String(), err)
		}
		if text != "36h" && a.String() != text {
			t.Errorf("%s is shown as %s", text, a.String())
		}
	}
	for _, text := range []string{"", "0", "0d", "-1d", "d", "1.5d", "400", "-3h", "4000000000d", "99999999999999d", "400 d"} {
		var a age
		if err := a.Set(text); err == nil || a != 0 {
			t.Errorf("%q: got %s, %v", text, a.String(), err)
		}
	}
	o := Options{Data: "x", AuditRetention: time.Hour}
	if err := o.Validate(); err == nil || err.Error() != "--audit-retention 1h0m0s is less than 24h0m0s" {
		t.Errorf("got %v", err)
	}
}
