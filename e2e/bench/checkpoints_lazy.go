package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"connectrpc.com/connect"

	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

// readAll reads the whole of the frame that the sizes above 60 MB have.
const readAll = "float(df.select_dtypes('number').sum().sum()) + sum(df[c].str.len().sum() for c in df.select_dtypes('object'))"

// eagerAgent is a host like the other, on which kernels wait for all of their memory.
const eagerAgent = "eager"

// measureLazyRestores compares resumes that copy all memory first with those whose memory comes while the
// kernel runs, in turns, through Postern as a user has it, of images in memory: to the first
// result of a cell that touches next to nothing, and of one that reads all of the frame.
func measureLazyRestores(ctx context.Context, o Options, r *Report) error {
	if os.Geteuid() != 0 {
		return errors.New("checkpoints need root")
	}
	b, done, err := openCheckpointBench(ctx, o, r)
	if err != nil {
		return err
	}
	defer done()
	for _, z := range b.sizes(o) {
		if z.name == "60MB" {
			continue // below what is restored lazily
		}
		if err := b.lazilyOf(ctx, z); err != nil {
			return fmt.Errorf("lazy restore of %s: %w", z.name, err)
		}
	}
	return nil
}

func (b *checkpointBench) lazilyOf(ctx context.Context, z size) error {
	var kernels [2]*benchKernel // eager, lazy
	for i, agent := range []string{eagerAgent, "bench"} {
		k, err := b.kernelOf(ctx, agent, z.cell)
		if err != nil {
			return err
		}
		defer k.stop(ctx) //nolint:errcheck // a throwaway
		kernels[i] = k
	}
	var first, all, whole [2][]float64
	for i := range 2 * z.rounds {
		cell := "6*7"
		if i%2 == 1 {
			cell = readAll
		}
		for way, k := range kernels {
			took, done, err := b.resumeTo(ctx, k, cell)
			if err != nil {
				return err
			}
			if cell == readAll {
				all[way] = append(all[way], took)
			} else {
				first[way] = append(first[way], took)
				whole[way] = append(whole[way], done)
			}
		}
	}
	b.r.Printf("%s: resume to the first result: %.0f ms copied first, %.0f ms lazily; all memory is there after %.0f ms lazily", z.name, median(first[0]), median(first[1]), median(whole[1]))
	b.r.Printf("%s: resume to the result of a cell that reads all memory: %.0f ms copied first, %.0f ms lazily", z.name, median(all[0]), median(all[1]))
	b.r.AtMost("restore-lazy-over-eager-first-result-"+z.name, median(first[1])/median(first[0]), 1, "x")
	return nil
}

// resumeTo suspends a kernel, and times its way back to the result of a cell, and until all of
// its memory was there.
func (b *checkpointBench) resumeTo(ctx context.Context, k *benchKernel, cell string) (result, whole float64, err error) {
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
	if err := k.attach(ctx); err != nil {
		return 0, 0, err
	}
	if _, err = k.run(ctx, cell); err != nil {
		return 0, 0, err
	}
	result = since(began)
	for {
		list, err := b.c.Kernels.ListKernels(ctx, connect.NewRequest(&posternv1.ListAgentKernelsRequest{Agent: k.agent}))
		if err != nil {
			return 0, 0, err
		}
		coming := false
		for _, one := range list.Msg.Kernels {
			coming = coming || one.Kernel.GetId() == k.id && one.Kernel.GetNotice() != ""
		}
		if !coming {
			return result, since(began), nil
		}
		time.Sleep(5 * time.Millisecond)
	}
}
