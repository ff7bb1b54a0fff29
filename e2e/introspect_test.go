package e2e

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/postern-dev/postern/e2e/stack"
	"github.com/postern-dev/postern/e2e/storetest"
)

type catalogView struct {
	Tables []struct {
		Schema, Name, Kind string
		Columns            []struct{ Name, Type string }
	}
	Functions []struct{ Schema, Name string }
	Refreshed time.Time
}

func (c catalogView) names() string {
	var names []string
	for _, x := range c.Tables {
		names = append(names, x.Schema+"."+x.Name)
	}
	for _, x := range c.Functions {
		names = append(names, x.Schema+"."+x.Name+"()")
	}
	return strings.Join(names, " ")
}

// TestIntrospection sees a catalog from the database to the command line, and what
// is hidden nowhere behind the host.
func TestIntrospection(t *testing.T) {
	pg := database(t, "introspection")
	if err := pg.SQLIn(t.Context(), "introspection",
		"create schema canary_hr", "create table canary_hr.people (id int primary key)",
		"create table canary_plans (id int primary key)",
		"create table uses (person int references canary_hr.people, plan int references canary_plans)",
		"create function total() returns int language sql as 'select 42 -- canary_source'",
		"grant usage on schema canary_hr to reader", "grant select on all tables in schema public, canary_hr to reader",
	); err != nil {
		t.Fatal(err)
	}
	s := newStack(t, stack.Options{})
	source := mustSource(t, s.Dir, "db", pg.SocketDSN("reader", "introspection"), "      hide: [canary_hr, public.canary_*]\n")
	agent, err := s.Join(t.Context(), "host", "sources:\n"+source)
	if err != nil {
		t.Fatal(err)
	}
	view := mustJSON[catalogView](t, s, "source", "introspect", "host/db")
	if got := view.names(); got != "public.items public.uses public.total()" {
		t.Errorf("got %s", got)
	}
	if text := must(t, s, "source", "introspect", "host/db", "--table", "items"); !strings.Contains(text, "primary key items_pkey (id)") {
		t.Errorf("got %s", text)
	}
	if err := pg.SQLIn(t.Context(), "introspection", "alter table items add column later text", "drop table uses"); err != nil {
		t.Fatal(err)
	}
	if got := mustJSON[catalogView](t, s, "source", "introspect", "host/db").names(); got != view.names() {
		t.Errorf("the cache has changed by itself: %s", got)
	}
	again := mustJSON[catalogView](t, s, "source", "introspect", "host/db", "--refresh")
	if got := again.names(); got != "public.items public.total()" || len(again.Tables[0].Columns) != 3 || again.Refreshed.Before(view.Refreshed) {
		t.Errorf("after a refresh: %s, %+v", got, again)
	}
	for _, canary := range []string{"canary_hr", "canary_plans", "canary_source", "plan_fkey", "person_fkey"} {
		if storetest.Contains(t, filepath.Join(s.DataDir(), "controlplane.db"), []byte(canary)) {
			t.Errorf("%s is in the control plane's store", canary)
		}
	}

	// A policy that hides more takes effect on the cache, too.
	agent.Config = "sources:\n" + strings.Replace(source, "hide: [", "hide: [public.total, ", 1)
	if err := agent.WriteConfig(); err != nil {
		t.Fatal(err)
	}
	agent.Process.Signal(syscall.SIGHUP)
	eventually(t, time.Minute, "the cache forgets what is hidden now", func() error {
		if got := mustJSON[catalogView](t, s, "source", "introspect", "host/db").names(); got != "public.items" {
			return errors.New(got)
		}
		return nil
	})

	for side, name := range map[string]string{"control plane": "", "host": "host"} {
		found := 0
		for _, e := range auditEntries(t, s, name) {
			if e.Action == "source.introspect" && e.Source == "db" && e.Outcome == "done" {
				found++
			}
		}
		if found < 3 {
			t.Errorf("the log of the %s has %d entries of it", side, found)
		}
	}
	postern(t, s, "source", "introspect", "host/nothing").said(t, 4, "no data source")
	viewer := filepath.Join(t.TempDir(), "viewer.token")
	if err := os.WriteFile(viewer, []byte(must(t, s, "token", "create", "looker", "--role", "viewer")), 0o600); err != nil {
		t.Fatal(err)
	}
	postern(t, s, "source", "introspect", "host/db", "--token-file", viewer).said(t, 3, "this needs analyst")

	// Offline: the cache answers, the host can't be asked.
	if err := agent.Process.Stop(40 * time.Second); err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, "the agent is offline", func() error {
		if e := postern(t, s, "source", "introspect", "host/db", "--refresh"); e.code != 5 {
			return errors.New(e.stderr)
		}
		return nil
	})
	if got := mustJSON[catalogView](t, s, "source", "introspect", "host/db").names(); got != "public.items" {
		t.Errorf("offline: %s", got)
	}
	auditVerifies(t, s)
}
