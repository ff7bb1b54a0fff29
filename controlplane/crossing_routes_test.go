package main

import (
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/postern-dev/postern/proto/postern/v1/posternv1connect"
)

// nothingNamed are procedures whose requests refer to nothing, and why that is safe: answers are
// searched for what is another organization's all the same.
var nothingNamed = map[string]string{
	posternv1connect.IdentityServiceWhoAmIProcedure:                   "the caller",
	posternv1connect.TokenServiceCreateTokenProcedure:                 "in the caller's organization",
	posternv1connect.TokenServiceListTokensProcedure:                  "of the caller's organization",
	posternv1connect.KeyServiceCreateKeyProcedure:                     "in the caller's organization",
	posternv1connect.KeyServiceListKeysProcedure:                      "of the caller's organization",
	posternv1connect.AgentServiceListAgentsProcedure:                  "of the caller's organization",
	posternv1connect.QueryServiceListQueriesProcedure:                 "of the caller's organization",
	posternv1connect.OrganizationServiceCreateOrganizationProcedure:   "404 for all but the operators of the installation",
	posternv1connect.OrganizationServiceListOrganizationsProcedure:    "404 for all but the operators of the installation",
	posternv1connect.CAServiceShowCAProcedure:                         "certificates, which hosts show to everybody",
	posternv1connect.CAServiceGetCAStatusProcedure:                    "404 for all but the operators of the installation",
	posternv1connect.CAServiceRotateCAProcedure:                       "404 for all but the operators of the installation",
	posternv1connect.MasterKeyServiceGetMasterKeyStatusProcedure:      "404 for all but the operators of the installation",
	posternv1connect.MasterKeyServiceRotateMasterKeyProcedure:         "404 for all but the operators of the installation",
	posternv1connect.MasterKeyServiceCancelMasterKeyRotationProcedure: "404 for all but the operators of the installation",
	posternv1connect.FileKeyServiceGetFileKeyStatusProcedure:          "of the caller's organization",
	posternv1connect.FileKeyServiceRotateFileKeyProcedure:             "of the caller's organization",
	posternv1connect.SecretServiceListSecretsProcedure:                "of the caller's organization",
	posternv1connect.FileServiceListWorkspacesProcedure:               "of the caller's organization",
	posternv1connect.FileServiceCreateWorkspaceProcedure:              "in the caller's organization",
}

// elsewhere are references that the API does not look up, by procedure and field, and who does. Answers
// must have the same status for what is another's and for what nobody has.
var elsewhere = map[string]string{
	posternv1connect.FileServiceCommitFilesProcedure + " files.workspace":       "nobody: all files go where the request's own field says",
	posternv1connect.KernelServiceStartKernelProcedure + " mounts.workspace":    "the host, over its own link, which has its organization",
	posternv1connect.KernelServiceStartKernelProcedure + " secrets":             "the host, which may have secrets of its own",
	posternv1connect.FileServiceUpdateWorkspaceProcedure + " agents":            "nobody: which of the organization's agents may mount it, now or later",
	posternv1connect.NotebookServiceRunNotebookProcedure + " mounts.workspace":  "the host, as for StartKernel",
	posternv1connect.NotebookServiceSyncNotebookProcedure + " mounts.workspace": "the host, as for StartKernel",
	posternv1connect.SecretServiceSetSecretProcedure + " ref.name":              "nobody: it makes one, in the caller's organization",
	posternv1connect.SecretServiceSetSecretProcedure + " ref.workspace":         "nobody: it is kept for kernels with a mount of that name, in the caller's organization",
}

// everyRoute tries what is no procedure: the API's other routes, Jupyter's and WebDAV's.
func everyRoute(t *testing.T, s *testServer, routes []string, other, mine *furnished) {
	// An attempt is a path with {agent}, {workspace}, {kernel} or {session}.
	type attempt struct{ method, path, body string }
	files := []string{http.MethodGet, http.MethodHead, http.MethodPut}
	table := map[string][]attempt{
		"POST /api/v1/sql/{agent}/{source}":         {{http.MethodPost, "/api/v1/sql/{agent}/shop", `{"sql":"select 1"}`}, {http.MethodPost, "/api/v1/sql/{agent}/shop?format=csv", `{"sql":"select 1"}`}},
		"GET /api/v1/agents/{agent}/metrics":        {{http.MethodGet, "/api/v1/agents/{agent}/metrics", ""}},
		"GET /api/v1/archive/{workspace}/{path...}": {{http.MethodGet, "/api/v1/archive/{workspace}/", ""}},
		"POST /api/v1/chunks/{workspace}":           {{http.MethodPost, "/api/v1/chunks/{workspace}", "x"}},
	}
	for _, method := range files {
		pattern := method
		if method == http.MethodHead {
			pattern = http.MethodGet
		}
		pattern += " /api/v1/files/{workspace}/{path...}"
		table[pattern] = append(table[pattern], attempt{method, "/api/v1/files/{workspace}/file", "x"})
	}
	for _, method := range []string{"PROPFIND", "GET", "HEAD", "PUT", "DELETE", "MKCOL", "COPY", "MOVE", "LOCK", "UNLOCK", "PROPPATCH", "OPTIONS", "POST"} {
		table["/dav/"] = append(table["/dav/"], attempt{method, "/dav/{workspace}/file", ""}, attempt{method, "/dav/{workspace}/", ""})
	}
	for _, route := range s.jupyter.Routes() {
		method, path, _ := strings.Cut(route, " ")
		path = strings.NewReplacer("{$}", "", "{name}", "python3", "{file}", "logo-64x64.png").Replace(path)
		body := ""
		if method != http.MethodGet && method != http.MethodDelete {
			body = "{}"
		}
		table["/jupyter/"] = append(table["/jupyter/"], attempt{method, "/jupyter/{agent}" + path, body}, attempt{method, "/jupyter/mine" + path, body})
	}
	// What says nothing of anybody, and what is not for callers of an organization.
	public := []string{"/tunnel", "GET /healthz", "GET /readyz", "GET /metrics", "GET /{$}", "/"}
	for _, route := range routes {
		method, path, found := strings.Cut(route, " ")
		if !found {
			method, path = "", route
		}
		if strings.HasPrefix(path, "/postern.v1.") || slices.Contains(public, route) {
			continue
		}
		tries := table[route]
		if tries == nil && method == "" { // which says that it knows no such method, whatever the path
			tries = []attempt{{"TRACK", strings.ReplaceAll(strings.ReplaceAll(path, "{path...}", "file"), "{source}", "shop"), ""}}
		}
		if tries == nil {
			t.Errorf("route %s: say in this test how it is tried", route)
		}
		for _, try := range tries {
			hidden := try.method != "TRACK" && try.method != http.MethodOptions
			s.tryRoute(t, try.method, try.path, try.body, hidden, other, mine)
		}
	}
}

// pgAcross is what a PostgreSQL client with another organization's token is told: the same of what is there
// and of what is not.
func pgAcross(t *testing.T, s *testServer, other, mine *furnished) {
	told := func(name string) string {
		_, err := s.pg(t, mine.principal.TokenName, mine.token, name+"/shop")
		for state(err) == "53400" { // one too many in a second
			time.Sleep(50 * time.Millisecond)
			_, err = s.pg(t, mine.principal.TokenName, mine.token, name+"/shop")
		}
		if state(err) != "3D000" {
			t.Errorf("%s: got %v, want 3D000", name, err)
		}
		return strings.ReplaceAll(fmt.Sprint(err), name, "NAMED")
	}
	for _, name := range other.things["agent"] {
		if got, want := told(name), told(absent(name)); got != want {
			t.Errorf("%s: another's differs from nobody's:\n%s\n%s", name, got, want)
		}
	}
}

var placeholder = regexp.MustCompile(`\{([a-z]+)\}`)

// tryRoute tries a path with another organization's names.
func (s *testServer) tryRoute(t *testing.T, method, path, body string, hidden bool, other, mine *furnished) {
	t.Helper()
	path = strings.Replace(path, "/jupyter/mine", "/jupyter/"+mine.agent.name, 1)
	kinds := placeholder.FindAllStringSubmatch(path, -1)
	if len(kinds) == 0 {
		return // nothing of another's in it
	}
	for form := range 2 {
		foreign, nobodys := path, path
		var named, absents []string
		for _, k := range kinds {
			names := other.things[k[1]]
			if names == nil {
				t.Fatalf("%s: nobody has a %s in this test", path, k[1])
			}
			name := names[min(form, len(names)-1)]
			named, absents = append(named, name), append(absents, absent(name))
			foreign, nobodys = strings.Replace(foreign, k[0], name, 1), strings.Replace(nobodys, k[0], absent(name), 1)
		}
		header := http.Header{}
		if method == "COPY" || method == "MOVE" {
			header.Set("Destination", s.url+"/dav/"+mine.things["workspace"][0]+"/copied")
		}
		if method == "LOCK" {
			body = `<?xml version="1.0"?><D:lockinfo xmlns:D="DAV:"><D:lockscope><D:exclusive/></D:lockscope><D:locktype><D:write/></D:locktype></D:lockinfo>`
		}
		if method == "UNLOCK" {
			header.Set("Lock-Token", "<urn:uuid:none>")
		}
		if method == "PROPFIND" {
			header.Set("Depth", "1")
		}
		client := as(mine.token)
		got := send(t, client, method, s.url+foreign, header, []byte(body), named)
		want := send(t, client, method, s.url+nobodys, header, []byte(body), absents)
		if got != want {
			t.Errorf("%s %s: another's differs from nobody's:\n%+v\n%+v", method, foreign, got, want)
		}
		// RFC 4918 has other words for what would make something where nothing is to hold it.
		makes := strings.HasPrefix(path, "/dav/") && slices.Contains([]string{http.MethodPut, "MKCOL", "MOVE", "LOCK", "UNLOCK", http.MethodPost}, method)
		if method == http.MethodPut && form == 0 && strings.HasPrefix(path, "/api/") && got.status == http.StatusCreated {
			continue // it made a workspace of that name in the caller's organization
		}
		if hidden && got.status != http.StatusNotFound && !(makes && got.status >= 400 && got.status < 500) {
			t.Errorf("%s %s: got %+v, want 404", method, foreign, got)
		}
	}
}
