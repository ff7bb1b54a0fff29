//go:build reals3

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/attach/mountd"
	"github.com/postern-dev/postern/e2e/s3test"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/jupyter"
	"github.com/postern-dev/postern/proto/kernelstream"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// newRealBucket is a lab with two buckets of a real S3 server: raw, which may be written, and ro.
func newRealBucket(t *testing.T) (m *mounts, objects string) {
	t.Helper()
	m, objects = realBucketLab(t, newTestControl(t), "")
	m.start()
	m.eventually("mountd", func() error {
		if s := m.d.attachmentStatus(); s.PID == 0 {
			return errors.New(s.Error)
		}
		return nil
	})
	return m, objects
}

// realBucketLab is the same before agentd is started; more is other configuration.
func realBucketLab(t *testing.T, c *testControl, more string) (m *mounts, objects string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts")
	}
	s := s3test.Start(t)
	objects = s.Bucket(t, "acme-raw")
	keys := t.TempDir()
	for name, value := range map[string]string{"key": s.Key, "secret": s.Secret} {
		if err := os.WriteFile(filepath.Join(keys, name), []byte(value+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	reach := fmt.Sprintf("bucket: acme-raw, endpoint: %q, path_style: true, access_key: {file: %s/key}, secret_key: {file: %s/secret}", s.URL, keys, keys)
	m = &mounts{lab: newLab(t, c, more+"attachments:\n  workspaces: []\n  host_mounts: ["+dir+"]\n  buckets:\n    - {name: raw, "+reach+"}\n    - {name: ro, read_only: true, prefix: d/, "+reach+"}\n"), dir: dir}
	t.Cleanup(m.clean)
	return m, objects
}

// TestRealBucketInKernels gives two kernels a bucket, one of them read-only, and lets one write what the other reads.
func TestRealBucketInKernels(t *testing.T) {
	c := newTestControl(t)
	m, objects := realBucketLab(t, c, "sources: []\nkernels: {specs: [python3], warm: 0, uid_base: 1983500000}\n")
	startProcess(t, m.lab, unwatched)
	up := c.awaitHello(1)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	api := kernels(up)
	t.Cleanup(func() { endKernels(t, m.path("state/kernels")) }) // what a test that fails leaves
	start := func(mounts ...*posternv1.KernelMount) (string, error) {
		id := jupyter.NewID()
		_, err := api.StartKernel(ctx, connect.NewRequest(&posternv1.StartKernelRequest{Id: id, Spec: "python3", Principal: ana, Mounts: mounts}))
		return id, err
	}
	run := func(kernel, code string) string {
		t.Helper()
		stream, err := kernelstream.Dial(ctx, tunnelDoer{up}, &posternv1.KernelChannelsRequest{KernelId: kernel, Client: jupyter.NewID(), Principal: ana})
		if err != nil {
			t.Fatal(err)
		}
		defer stream.Close() //nolint:errcheck // it is done with
		_, wait := cell(t, stream, code)
		return wait()
	}
	if _, err := start(&posternv1.KernelMount{Workspace: "ro"}); proto.CodeOf(err) != proto.CodePolicyDenied {
		t.Errorf("a read-only bucket for writing: %v", err)
	}
	writer, err := start(&posternv1.KernelMount{Workspace: "raw"})
	if err != nil {
		t.Fatal(err)
	}
	reader, err := start(&posternv1.KernelMount{Workspace: "raw", ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	if got := run(writer, "import csv,os\nos.makedirs('d')\nwith open('d/t.csv','w') as f: csv.writer(f).writerows([[i,i*i] for i in range(1000)])\nprint(len(os.listdir('/work/raw')))"); !strings.Contains(got, "1") {
		t.Errorf("the writer said %s", got)
	}
	if got, err := os.ReadFile(filepath.Join(objects, "d/t.csv")); err != nil || !strings.HasSuffix(string(got), "999,998001\r\n") {
		t.Errorf("the object: %d bytes, %v", len(got), err)
	}
	if got := run(reader, "import csv\nprint(sum(int(r[1]) for r in csv.reader(open('/work/raw/d/t.csv'))))\ntry: open('/work/raw/x','w')\nexcept OSError as e: print(e.errno)"); !strings.Contains(got, "332833500") || !strings.Contains(got, "30") {
		t.Errorf("the reader said %s", got)
	}
	// The kernel has neither the keys nor a way to agentd's socket.
	if got := run(writer, "print([k for k,v in os.environ.items() if 'a-secret-key' in v], os.path.exists('"+m.path("state/attach")+"'))"); !strings.Contains(got, "[] False") {
		t.Errorf("the kernel sees %s", got)
	}
	for _, id := range []string{writer, reader} {
		if _, err := api.StopKernel(ctx, connect.NewRequest(&posternv1.KernelRequest{Id: id, Principal: ana})); err != nil {
			t.Error(err)
		}
	}
}

// TestRealBucket mounts a bucket of a real S3 server, and lets everything happen to the
// processes that may.
func TestRealBucket(t *testing.T) {
	m, objects := newRealBucket(t)
	dir := m.target("raw")
	if err := m.mount("raw", dir, false); err != nil {
		t.Fatal(err)
	}
	if got := m.sh("mkdir %s/d && echo hello > %s/d/f && cat %s/d/f && ls %s", dir, dir, dir, dir); got != "hello\nd" {
		t.Fatalf("a file written and read: %s", got)
	}
	if got, err := os.ReadFile(filepath.Join(objects, "d/f")); string(got) != "hello\n" {
		t.Errorf("the object: %q, %v", got, err)
	}
	// Handles, read and written, live through kill -9 of mountd.
	pid := m.d.attachmentStatus().PID
	if got := m.sh("exec 3<%s/d/f 4>%s/d/g 5>%s/d/gone; echo one >&4; echo kept >&5; rm %s/d/gone; kill -9 %d; cat <&3; echo two >&4; echo more >&5; exec 4>&-; cat %s/d/g; ls %s/d",
		dir, dir, dir, dir, pid, dir, dir); got != "hello\none\ntwo\nf\ng" {
		t.Errorf("after kill -9 of mountd: %s", got)
	}
	if got, err := os.ReadFile(filepath.Join(objects, "d/g")); string(got) != "one\ntwo\n" {
		t.Errorf("the object: %q, %v", got, err)
	}
	ro := m.target("ro")
	if err := m.mount("ro", ro, true); err != nil {
		t.Fatal(err)
	}
	if got := m.sh("cat %s/f; touch %s/x; ls %s", ro, ro, ro); !strings.Contains(got, "hello") || !strings.Contains(got, "Read-only") || !strings.Contains(got, "f\ng") {
		t.Errorf("read-only, below a prefix: %s", got)
	}
	// Without agentd what is cached goes on; a write waits for it.
	m.stop()
	if got := m.sh("cat %s/d/f", dir); got != "hello" {
		t.Errorf("while agentd is away: %s", got)
	}
	waits := make(chan string)
	go func() { waits <- m.sh("echo later > %s/d/h && cat %s/d/h", dir, dir) }()
	m.start()
	if got := <-waits; got != "later" {
		t.Errorf("a write that waited for agentd: %s", got)
	}
	// Nothing of the secrets is anywhere on the way.
	for _, pid := range m.processes() {
		for _, file := range []string{"cmdline", "environ"} {
			if text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file)); strings.Contains(string(text), "a-secret-key") {
				t.Errorf("the secret is in %s of %d", file, pid)
			}
		}
	}
	for _, d := range []string{dir, ro} {
		if err := umountHere(t.Context(), &m.d.places, d, false); err != nil {
			t.Error(err)
		}
	}
	if here, err := mountd.Mounted(dir); here || err != nil {
		t.Errorf("still mounted: %v, %v", here, err)
	}
}

// TestRealBucketPrograms runs what people run.
func TestRealBucketPrograms(t *testing.T) {
	m, _ := newRealBucket(t)
	dir := m.target("raw")
	if err := m.mount("raw", dir, false); err != nil {
		t.Fatal(err)
	}
	for what, script := range map[string]string{
		"cp and cmp":    "head -c 20000000 /dev/urandom > $T/a; cp $T/a $M/a; cmp $T/a $M/a; cp $M/a $M/b; cmp $T/a $M/b",
		"tar":           "mkdir $T/src; for i in $(seq 50); do echo $i > $T/src/$i; done; tar cf $M/src.tar -C $T src; mkdir $M/x; tar xmf $M/src.tar -C $M/x --no-same-owner --no-same-permissions; diff -r $T/src $M/x/src",
		"grep and find": "mkdir $M/g; echo needle > $M/g/1; echo hay > $M/g/2; test $(grep -rl needle $M/g) = $M/g/1; test $(find $M/g -type f | wc -l) = 2",
		"python csv": `python3 - "$M" <<'E'
import csv,sys,mmap,os
p=sys.argv[1]+'/t.csv'
with open(p,'w',newline='') as f:
    w=csv.writer(f)
    for i in range(20000): w.writerow([i,i*i,'x'*20])
assert sum(int(r[1]) for r in csv.reader(open(p)))==sum(i*i for i in range(20000))
with open(p,'r+b') as f:
    m=mmap.mmap(f.fileno(),0); m[0:1]=b'9'; m.flush(); m.close()
assert open(p,'rb').read(1)==b'9'
with open(p,'ab') as f: f.write(b'last\n')
assert open(p,'rb').read().endswith(b'last\n')
E`,
		"sqlite, read-only": `python3 - "$T" "$M" <<'E'
import sqlite3,sys,shutil
c=sqlite3.connect(sys.argv[1]+'/d.db'); c.execute('create table t(a,b)')
c.executemany('insert into t values(?,?)',((i,'y'*100) for i in range(20000))); c.commit(); c.close()
shutil.copyfile(sys.argv[1]+'/d.db',sys.argv[2]+'/d.db')
r=sqlite3.connect('file:'+sys.argv[2]+'/d.db?mode=ro',uri=True)
assert r.execute('select count(*),sum(a) from t').fetchone()==(20000,199990000)
E`,
		"editor's rename": "echo old > $M/cfg; echo new > $M/cfg.tmp; mv $M/cfg.tmp $M/cfg; test $(cat $M/cfg) = new; test ! -e $M/cfg.tmp",
	} {
		if got := m.sh("set -eu; M=%s T=%s; %s", dir, t.TempDir(), script); got != "" {
			t.Errorf("%s: %s", what, got)
		}
	}
}

// TestRealBucketGone: mistakes are told when the bucket is mounted, and it may go while it is.
func TestRealBucketGone(t *testing.T) {
	m, objects := newRealBucket(t)
	if err := m.mount("other", m.target("other"), false); proto.CodeOf(err) != proto.CodePolicyDenied {
		t.Errorf("a name that is nothing: %v", err)
	}
	if err := m.mount("ro", m.target("ro"), false); err != nil { // as for workspaces: read-only by the policy
		t.Error(err)
	}
	dir := m.target("raw")
	if err := m.mount("raw", dir, false); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(objects, objects+".away"); err != nil {
		t.Fatal(err)
	}
	if got := m.sh("echo x > %s/f", dir); !strings.Contains(got, syscall.EIO.Error()) && !strings.Contains(strings.ToLower(got), "input/output error") {
		t.Errorf("a write to a bucket that has gone: %s", got)
	}
	if s := m.d.attachmentStatus(); len(s.Workspaces) == 0 {
		t.Errorf("status: %+v", s)
	}
	if err := os.Rename(objects+".away", objects); err != nil {
		t.Fatal(err)
	}
	if got := m.sh("echo y > %s/g && cat %s/g", dir, dir); got != "y" {
		t.Errorf("after it is back: %s", got)
	}
	_ = unix.Unmount(m.dir+"/ro", unix.MNT_DETACH)
}
