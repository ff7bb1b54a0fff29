package clidoc

import (
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// ManCommand returns `man DIR`, which writes a page for root and each of its commands into
// DIR, which must be there. Section is 1 for users' commands and 8 for administrators'. The
// pages' date is SOURCE_DATE_EPOCH, in seconds since 1970, where it is set: two builds
// then give the same bytes.
func ManCommand(root *cobra.Command, section, version string) *cobra.Command {
	return &cobra.Command{
		Use: "man DIR", Short: "Write the manual pages into a directory", Example: "  " + root.Name() + " man /usr/local/share/man/man" + section,
		Hidden: true, Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			date := time.Now()
			if text := os.Getenv("SOURCE_DATE_EPOCH"); text != "" {
				seconds, err := strconv.ParseInt(text, 10, 64)
				if err != nil {
					return fmt.Errorf("SOURCE_DATE_EPOCH is %q: want seconds since 1970", text)
				}
				date = time.Unix(seconds, 0)
			}
			date = date.UTC()
			root.DisableAutoGenTag = true
			return doc.GenManTree(root, &doc.GenManHeader{
				Section: section, Date: &date, Source: "Postern " + version, Manual: "Postern",
			}, args[0])
		},
	}
}
