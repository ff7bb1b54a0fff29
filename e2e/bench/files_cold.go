package main

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"time"

	"github.com/postern-dev/postern/tunnel"
)

// coldRounds is how often a file is read of which the host has nothing.
const coldRounds = 3

// offer puts a file into workspaces that no host knows of: NAME-0, NAME-1 ...
func (b *filesBench) offer(ctx context.Context, name, file string) error {
	for round := range coldRounds {
		workspace := fmt.Sprintf("%s-%d", name, round)
		if _, err := b.s.Postern(ctx, "workspace", "create", workspace); err != nil {
			return err
		}
		if _, err := b.s.Postern(ctx, "file", "put", file, workspace+":/"); err != nil {
			return err
		}
	}
	return nil
}

// cold reads a file of which the host has nothing, in turns with one bulk stream of a
// tunnel with nothing around it. Nothing but the machine limits either.
func (b *filesBench) cold(ctx context.Context, size fileSizes) error {
	file := filepath.Join(b.native, "cold")
	if err := fill(file, size.file, 2); err != nil {
		return err
	}
	if err := b.offer(ctx, "cold", file); err != nil {
		return err
	}
	ratio, err := b.coldTurns(ctx, "cold", size.file, func() (*link, error) { return ourLink(tunnel.Bulk) })
	if err != nil {
		return err
	}
	b.r.AtLeast("files-cold-read-vs-tunnel", ratio, 0.8, "x")
	return nil
}

// distant is the same over a path of 1 Gbit/s and 20 ms, which both go through in turn.
func (b *filesBench) distant(ctx context.Context, size fileSizes) error {
	path := relayRole{Rate: 1e9 / 8, Delay: 10 * time.Millisecond, Queue: 4 << 20}
	path.Target = b.s.Listen
	relay, err := start(ctx, "tunnel-relay", path)
	if err != nil {
		return err
	}
	defer relay.stop()
	var addr string
	if err := relay.ask("addr", &addr); err != nil {
		return err
	}
	far := *b
	if far.agent, err = b.s.NewAgent("far", "attachments: {host_mounts: ["+b.mounts+"]}\n"); err != nil {
		return err
	}
	far.agent.URL = "http://" + addr
	key, err := b.s.NewKey(ctx)
	if err != nil {
		return err
	}
	if err := far.agent.Register(ctx, key); err != nil {
		return err
	}
	if err := far.agent.Start(); err != nil {
		return err
	}
	if err := far.agent.Online(ctx); err != nil {
		return err
	}
	if far.pid, err = far.awaitMountd(ctx); err != nil {
		return err
	}
	file, n := filepath.Join(b.native, "distant"), size.file/2
	if err := fill(file, n, 3); err != nil {
		return err
	}
	if err := b.offer(ctx, "distant", file); err != nil {
		return err
	}
	ratio, err := far.coldTurns(ctx, "distant", n, func() (*link, error) {
		e, err := newEndpoint(nil)
		if err != nil {
			return nil, err
		}
		path.Target = e.addr
		relay, err := start(ctx, "tunnel-relay", path)
		if err != nil {
			e.close()
			return nil, err
		}
		end := func() { relay.stop(); e.close() }
		var addr string
		if err := relay.ask("addr", &addr); err != nil {
			end()
			return nil, err
		}
		d, a, err := e.pair(ctx, addr)
		if err != nil {
			end()
			return nil, err
		}
		// As files go: from the acceptor to the one who dialed.
		return &link{
			open:   func(ctx context.Context) (net.Conn, error) { return a.Open(ctx, tunnel.Bulk) },
			accept: d.Listener().Accept,
			close:  func() { _ = d.Close(nil); end() },
		}, nil
	})
	if err != nil {
		return err
	}
	b.r.AtLeast("files-distant-cold-read-vs-tunnel", ratio, 0.8, "x")
	return nil
}

// coldTurns reads what offer has put, a file of n bytes, in turns with one stream of a
// tunnel. It returns how fast the file is, the stream being 1: medians.
func (b *filesBench) coldTurns(ctx context.Context, name string, n int64, bare func() (*link, error)) (float64, error) {
	var ours, carried []float64
	for round := range coldRounds {
		l, err := bare()
		if err != nil {
			return 0, err
		}
		x, err := transfer(ctx, l, 64<<10, n)
		l.close()
		if err != nil {
			return 0, err
		}
		dir, err := b.mount(ctx, fmt.Sprintf("%s-%d", name, round))
		if err != nil {
			return 0, err
		}
		before, self := b.everyCPU(), cpuSelf()
		got, err := b.cost(func() error { return readThrough(filepath.Join(dir, name), n) })
		if err != nil {
			return 0, err
		}
		after, reader := b.everyCPU(), cpuSelf()-self
		y := rate{bytes: n, elapsed: got.wall}
		b.r.Printf("%s read %.0f MB/s (CPU s/GB: control plane %.2f, agentd %.2f, mountd %.2f, reader %.2f); a bulk stream %.0f MB/s (%.2f)", name, y.mbps(),
			perGB(after[0]-before[0], n), perGB(after[1]-before[1], n), perGB(after[2]-before[2], n), perGB(reader, n), x.mbps(), x.cpuPerGB())
		ours, carried = append(ours, y.mbps()), append(carried, x.mbps())
	}
	return median(ours) / median(carried), nil
}
