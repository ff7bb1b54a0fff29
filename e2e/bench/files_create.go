package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// creating is how one directory does with many new files.
type creating struct {
	name, dir  string
	took, used []float64 // of each round, us for one file
	durable    []float64 // likewise, files with content that are on disk when they are closed
}

// creates makes many empty files, and some with content that must be durable, on the disk, on
// the mount, and through sshfs: by ssh as people use it, and with nothing but two pipes between sshfs and
// the sftp-server.
func (b *filesBench) creates(ctx context.Context, size fileSizes) error {
	all := []*creating{{name: "native", dir: b.native}, {name: "mount", dir: b.lab}}
	var missing string
	for _, peer := range []struct {
		name  string
		start func(ctx context.Context, below string) (*sshfs, error)
	}{{"sshfs", b.startSSHFS}, {"sshfs on pipes", startSSHFSOnPipes}} {
		x, err := peer.start(ctx, b.s.Dir)
		if errors.Is(err, errNoSSHFS) {
			missing = err.Error()
			continue
		}
		if err != nil {
			return err
		}
		defer x.end()
		all = append(all, &creating{name: peer.name, dir: x.mount})
	}
	for round := range 2 {
		for _, c := range all {
			if _, err := b.drain(ctx); err != nil {
				return err
			}
			dir := filepath.Join(c.dir, fmt.Sprintf("creates-%d", round))
			if err := os.Mkdir(dir, 0o755); err != nil {
				return err
			}
			got, err := b.cost(func() error { return create(dir, size.creates) })
			if err != nil {
				return err
			}
			c.took = append(c.took, got.wall.Seconds()*1e6/float64(size.creates))
			c.used = append(c.used, got.cpu.Seconds()*1e6/float64(size.creates))
		}
	}
	const content = 1000 // bytes
	durable := size.creates / 50
	for round := range 2 {
		for _, c := range all {
			if _, err := b.drain(ctx); err != nil {
				return err
			}
			dir := filepath.Join(c.dir, fmt.Sprintf("durable-%d", round))
			if err := os.Mkdir(dir, 0o755); err != nil {
				return err
			}
			// The mount's promise is close, that of all others fsync.
			got, err := b.cost(func() error { return createDurable(dir, durable, content, c.name != "mount") })
			if err != nil {
				return err
			}
			c.durable = append(c.durable, got.wall.Seconds()*1e6/float64(durable))
		}
	}
	of := map[string]*creating{}
	for _, c := range all {
		of[c.name] = c
		b.r.Printf("%s: one of %d empty files %.0f us, CPU of this process and mountd %.0f us; a durable one of %d bytes %.0f us", c.name, size.creates, c.took, c.used, content, c.durable)
	}
	asked, err := b.cost(func() error { return ask(b.lab, size.creates) })
	if err != nil {
		return err
	}
	b.r.Printf("one question that mountd has to answer (statx with AT_STATX_FORCE_SYNC): %.1f us; a create has four, and one that nobody waits for", asked.wall.Seconds()*1e6/float64(size.creates))
	ours := of["mount"]
	for _, figure := range []struct{ name, peer string }{{"files-creates-vs-sshfs", "sshfs"}, {"files-creates-vs-sshfs-on-pipes", "sshfs on pipes"}} {
		durableFigure := figure.name + "-durable"
		peer := of[figure.peer]
		if peer == nil {
			b.r.NotMeasured(figure.name, missing)
			b.r.NotMeasured(durableFigure, missing)
			continue
		}
		b.r.AtLeast(figure.name, median(peer.took)/median(ours.took), 3, "x")
		b.r.AtLeast(durableFigure, median(peer.durable)/median(ours.durable), 3, "x")
	}
	return nil
}

// create makes n empty files that must not be there.
func create(dir string, n int) error {
	for i := range n {
		fd, err := unix.Open(filepath.Join(dir, fmt.Sprintf("file-%05d", i)), unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
		if err != nil {
			return fmt.Errorf("create %d in %s: %w", i, dir, err)
		}
		if err := unix.Close(fd); err != nil {
			return err
		}
	}
	return nil
}

// ask has the kernel ask for the attributes of a node n times: the least that a request takes.
func ask(path string, n int) error {
	var st unix.Statx_t
	for range n {
		if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_STATX_FORCE_SYNC, unix.STATX_BASIC_STATS, &st); err != nil {
			return fmt.Errorf("statx %s: %w", path, err)
		}
	}
	return nil
}

// createDurable makes n files of some bytes, and syncs each if sync is set.
func createDurable(dir string, n, bytes int, sync bool) error {
	content := make([]byte, bytes)
	for i := range n {
		fd, err := unix.Open(filepath.Join(dir, fmt.Sprintf("file-%05d", i)), unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
		if err != nil {
			return fmt.Errorf("create %d in %s: %w", i, dir, err)
		}
		content[i%bytes]++
		_, err = unix.Write(fd, content)
		if err == nil && sync {
			err = unix.Fsync(fd)
		}
		if err := errors.Join(err, unix.Close(fd)); err != nil {
			return fmt.Errorf("write file %d in %s: %w", i, dir, err)
		}
	}
	return nil
}
