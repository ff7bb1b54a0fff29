package store_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/controlplane/store"
	"github.com/postern-dev/postern/e2e/storetest"
	"github.com/postern-dev/postern/proto"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func table(schema, name string) *posternv1.CatalogTable {
	return &posternv1.CatalogTable{Schema: schema, Name: name, Kind: "table", Columns: []*posternv1.CatalogColumn{{Name: "id", Type: "bigint"}}}
}

// search reads all pages and returns what is on them, as "schema.name".
func search(t *testing.T, s *store.Store, agent string, r *posternv1.IntrospectSourceRequest) (names []string, pages int) {
	t.Helper()
	r.Source = "db"
	for {
		resp := must(s.SearchCatalog(ctx, agent, r))(t)
		pages++
		for _, x := range resp.Tables {
			names = append(names, x.Schema+"."+x.Name)
		}
		for _, f := range resp.Functions {
			names = append(names, fmt.Sprintf("%s.%s(%d)", f.Schema, f.Name, len(f.Arguments)))
		}
		for _, x := range resp.Types {
			names = append(names, fmt.Sprintf("%s.%s:%s%d", x.Schema, x.Name, x.Kind, len(x.Labels)))
		}
		for _, x := range resp.Sequences {
			names = append(names, fmt.Sprintf("%s.%s#%s", x.Schema, x.Name, x.Type))
		}
		if r.PageToken = resp.NextPageToken; r.PageToken == "" {
			return names, pages
		}
	}
}

func schemas(pairs ...string) []*posternv1.CatalogSchema {
	var all []*posternv1.CatalogSchema
	for i := 0; i < len(pairs); i += 2 {
		all = append(all, &posternv1.CatalogSchema{Name: pairs[i], Fingerprint: []byte(pairs[i+1]), Comment: "of " + pairs[i]})
	}
	return all
}

func TestCatalogs(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		org, _ := tenants(t, s)
		agent, _, err := join(s, org, newKey(t, s, org, 1).Id, "host")
		if err != nil {
			t.Fatal(err)
		}
		a := agent.Id
		_, _, _, _, err = s.CatalogState(ctx, a, "db")
		wantCode(t, err, proto.CodeNotFound)
		_, err = s.SearchCatalog(ctx, a, &posternv1.IntrospectSourceRequest{Source: "db"})
		wantCode(t, err, proto.CodeNotFound)

		one := store.NewGeneration(now)
		first := &posternv1.CatalogPage{Tables: []*posternv1.CatalogTable{table("A", "z\x00"), table("b", "Upper"), table("b", "lower"), table("b", "ä")}}
		for i := range 120 {
			first.Tables = append(first.Tables, table("c", fmt.Sprintf("t%03d", i)))
		}
		overloaded := &posternv1.CatalogFunction{Schema: "b", Name: "f"}
		again := &posternv1.CatalogFunction{Schema: "b", Name: "f", Arguments: []*posternv1.CatalogArgument{{Type: "int"}}}
		other := &posternv1.CatalogFunction{Schema: "b", Name: "g"}
		for _, page := range []*posternv1.CatalogPage{first, {Functions: []*posternv1.CatalogFunction{overloaded, again}}, {Functions: []*posternv1.CatalogFunction{again, other, other}}, {}} {
			if err := s.StageCatalog(ctx, a, "db", one, page); err != nil {
				t.Fatal(err)
			}
		}
		_, err = s.SearchCatalog(ctx, a, &posternv1.IntrospectSourceRequest{Source: "db"})
		wantCode(t, err, proto.CodeNotFound) // not before it is whole
		if err := s.FinishCatalog(ctx, a, "db", one, schemas("A", "1", "b", "1", "c", "1", "empty", "1"), nil, map[string][2]int64{"c": {120, 9}}, false, now); err != nil {
			t.Fatal(err)
		}
		state, sizes, refreshed, truncated, err := s.CatalogState(ctx, a, "db")
		if err != nil || len(state) != 4 || string(state[2].Fingerprint) != "1" || sizes["c"] != [2]int64{120, 9} || !refreshed.Equal(now.Truncate(time.Millisecond)) || truncated {
			t.Errorf("state: %v, %v, %v, %v, %v", state, sizes, refreshed, truncated, err)
		}
		for _, size := range []uint32{1, 7, 1000, 0} {
			names, _ := search(t, s, a, &posternv1.IntrospectSourceRequest{PageSize: size})
			// Of one page, the tables come first.
			if len(names) != 4+5+120 || size == 1 && strings.Join(names[1:9], " ") != "b.Upper b.lower b.ä b.f(0) b.f(1) b.f(1) b.g(0) b.g(0)" {
				t.Errorf("pages of %d: %d names, %v", size, len(names), names[:min(10, len(names))])
			}
		}
		for _, c := range []struct{ schema, table, want string }{
			{"b", "", "b.Upper b.lower b.ä b.f(0) b.f(1) b.f(1) b.g(0) b.g(0)"},
			{"", "t00?", "c.t000 c.t001 c.t002 c.t003 c.t004 c.t005 c.t006 c.t007 c.t008 c.t009"},
			{"?", "upper", ""},
			{"b", "?", "b.ä b.f(0) b.f(1) b.f(1) b.g(0) b.g(0)"},
			{"nobody", "", ""},
		} {
			if names, _ := search(t, s, a, &posternv1.IntrospectSourceRequest{Schema: c.schema, Table: c.table, PageSize: 4}); strings.Join(names, " ") != c.want {
				t.Errorf("schema %q, table %q: %v", c.schema, c.table, names)
			}
		}
		resp := must(s.SearchCatalog(ctx, a, &posternv1.IntrospectSourceRequest{Source: "db", NamesOnly: true, PageSize: 2}))(t)
		if len(resp.Schemas) != 4 || len(resp.Tables) != 2 || resp.Tables[0].Columns != nil || resp.Tables[0].Kind != "table" || resp.Schemas[1].Comment != "of b" {
			t.Errorf("names: %v", resp)
		}
		for _, bad := range []string{"x", "e30", "bm9uc2Vuc2U", strings.Repeat("A", 9000)} {
			_, err := s.SearchCatalog(ctx, a, &posternv1.IntrospectSourceRequest{Source: "db", PageToken: bad})
			wantCode(t, err, proto.CodeInvalid)
		}

		// b changes, c stays, A goes; meanwhile everything is as it was.
		two := store.NewGeneration(now.Add(time.Second))
		if err := s.StageCatalog(ctx, a, "db", two, &posternv1.CatalogPage{Tables: []*posternv1.CatalogTable{table("b", "new")}}); err != nil {
			t.Fatal(err)
		}
		if names, _ := search(t, s, a, &posternv1.IntrospectSourceRequest{}); len(names) != 129 {
			t.Errorf("while it is staged: %d names", len(names))
		}
		wantCode(t, s.FinishCatalog(ctx, a, "db", two, schemas("b", "2", "c", "other"), map[string]bool{"c": true}, nil, true, now), proto.CodeUnavailable)
		if err := s.FinishCatalog(ctx, a, "db", two, schemas("b", "2", "c", "1"), map[string]bool{"c": true}, nil, true, now.Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		names, _ := search(t, s, a, &posternv1.IntrospectSourceRequest{})
		if len(names) != 121 || names[0] != "b.new" {
			t.Errorf("after it: %d names, %v", len(names), names[:1])
		}
		if resp := must(s.SearchCatalog(ctx, a, &posternv1.IntrospectSourceRequest{Source: "db"}))(t); !resp.Truncated || !resp.Refreshed.AsTime().Equal(now.Add(time.Minute).Truncate(time.Millisecond)) {
			t.Errorf("truncated %v, refreshed %v", resp.Truncated, resp.Refreshed)
		}
		// What came to nothing is forgotten, what counts is not.
		three := store.NewGeneration(now.Add(2 * time.Second))
		if err := s.StageCatalog(ctx, a, "db", three, &posternv1.CatalogPage{Tables: []*posternv1.CatalogTable{table("b", "x")}}); err != nil {
			t.Fatal(err)
		}
		for _, g := range []string{three, two} {
			if err := s.DropStaged(ctx, a, "db", g); err != nil {
				t.Fatal(err)
			}
		}
		if names, _ := search(t, s, a, &posternv1.IntrospectSourceRequest{}); len(names) != 121 {
			t.Errorf("after DropStaged: %d names", len(names))
		}
		if err := s.KeepCatalogs(ctx, a, []string{"db", "x"}); err != nil {
			t.Fatal(err)
		}
		if names, _ := search(t, s, a, &posternv1.IntrospectSourceRequest{}); len(names) != 121 {
			t.Errorf("after KeepCatalogs: %d names", len(names))
		}
		must(s.RevokeAgent(ctx, org, a, now))(t)
		_, err = s.SearchCatalog(ctx, a, &posternv1.IntrospectSourceRequest{Source: "db"})
		wantCode(t, err, proto.CodeNotFound)
	})
}

// Types and sequences come after tables and functions of their schema, on whatever page.
func TestCatalogTypes(t *testing.T) {
	storetest.Each(t, func(t *testing.T, s *store.Store) {
		org, _ := tenants(t, s)
		agent, _, err := join(s, org, newKey(t, s, org, 1).Id, "host")
		if err != nil {
			t.Fatal(err)
		}
		generation := store.NewGeneration(now)
		for _, page := range []*posternv1.CatalogPage{
			{Sequences: []*posternv1.CatalogSequence{{Schema: "a", Name: "mood", Type: "bigint"}, {Schema: "b", Name: "s", Type: "integer"}}},
			{Types: []*posternv1.CatalogType{{Schema: "a", Name: "mood", Kind: "enum", Labels: []string{"x", "y"}}, {Schema: "a", Name: "range", Kind: "range", Base: "date"}}},
			{Tables: []*posternv1.CatalogTable{table("a", "mood"), table("b", "t")}, Functions: []*posternv1.CatalogFunction{{Schema: "a", Name: "mood"}}},
		} {
			if err := s.StageCatalog(ctx, agent.Id, "db", generation, page); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.FinishCatalog(ctx, agent.Id, "db", generation, schemas("a", "1", "b", "1"), nil, nil, false, now); err != nil {
			t.Fatal(err)
		}
		const all = "a.mood a.mood(0) a.mood:enum2 a.range:range0 a.mood#bigint b.t b.s#integer"
		for _, size := range []uint32{1, 2, 3, 1000} {
			names, _ := search(t, s, agent.Id, &posternv1.IntrospectSourceRequest{PageSize: size})
			if size == 1 && strings.Join(names, " ") != all || len(names) != 7 {
				t.Errorf("pages of %d: got %v, want %s", size, names, all)
			}
		}
		names, _ := search(t, s, agent.Id, &posternv1.IntrospectSourceRequest{Table: "mood", NamesOnly: true})
		if got := strings.Join(names, " "); got != "a.mood a.mood(0) a.mood:enum0 a.mood#" {
			t.Errorf("names alone: got %s", got)
		}
	})
}
