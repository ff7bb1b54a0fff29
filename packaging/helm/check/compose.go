package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/types"
)

// composition reads a Compose file as `docker compose config` does, against the
// specification's schema, with the files there that init.sh makes, and checks what the schema
// can't know.
func composition(dir string) error {
	work, err := os.MkdirTemp("", "postern-compose-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work) //nolint:errcheck // only copies
	text, err := os.ReadFile(filepath.Join(dir, "compose.yaml"))
	if err != nil {
		return err
	}
	file := filepath.Join(work, "compose.yaml")
	if err := errors.Join(os.WriteFile(file, text, 0o600), os.Mkdir(filepath.Join(work, "secrets"), 0o700)); err != nil {
		return err
	}
	for _, name := range []string{"s3.env", "s3-server.env", "database", "master.key"} {
		if err := os.WriteFile(filepath.Join(work, "secrets", name), nil, 0o600); err != nil {
			return err
		}
	}
	options, err := cli.NewProjectOptions([]string{file})
	if err != nil {
		return err
	}
	project, err := options.LoadProject(context.Background())
	if err != nil {
		return err
	}
	one, two := project.Services["controlplane-1"], project.Services["controlplane-2"]
	if len(one.Command) == 0 || len(one.Command) != len(two.Command) {
		return fmt.Errorf("the replicas' commands differ: %q and %q", one.Command, two.Command)
	}
	for i := range one.Command {
		if one.Command[i] != two.Command[i] && one.Command[i] != "--peer-advertise=https://controlplane-1:9443" {
			return fmt.Errorf("the replicas' commands differ: %q and %q", one.Command[i], two.Command[i])
		}
	}
	if volumeOf(one) == volumeOf(two) {
		return errors.New("the replicas share a data directory")
	}
	return nil
}

func volumeOf(s types.ServiceConfig) string {
	for _, v := range s.Volumes {
		if v.Target == "/data" {
			return v.Source
		}
	}
	return ""
}
