package clidoc

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

func TestManCommand(t *testing.T) {
	t.Setenv("SOURCE_DATE_EPOCH", "1700000000")
	write := func() string {
		root := &cobra.Command{Use: "tool", Short: "does things"}
		root.AddCommand(&cobra.Command{Use: "do", Short: "do one", Run: func(*cobra.Command, []string) {}}, ManCommand(root, "8", "1.2"))
		dir := t.TempDir()
		root.SetArgs([]string{"man", dir})
		if err := root.Execute(); err != nil {
			t.Fatal(err)
		}
		page, err := os.ReadFile(filepath.Join(dir, "tool-do.8"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(dir, "tool-man.8")); err == nil {
			t.Error("the hidden command has a page")
		}
		return string(page)
	}
	page := write()
	if !strings.Contains(page, `"TOOL-DO" "8" "Nov 2023" "Postern 1.2"`) {
		t.Errorf("no such title: %.200s", page)
	}
	if write() != page {
		t.Error("two runs gave different pages")
	}
	t.Setenv("SOURCE_DATE_EPOCH", "yesterday")
	root := &cobra.Command{Use: "tool", SilenceErrors: true, SilenceUsage: true}
	root.AddCommand(ManCommand(root, "8", "1.2"))
	root.SetArgs([]string{"man", t.TempDir()})
	if err := root.Execute(); err == nil || !strings.Contains(err.Error(), "yesterday") {
		t.Errorf("%v, want an error that names the value", err)
	}
}
