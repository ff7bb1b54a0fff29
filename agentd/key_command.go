package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/postern-dev/postern/agentd/checkpoint"
	"github.com/postern-dev/postern/agentd/checkpoint/pagestore"
	"github.com/postern-dev/postern/agentd/control"
)

// keyTime bounds a rotation or list of keys: a list opens every pack of checkpoints.
const keyTime = 2 * time.Minute

// actionKeyRotated is the host's own entry in its audit log for a new checkpoint key.
const actionKeyRotated = "checkpoint.key.rotate"

func newKeys() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "key",
		Short: "the host's keys for checkpoints: list them, make a new one",
		Args:  noArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newKeyCommand("rotate", "seal checkpoints with a new key from now on",
		`Make a new key, which seals checkpoints from now on. Nothing is stopped: what older keys sealed stays
readable, and agentd seals it anew in the background; a key that nothing needs any more is dropped
(agentd key list shows how far that is). Without a running agentd the key is made at once and the rest
is done when agentd runs. Back up STATE/checkpoint.key again afterwards: an older copy opens nothing new.`, true),
		newKeyCommand("list", "list the keys for checkpoints and what each still seals",
			`List the keys for checkpoints, oldest first: what each still seals, in packs of memory pages, and how many
checkpoints' descriptions. Ids tell nothing of the keys.`, false))
	return cmd
}

func newKeyCommand(name, short, long string, rotate bool) *cobra.Command {
	var p places
	var output string
	cmd := &cobra.Command{
		Use: name, Short: short, Long: long, Args: noArgs,
		Example: "  sudo agentd key " + name,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "text" && output != "json" {
				return usagef("-o is text or json, not %q", output)
			}
			ctx, cancel := context.WithTimeout(context.Background(), keyTime)
			defer cancel()
			keys, err := hostKeys(ctx, &p, rotate)
			if err != nil {
				return err
			}
			return showKeys(cmd.OutOrStdout(), keys, output)
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "text", "`FORMAT`: text or json")
	p.flags(cmd, "state", "runtime")
	return cmd
}

// hostKeys asks the running agentd, or looks into the store itself if there is none.
func hostKeys(ctx context.Context, p *places, rotate bool) ([]control.Key, error) {
	keys, err := control.AskKeys(ctx, p.runtimeDir(), control.KeyOrder{Rotate: rotate})
	if !errors.Is(err, control.ErrNotRunning) {
		return keys, err
	}
	store, err := checkpoint.OpenKeys(checkpoint.Config{State: p.state, Logger: slog.New(slog.DiscardHandler)})
	if errors.Is(err, pagestore.ErrInUse) {
		return nil, errors.New("an agentd has this state directory open but does not answer at its socket: give its --runtime, or try again when it has started or stopped")
	} else if err != nil {
		return nil, err
	}
	defer store.Close() //nolint:errcheck // what was saved is saved
	if rotate {
		if _, err := store.Rotate(); err != nil {
			return nil, err
		}
	}
	list, err := store.List(ctx)
	return toldKeys(list), err
}

func toldKeys(list []checkpoint.KeyInfo) []control.Key {
	out := make([]control.Key, 0, len(list))
	for _, k := range list {
		out = append(out, control.Key{ID: k.ID, Made: k.Made, Newest: k.Newest, Packs: k.Packs, Chunks: k.Chunks, Bytes: k.Bytes, Checkpoints: k.Checkpoints})
	}
	return out
}

func showKeys(w io.Writer, keys []control.Key, output string) error {
	if output == "json" {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(keys)
	}
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "KEY\tMADE\tSEALS NEW\tPACKS\tCHUNKS\tBYTES\tCHECKPOINTS") //nolint:errcheck // Flush tells
	for _, k := range keys {
		newest := "no"
		if k.Newest {
			newest = "yes"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%d\t%d\t%d\t%d\n", k.ID, k.Made.UTC().Format(time.RFC3339), newest, k.Packs, k.Chunks, k.Bytes, k.Checkpoints) //nolint:errcheck // Flush tells
	}
	return t.Flush()
}

// keys implements control.Config's Keys.
func (d *Daemon) keys(ctx context.Context, o control.KeyOrder) ([]control.Key, error) {
	e, err := d.checkpoints.engine()
	if err != nil {
		return nil, err
	}
	if o.Rotate {
		if err := d.record(actionKeyRotated); err != nil {
			return nil, fmt.Errorf("the key is not rotated, since the audit log can't be written: %w", err)
		}
		if _, err := e.RotateKey(); err != nil {
			return nil, err
		}
	}
	list, err := e.Keys(ctx)
	return toldKeys(list), err
}
