package prometheus

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"gopkg.in/yaml.v3"
)

const (
	rulesFile, testsFile, scrapeFile = "postern-alerts.yaml", "postern-alerts_test.yaml", "postern-scrape.yaml"
	dashboardFile                    = "../grafana/postern.json"
)

// promtool runs Prometheus's own tool, which packaging/dev/deps.sh installs.
func promtool(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("promtool", args...).CombinedOutput(); err != nil {
		t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

func TestPromtool(t *testing.T) {
	promtool(t, "check", "rules", rulesFile)
	promtool(t, "test", "rules", testsFile)
	promtool(t, "check", "config", "--syntax-only", scrapeFile)
}

func read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

type rules struct {
	Groups []struct {
		Rules []struct {
			Alert       string            `yaml:"alert"`
			Expr        string            `yaml:"expr"`
			Labels      map[string]string `yaml:"labels"`
			Annotations map[string]string `yaml:"annotations"`
		} `yaml:"rules"`
	} `yaml:"groups"`
}

// TestEveryAlertIsTested, and says what is wrong and what to do.
func TestEveryAlertIsTested(t *testing.T) {
	var r rules
	if err := yaml.Unmarshal([]byte(read(t, rulesFile)), &r); err != nil {
		t.Fatal(err)
	}
	tests := read(t, testsFile)
	n := 0
	for _, g := range r.Groups {
		for _, rule := range g.Rules {
			n++
			for _, kind := range []string{" fires\n", " quiet\n"} {
				if !strings.Contains(tests, "name: "+rule.Alert+kind) {
					t.Errorf("%s has no test %q", rule.Alert, strings.TrimSpace(kind))
				}
			}
			if s := rule.Labels["severity"]; s != "critical" && s != "warning" {
				t.Errorf("%s: severity %q", rule.Alert, s)
			}
			if rule.Annotations["summary"] == "" || rule.Annotations["description"] == "" {
				t.Errorf("%s says nothing", rule.Alert)
			}
		}
	}
	if n < 10 {
		t.Errorf("%d alerts: some were not read", n)
	}
}

var metricName = regexp.MustCompile(`\b(?:agentd|controlplane|postern)_[a-z0-9_]+`)

// base is a metric's name without what a histogram's series add.
func base(name string) string {
	for _, suffix := range []string{"_bucket", "_sum", "_count"} {
		if b, ok := strings.CutSuffix(name, suffix); ok {
			return b
		}
	}
	return name
}

// inCode are the names that stand in quotes in the programs' code, and those that package tunnel composes.
func inCode(t *testing.T) map[string]bool {
	t.Helper()
	names := map[string]bool{}
	quoted := regexp.MustCompile(`"((?:agentd|controlplane)_[a-z0-9_]+)"`)
	composed := regexp.MustCompile(`\bname\("([a-z0-9_]+)"\)`)
	for _, m := range composed.FindAllStringSubmatch(read(t, "../../tunnel/metrics.go"), -1) {
		names["postern_tunnel_"+m[1]] = true
	}
	for _, dir := range []string{"../../agentd", "../../controlplane"} {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			for _, m := range quoted.FindAllStringSubmatch(read(t, path), -1) {
				names[m[1]] = true
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return names
}

// documented are the names in the tables of docs/metrics.md.
func documented(t *testing.T) map[string]bool {
	t.Helper()
	names := map[string]bool{}
	for line := range strings.Lines(read(t, "../../docs/metrics.md")) {
		if !strings.HasPrefix(line, "| `") {
			continue
		}
		first, _, _ := strings.Cut(line[2:], "|")
		for _, name := range metricName.FindAllString(first, -1) {
			if !strings.HasSuffix(name, "_") { // postern_tunnel_*
				names[name] = true
			}
		}
	}
	return names
}

// dashboardQueries are all expressions of the dashboard.
func dashboardQueries(t *testing.T) []string {
	t.Helper()
	var d struct {
		Panels []struct {
			ID      int    `json:"id"`
			Type    string `json:"type"`
			Title   string `json:"title"`
			GridPos struct{ H, W, X, Y int }
			Targets []struct {
				Expr string `json:"expr"`
			} `json:"targets"`
		} `json:"panels"`
	}
	if err := json.Unmarshal([]byte(read(t, dashboardFile)), &d); err != nil {
		t.Fatal(err)
	}
	var all []string
	ids := map[int]bool{}
	for i, p := range d.Panels {
		for _, q := range d.Panels[:i] {
			a, b := p.GridPos, q.GridPos
			if a.X < b.X+b.W && b.X < a.X+a.W && a.Y < b.Y+b.H && b.Y < a.Y+a.H {
				t.Errorf("panels %d %q and %d %q overlap", q.ID, q.Title, p.ID, p.Title)
			}
		}
		if ids[p.ID] || p.Title == "" || p.GridPos.X+p.GridPos.W > 24 {
			t.Errorf("panel %d %q: the id is taken, it has no title, or it is too wide", p.ID, p.Title)
		}
		ids[p.ID] = true
		if p.Type != "row" && len(p.Targets) == 0 {
			t.Errorf("panel %q asks for nothing", p.Title)
		}
		for _, target := range p.Targets {
			all = append(all, target.Expr)
		}
	}
	return all
}

// TestMetricsAreKnown: what alerts and the dashboard name is documented, and what is documented is in the code.
func TestMetricsAreKnown(t *testing.T) {
	docs, code := documented(t), inCode(t)
	if len(docs) < 70 {
		t.Errorf("docs/metrics.md names %d metrics: some were not read", len(docs))
	}
	for name := range docs {
		if !code[name] {
			t.Errorf("docs/metrics.md names %s, which is not in the code", name)
		}
	}
	for name := range code {
		if !docs[name] && !strings.HasSuffix(name, "_") {
			t.Errorf("%s is in the code and not in docs/metrics.md", name)
		}
	}
	queries := append(dashboardQueries(t), read(t, rulesFile), read(t, testsFile))
	for _, q := range queries {
		for _, name := range metricName.FindAllString(q, -1) {
			if !docs[base(name)] && !docs[name] {
				t.Errorf("%s is not in docs/metrics.md", name)
			}
		}
	}
}

// TestDashboardQueriesParse has promtool parse every query of the dashboard, as rules.
func TestDashboardQueriesParse(t *testing.T) {
	type rule struct {
		Record string `yaml:"record"`
		Expr   string `yaml:"expr"`
	}
	var list []rule
	for i, q := range dashboardQueries(t) {
		q = strings.NewReplacer("$__rate_interval", "5m", "$agent", ".*").Replace(q)
		list = append(list, rule{fmt.Sprintf("dashboard:query%d", i), q})
	}
	if len(list) < 15 {
		t.Fatalf("%d queries: some were not read", len(list))
	}
	text, err := yaml.Marshal(map[string]any{"groups": []any{map[string]any{"name": "dashboard", "rules": list}}})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "rules.yaml")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	promtool(t, "check", "rules", file)
}
