package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/postern-dev/postern/agentd/config"
	"github.com/postern-dev/postern/agentd/doctor"
	"github.com/postern-dev/postern/agentd/egress"
	"github.com/postern-dev/postern/e2e/simulateds3"
	"github.com/postern-dev/postern/e2e/simulatedvault"
)

// vaultWith starts a simulated Vault with an object store's keys at secret/team/s3, and returns
// the configuration that opens it.
func vaultWith(t *testing.T, s *simulateds3.Server) (v *simulatedvault.Server, text string) {
	t.Helper()
	v = simulatedvault.Start(simulatedvault.Config{})
	t.Cleanup(v.Close)
	v.Put("team/s3", map[string]any{"access": s.Key, "key": s.Secret})
	dir := t.TempDir()
	for name, text := range map[string]string{"token": simulatedvault.RootToken, "ca.pem": string(v.CA())} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return v, fmt.Sprintf("vault: {address: '%s', ca_file: '%s/ca.pem', token: {file: '%[2]s/token'}}\n", v.URL(), dir)
}

const keysInVault = "access_key: {vault: {kv: secret/team/s3, field: access}}, secret_key: {vault: {kv: secret/team/s3, field: key}}"

// bucketByVault mounts a bucket whose keys are in the Vault of a configuration, and returns where.
func bucketByVault(t *testing.T, s *simulateds3.Server, vault string) (m *mounts, at string) {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	m = &mounts{lab: newLab(t, newTestControl(t), vault+fmt.Sprintf("attachments:\n  workspaces: []\n  host_mounts: [%s]\n  buckets:\n    - {name: raw, bucket: acme-raw, endpoint: %q, path_style: true, %s}\n", dir, s.URL, keysInVault)), dir: dir}
	t.Cleanup(m.clean)
	m.start()
	m.eventually("mountd", func() error {
		if s := m.d.attachmentStatus(); s.PID == 0 {
			return errors.New(s.Error)
		}
		return nil
	})
	at = m.target("raw")
	if err := m.mount("raw", at, false); err != nil {
		t.Fatal(err)
	}
	return m, at
}

// TestSimulatedBucketByVault mounts a bucket whose keys are in a simulated Vault, and looks at the
// metrics of what is done there.
func TestSimulatedBucketByVault(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts")
	}
	s := simulateds3.Start(t, "acme-raw")
	s.Put("d/there", "what was there")
	s.Put("d/"+strings.Repeat("n", 256), "it cannot be a file")
	_, text := vaultWith(t, s)
	m, at := bucketByVault(t, s, text)
	if got := m.sh("cat %s/d/there && echo && echo hello > %s/d/new && ls %s/d && cat %s/d/none", at, at, at, at); !strings.HasPrefix(got, "what was there\nnew\nthere") {
		t.Errorf("got %s", got)
	}
	if s.Count() != 3 {
		t.Errorf("%d objects, want 3", s.Count())
	}
	m.eventually("the metrics", func() error {
		for name, least := range map[string]float64{
			`agentd_bucket_requests_total list done`: 1, `agentd_bucket_requests_total read done`: 1, `agentd_bucket_requests_total write done`: 1,
			`agentd_bucket_received_bytes_total`: 14, `agentd_bucket_sent_bytes_total`: 6, `agentd_buckets`: 1, `agentd_bucket_hidden_keys`: 1, `agentd_attachments_workspaces`: 1,
		} {
			if got := m.metric(name); got < least {
				return fmt.Errorf("%s is %v, want %v or more", name, got, least)
			}
		}
		return nil
	})
	for _, name := range []string{"agentd_bucket_unsent_files", "agentd_bucket_unsent_bytes", "agentd_attachments_unsent_changes", "agentd_bucket_requests_total write failed"} {
		if got := m.metric(name); got != 0 {
			t.Errorf("%s is %v", name, got)
		}
	}
	// Two processes without rights made all requests: Vault's and the bucket's.
	pids := egressProcesses(t)
	if len(pids) != 2 {
		t.Errorf("processes %v made the requests, want two", pids)
	}
	for _, pid := range pids {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{fmt.Sprintf("Uid:\t%d\t", m.d.config.Load().SQL.UIDBase+egress.UIDs), "CapEff:\t0000000000000000\n", "CapBnd:\t0000000000000000\n", "NoNewPrivs:\t1\n", "Seccomp:\t2\n"} {
			if !strings.Contains(string(status), want) {
				t.Errorf("process %d: its status has no %q", pid, want)
			}
		}
		for _, name := range []string{"cmdline", "environ"} {
			if text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name)); err != nil || strings.Contains(string(text), s.Secret) {
				t.Errorf("process %d: %s is %q, %v", pid, name, text, err)
			}
		}
	}
	// Nothing of the keys is in the log or the status.
	if strings.Contains(m.log.String(), s.Secret) || strings.Contains(fmt.Sprintf("%+v", m.d.attachmentStatus()), s.Secret) {
		t.Error("the secret is told")
	}
	if err := umountHere(t.Context(), &m.d.places, at, false); err != nil {
		t.Error(err)
	}
}

// egressProcesses are those that we ourselves started.
func egressProcesses(t *testing.T) (pids []int) {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range all {
		text, err := os.ReadFile(path)
		if err != nil || string(text) != "agentd\x00"+egress.Arg+"\x00" {
			continue // another program, or it is gone
		}
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		status, err := os.ReadFile(filepath.Join(filepath.Dir(path), "status"))
		if err == nil && strings.Contains(string(status), fmt.Sprintf("PPid:\t%d\n", os.Getpid())) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// TestSimulatedBucketRotation rotates a bucket's keys in Vault while it is mounted: nobody who reads or writes sees it. Where
// Vault gets the new ones last, who writes in between is told, and goes on soon after.
func TestSimulatedBucketRotation(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts")
	}
	s := simulateds3.Start(t, "acme-raw")
	for i := range 4 {
		s.Put(fmt.Sprintf("d/there%d", i), "what was there")
	}
	v, text := vaultWith(t, s)
	m, at := bucketByVault(t, s, text)
	if got := m.sh("cat %s/d/there0 && echo 0 > %s/d/new0 && echo fine", at, at); got != "what was therefine" {
		t.Fatalf("before: %s", got)
	}
	// Twice, at once for all: the old keys are refused from here on, and were used a moment ago.
	for i := 1; i <= 2; i++ {
		key, secret := fmt.Sprintf("ROTATEDKEY%d", i), fmt.Sprintf("a-rotated-secret-key-%d", i)
		v.Put("team/s3", map[string]any{"access": key, "key": secret})
		s.Rotate(key, secret)
		if got := m.sh("cat %s/d/there%d && echo %d > %s/d/new%d && ls %s/d | wc -l && rm %s/d/new%d && echo done", at, i, i, at, i, at, at, i-1); !strings.HasSuffix(got, "done") || !strings.HasPrefix(got, "what was there") || strings.Contains(got, "rror") || strings.Contains(got, "denied") {
			t.Errorf("after rotation %d: %s", i, got)
		}
	}
	if got := m.metric("agentd_bucket_requests_total read failed") + m.metric("agentd_bucket_requests_total write failed") + m.metric("agentd_bucket_requests_total list failed"); got != 0 {
		t.Errorf("%v requests failed", got)
	}
	// The object store is first this time.
	s.Rotate("ROTATEDKEY3", "a-rotated-secret-key-3")
	if got := m.sh("echo late > %s/d/late || echo told", at); !strings.Contains(got, "told") {
		t.Errorf("a write that the bucket refused was no error: %s", got)
	}
	v.Put("team/s3", map[string]any{"access": "ROTATEDKEY3", "key": "a-rotated-secret-key-3"})
	m.eventually("writing with the keys that came late", func() error {
		if got := m.sh("echo late > %s/d/late && echo fine", at); got != "fine" {
			return errors.New(got)
		}
		return nil
	})
	if !s.Has("d/late", "late\n") {
		t.Error("what was written is not in the bucket")
	}
	for i := range 4 {
		for _, secret := range []string{fmt.Sprintf("a-rotated-secret-key-%d", i), "a-simulated-secret-key"} {
			if strings.Contains(m.log.String(), secret) {
				t.Errorf("the secret %s is told", secret)
			}
		}
	}
	m.eventually("the unmount", func() error { return umountHere(t.Context(), &m.d.places, at, false) })
}

// metric is the value of a metric of the daemon: its name, and the values of its labels in the
// order of their names; -1: there is none.
func (m *mounts) metric(name string) float64 {
	m.t.Helper()
	families, err := m.d.registry.Gather()
	if err != nil {
		m.t.Fatal(err)
	}
	for _, f := range families {
		for _, one := range f.GetMetric() {
			is := f.GetName()
			for _, l := range one.GetLabel() {
				is += " " + l.GetValue()
			}
			if is == name {
				return one.GetCounter().GetValue() + one.GetGauge().GetValue()
			}
		}
	}
	return -1
}

// TestSimulatedBucketDoctor: agentd doctor tells what is wrong with a bucket, and never its keys.
func TestSimulatedBucketDoctor(t *testing.T) {
	s := simulateds3.Start(t, "acme-raw")
	keys := t.TempDir()
	for name, text := range map[string]string{"key": s.Key, "wrong": "NOTTHEKEY", "secret": s.Secret} {
		if err := os.WriteFile(filepath.Join(keys, name), []byte(text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	inFiles := func(key string) string {
		return fmt.Sprintf("access_key: {file: %s/%s}, secret_key: {file: %[1]s/secret}", keys, key)
	}
	v, vault := vaultWith(t, s)
	sealed, sealedText := vaultWith(t, s)
	sealed.Seal(true)
	v.Put("team/half", map[string]any{"access": s.Key})
	for name, c := range map[string]struct {
		vault, bucket, endpoint, keys string
		want                          doctor.Result
		says                          string
	}{
		"good":               {"", "acme-raw", s.URL, inFiles("key"), doctor.OK, "acme-raw can be listed"},
		"keys in Vault":      {vault, "acme-raw", s.URL, keysInVault, doctor.OK, "acme-raw can be listed"},
		"wrong keys":         {"", "acme-raw", s.URL, inFiles("wrong"), doctor.Failed, "refuses the credentials (InvalidAccessKeyId)"},
		"no such bucket":     {"", "elsewhere", s.URL, inFiles("key"), doctor.Failed, "there is no such bucket"},
		"away":               {"", "acme-raw", "http://127.0.0.1:1", inFiles("key"), doctor.Failed, "connection refused"},
		"no file with a key": {"", "acme-raw", s.URL, inFiles("absent"), doctor.Failed, "absent"},
		"Vault sealed":       {sealedText, "acme-raw", s.URL, keysInVault, doctor.Failed, "sealed"},
		"half in Vault":      {vault, "acme-raw", s.URL, strings.ReplaceAll(keysInVault, "team/s3", "team/half"), doctor.Failed, "key"},
		"environment":        {"", "acme-raw", s.URL, "access_key: {env: POSTERN_TEST_KEY}, secret_key: {env: POSTERN_TEST_SECRET}", doctor.Warning, "environment"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			text := fmt.Sprintf("url: https://cp\n%sattachments: {workspaces: [], buckets: [{name: raw, bucket: %s, endpoint: %q, path_style: true, %s}]}\n", c.vault, c.bucket, c.endpoint, c.keys)
			parsed, err := config.Parse("f.yaml", []byte(text), nil)
			if err != nil {
				t.Fatal(err)
			}
			var r doctor.Report
			examineBuckets(t.Context(), &r, parsed)
			if len(r.Checks) != 1 || r.Checks[0].Name != "bucket raw" || r.Checks[0].Result != c.want || !strings.Contains(r.Checks[0].Message, c.says) {
				t.Errorf("got %+v, want %s %q", r.Checks, c.want, c.says)
			}
			if got := fmt.Sprint(r.Checks); strings.Contains(got, s.Secret) || strings.Contains(got, "\n") {
				t.Errorf("it tells %s", got)
			}
		})
	}
}
