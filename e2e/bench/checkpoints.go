package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/postern-dev/postern/agentd/checkpoint/criutest"
	"github.com/postern-dev/postern/client"
	"github.com/postern-dev/postern/e2e/stack"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// frame makes data as notebooks have it: keys, days, categories, repeated strings, amounts
// of two decimals, small counts, flags. It takes about 70 bytes a row.
const frame = `
import numpy as np, pandas as pd
def frame(rows, seed=1):
    r = np.random.default_rng(seed)
    cities = np.array(["Leipzig", "Lyon", "Porto", "Kraków", "Gent", "Tartu", "Brno", "Turku"] + ["place %%04d" %% i for i in range(500)], dtype=object)
    return pd.DataFrame({
        "id": np.arange(rows), "day": pd.Timestamp("2024-01-01") + pd.to_timedelta(np.sort(r.integers(0, 730, rows)), unit="D"),
        "customer": r.zipf(1.3, rows) %% 100_000, "shop": pd.Categorical(r.choice(["online", "north", "south"], rows)),
        "city": cities[r.zipf(1.5, rows) %% len(cities)], "amount": np.round(r.gamma(2, 30, rows), 2), "count": r.integers(1, 9, rows),
        "discount": r.choice([0, 0, 0, 5, 10], rows) / 100, "paid": r.random(rows) < 0.9,
    })
df = frame(%d)
print(len(df))
`

// bareKernel is what a kernel takes with nothing loaded, frameRow a row of the frame, in
// bytes; pandas takes some 40 MB.
const (
	bareKernel = 60 << 20
	frameBase  = 100 << 20
	frameRow   = 62
)

// size is one kernel to measure.
type size struct {
	name   string
	cell   string
	rounds int
}

// measureCheckpoints measures checkpoints from a client through control plane, tunnel,
// shim and CRIU against criu(8) itself, on a kernel of its own with the same memory.
func measureCheckpoints(ctx context.Context, o Options, r *Report) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("checkpoints need root")
	}
	b, done, err := openCheckpointBench(ctx, o, r)
	if err != nil {
		return err
	}
	defer done()
	sizes := b.sizes(o)
	for _, z := range sizes {
		if err := b.against(ctx, z); err != nil {
			return fmt.Errorf("%s: %w", z.name, err)
		}
	}
	if err := b.second(ctx, "80MB", "import numpy as np, pandas as pd; df = pd.DataFrame({'x': range(1000)}); print(1)", 8); err != nil {
		return err
	}
	if err := b.growing(ctx); err != nil {
		return err
	}
	rows := (500<<20 - frameBase) / frameRow
	if o.Short {
		rows /= 10
	}
	used, err := b.atRest(ctx, fmt.Sprintf(frame, rows))
	if err != nil {
		return err
	}
	r.AtMost("checkpoint-disk-at-rest-pandas", used, 0.6, "x")
	floats, err := b.atRest(ctx, fmt.Sprintf("import numpy as np, pandas as pd; df = pd.DataFrame(np.random.default_rng(1).random((%d, 8))); print(1)", rows))
	if err != nil {
		return err
	}
	r.Printf("disk at rest, a kernel of random floats, which nothing compresses: %.2f of the images", floats)
	return nil
}

func (b *checkpointBench) sizes(o Options) []size {
	if o.Short {
		return []size{{"60MB", "n = 1", 3}, {"500MB", fmt.Sprintf(frame, (500<<20-frameBase)/frameRow), 2}}
	}
	return []size{
		{"60MB", "n = 1", 9},
		{"500MB", fmt.Sprintf(frame, (500<<20-frameBase)/frameRow), 5},
		{"2GB", fmt.Sprintf(frame, (2000<<20-frameBase)/frameRow), 3},
	}
}

// openCheckpointBench starts a control plane and two hosts that make checkpoints; on the
// second kernels wait for all of their memory. done ends them.
func openCheckpointBench(ctx context.Context, o Options, r *Report) (b *checkpointBench, done func(), err error) {
	var undo []func()
	done = func() {
		for i := len(undo) - 1; i >= 0; i-- {
			undo[i]()
		}
	}
	defer func() {
		if err != nil {
			done()
		}
	}()
	criu := ""
	for _, p := range []string{"/opt/criu/bin/criu", "/usr/sbin/criu"} {
		if _, err := os.Stat(p); err == nil {
			criu = p
			break
		}
	}
	if criu == "" {
		return nil, done, errors.New("there is no CRIU: run packaging/dev/deps.sh criu")
	}
	bin, remove, err := checkpointBinaries(o.Bin)
	if err != nil {
		return nil, done, err
	}
	undo = append(undo, remove)
	s, err := stack.New(stack.Options{Bin: bin})
	if err != nil {
		return nil, done, err
	}
	undo = append(undo, func() { s.Close() }) //nolint:errcheck // a throwaway
	if err := s.StartControlPlane(ctx); err != nil {
		return nil, done, err
	}
	const kernels = "kernels: {specs: [python3], warm: 0, max: 4, limits: {memory: 6GiB}"
	a, err := s.Join(ctx, "bench", kernels+"}\n")
	if err == nil {
		_, err = s.Join(ctx, eagerAgent, kernels+", uid_base: 1903000000, checkpoints: {lazy: off}}\n")
	}
	if err != nil {
		return nil, done, err
	}
	token, err := os.ReadFile(s.TokenFile)
	if err != nil {
		return nil, done, err
	}
	c, err := client.New(client.Config{URL: s.URL, Token: client.StaticToken(client.NewSecret(strings.TrimSpace(string(token)))), CAFile: s.CAFile})
	if err != nil {
		return nil, done, err
	}
	undo = append(undo, c.Close)
	return &checkpointBench{r: r, s: s, c: c, criu: criu, store: filepath.Join(a.StateDir(), "checkpoints")}, done, nil
}

// checkpointBinaries is a directory with an agentd that can make checkpoints here: on a
// machine without CAP_SYS_RESOURCE one with the tests' help for CRIU, built for it.
func checkpointBinaries(bin string) (dir string, done func(), err error) {
	done = func() {}
	lib, err := criutest.Library()
	if err != nil || lib == "" {
		return bin, done, err
	}
	if bin, err = filepath.Abs(bin); err != nil {
		return "", done, err
	}
	if dir, err = os.MkdirTemp("", "postern-bench-"); err != nil {
		return "", done, err
	}
	done = func() { _ = os.RemoveAll(dir) }
	defer func() {
		if err != nil {
			done()
		}
	}()
	for _, name := range []string{"controlplane", "postern"} {
		if err := os.Symlink(filepath.Join(bin, name), filepath.Join(dir, name)); err != nil {
			return "", done, err
		}
	}
	build := exec.Command("go", "build", "-tags", "posterncriushim", "-o", filepath.Join(dir, "agentd"), "github.com/postern-dev/postern/agentd")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", done, fmt.Errorf("build agentd: %w: %s", err, out)
	}
	text, err := os.ReadFile(lib)
	if err == nil {
		err = errors.Join(os.Chmod(dir, 0o755), os.WriteFile(filepath.Join(dir, "criu-preload.so"), text, 0o755))
	}
	return dir, done, err
}

type checkpointBench struct {
	r           *Report
	s           *stack.Stack
	c           *client.Client
	criu, store string
}

func (b *checkpointBench) kernel(ctx context.Context, cell string) (*benchKernel, error) {
	return b.kernelOf(ctx, "bench", cell)
}

func (b *checkpointBench) kernelOf(ctx context.Context, agent, cell string) (*benchKernel, error) {
	k, _, err := startKernelOn(ctx, b.c, agent)
	if err != nil {
		return nil, err
	}
	if _, err = k.run(ctx, cell); err != nil {
		_ = k.stop(ctx)
	}
	return k, err
}

func (b *checkpointBench) save(ctx context.Context, id string) (*posternv1.CheckpointKernelResponse, error) {
	got, err := b.c.Checkpoints.CheckpointKernel(ctx, connect.NewRequest(&posternv1.CheckpointKernelRequest{KernelId: id}))
	if err != nil {
		return nil, err
	}
	return got.Msg, nil
}

// against measures one size: standstill against criu dump's, and a resume to the first
// result against criu restore and a client.
func (b *checkpointBench) against(ctx context.Context, z size) error {
	raw, err := startRawKernel(ctx, b.criu, z.cell)
	if err != nil {
		return err
	}
	defer raw.end()
	k, err := b.kernel(ctx, z.cell)
	if err != nil {
		return err
	}
	defer k.stop(ctx) //nolint:errcheck // a throwaway
	var ours, theirs, calls, dumps []float64
	for i := range z.rounds {
		images, err := raw.dump(ctx, true)
		if err != nil {
			return err
		}
		theirs, dumps = append(theirs, images.frozen), append(dumps, images.took)
		images.remove()
		began := time.Now()
		got, err := b.save(ctx, k.id)
		if err != nil {
			return err
		}
		calls = append(calls, since(began))
		ours = append(ours, float64(got.Standstill.AsDuration().Microseconds())/1000)
		if i == 0 {
			b.r.Printf("%s: images of %.0f MB, criu's own %.0f MB", z.name, float64(got.Checkpoint.Size)/1e6, float64(images.bytes)/1e6)
		}
		if i == 1 && z.name == "500MB" {
			if _, err := k.run(ctx, "x = 1"); err != nil {
				return err
			}
			next, err := b.save(ctx, k.id)
			if err != nil {
				return err
			}
			b.r.AtMost("checkpoint-second-500MB", 100*float64(next.Checkpoint.Stored)/float64(next.Checkpoint.Size), 3, "%")
		}
	}
	b.r.Printf("%s: standstill %.0f ms, criu dump's %.0f ms (all of it: %.0f ms); a checkpoint takes %.0f ms", z.name, median(ours), median(theirs), median(dumps), median(calls))
	b.r.AtMost("checkpoint-freeze-"+z.name, median(ours)/median(theirs), 1.15, "x")

	var warm, cold, rawWarm, rawCold, resumes, restores []float64
	for i := range 2 * z.rounds {
		program := i%2 == 1 // a client program is started, or one that waits connects
		w, restore, err := raw.again(ctx, program)
		if err != nil {
			return err
		}
		restores = append(restores, restore)
		v, resume, err := b.resume(ctx, k, program)
		if err != nil {
			return err
		}
		resumes = append(resumes, resume)
		if program {
			rawCold, cold = append(rawCold, w), append(cold, v)
		} else {
			rawWarm, warm = append(rawWarm, w), append(warm, v)
		}
	}
	older, err := b.older(ctx, k)
	if err != nil {
		return err
	}
	b.r.Printf("%s: a rollback to an older checkpoint, out of the store, to the first result: %.0f ms", z.name, older)
	b.r.AtMost("rollback-older-first-result-client-waits-"+z.name, older/median(rawWarm), 1.2, "x")
	b.r.Printf("%s: a resume takes %.0f ms (criu restore %.0f ms), to the first result %.0f ms (%.0f ms), by a program that starts %.0f ms (%.0f ms)",
		z.name, median(resumes), median(restores), median(warm), median(rawWarm), median(cold), median(rawCold))
	b.r.AtMost("restore-first-result-"+z.name, median(cold)/median(rawCold), 1.2, "x")
	b.r.AtMost("restore-first-result-client-waits-"+z.name, median(warm)/median(rawWarm), 1.2, "x")
	return nil
}

// resume suspends a kernel and times its way back, to the first result of a cell; program
// runs that with `postern kernel exec`.
func (b *checkpointBench) resume(ctx context.Context, k *benchKernel, program bool) (first, resume float64, err error) {
	k.channels.Close()
	which := &posternv1.KernelCheckpointRequest{KernelId: k.id}
	if _, err := b.c.Checkpoints.SuspendKernel(ctx, connect.NewRequest(which)); err != nil {
		return 0, 0, err
	}
	time.Sleep(300 * time.Millisecond)
	began := time.Now()
	if _, err := b.c.Checkpoints.ResumeKernel(ctx, connect.NewRequest(which)); err != nil {
		return 0, 0, err
	}
	resume = since(began)
	if program {
		if _, err := b.s.Postern(ctx, "kernel", "exec", k.id, "6*7"); err != nil {
			return 0, 0, err
		}
		first = since(began)
	}
	if err := k.attach(ctx); err != nil {
		return 0, 0, err
	}
	_, err = k.run(ctx, "6*7")
	if !program {
		first = since(began)
	}
	return first, resume, err
}

// older times a rollback to a checkpoint whose images are not in memory any more, to the
// first result.
func (b *checkpointBench) older(ctx context.Context, k *benchKernel) (float64, error) {
	var took []float64
	for range 3 {
		first, err := b.save(ctx, k.id)
		if err != nil {
			return 0, err
		}
		if _, err := b.save(ctx, k.id); err != nil {
			return 0, err
		}
		k.channels.Close()
		time.Sleep(300 * time.Millisecond)
		began := time.Now()
		if _, err := b.c.Checkpoints.RollbackKernel(ctx, connect.NewRequest(&posternv1.KernelCheckpointRequest{KernelId: k.id, CheckpointId: first.Checkpoint.Id})); err != nil {
			return 0, err
		}
		if err := k.attach(ctx); err != nil {
			return 0, err
		}
		if _, err := k.run(ctx, "6*7"); err != nil {
			return 0, err
		}
		took = append(took, since(began))
	}
	return median(took), nil
}

// second is what a second checkpoint after a small cell takes, in percent of the images.
func (b *checkpointBench) second(ctx context.Context, name, cell string, goal float64) error {
	k, err := b.kernel(ctx, cell)
	if err != nil {
		return err
	}
	defer k.stop(ctx) //nolint:errcheck // a throwaway
	if _, err := b.save(ctx, k.id); err != nil {
		return err
	}
	if _, err := k.run(ctx, "x = 1"); err != nil {
		return err
	}
	got, err := b.save(ctx, k.id)
	if err != nil {
		return err
	}
	b.r.Printf("%s: images of %.0f MB, the second after x = 1 takes %.0f KB", name, float64(got.Checkpoint.Size)/1e6, float64(got.Checkpoint.Stored)/1e3)
	b.r.AtMost("checkpoint-second-"+name, 100*float64(got.Checkpoint.Stored)/float64(got.Checkpoint.Size), goal, "%")
	return nil
}

// growing is a notebook of 30 cells, with a checkpoint after each.
func (b *checkpointBench) growing(ctx context.Context) error {
	k, err := b.kernel(ctx, fmt.Sprintf(frame, 200_000))
	if err != nil {
		return err
	}
	defer k.stop(ctx) //nolint:errcheck // a throwaway
	before, err := diskUse(b.store)
	if err != nil {
		return err
	}
	var images float64
	for i := range 30 {
		cell := []string{
			fmt.Sprintf("df['c%d'] = df.amount * %d", i, i+2),
			fmt.Sprintf("g%d = df.groupby('city').amount.agg(['sum', 'mean'])", i),
			fmt.Sprintf("d%d = [{'i': i, 'name': 'n%%d' %% i} for i in range(5000)]", i),
		}[i%3]
		if _, err := k.run(ctx, cell); err != nil {
			return err
		}
		got, err := b.save(ctx, k.id)
		if err != nil {
			return err
		}
		images += float64(got.Checkpoint.Size)
	}
	after, err := diskUse(b.store)
	if err != nil {
		return err
	}
	b.r.Printf("30 checkpoints of a growing notebook: images of %.0f MB, %.0f MB on disk", images/1e6, float64(after-before)/1e6)
	b.r.AtLeast("checkpoint-30-smaller", images/float64(after-before), 8, "x")
	return nil
}

// atRest is what one checkpoint of a kernel takes on disk, over its images.
func (b *checkpointBench) atRest(ctx context.Context, cell string) (float64, error) {
	k, err := b.kernel(ctx, cell)
	if err != nil {
		return 0, err
	}
	defer k.stop(ctx) //nolint:errcheck // a throwaway
	before, err := diskUse(b.store)
	if err != nil {
		return 0, err
	}
	got, err := b.save(ctx, k.id)
	if err != nil {
		return 0, err
	}
	after, err := diskUse(b.store)
	b.r.Printf("one checkpoint: images of %.0f MB, %.0f MB more on disk", float64(got.Checkpoint.Size)/1e6, float64(after-before)/1e6)
	return float64(after-before) / float64(got.Checkpoint.Size), err
}

// diskUse is what files below a directory take on the disk, in bytes.
func diskUse(dir string) (sum int64, err error) {
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		var st unix.Stat_t
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil
		case err != nil:
			return err
		case unix.Lstat(path, &st) == nil:
			sum += st.Blocks * 512
		}
		return nil
	})
	return sum, err
}

// since is in milliseconds.
func since(began time.Time) float64 { return float64(time.Since(began).Microseconds()) / 1000 }
