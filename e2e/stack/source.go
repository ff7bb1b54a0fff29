package stack

import (
	"fmt"
	"os"
	"path/filepath"
)

// Source writes a password file (0600) into dir and returns the configuration of
// one data source. policy is YAML, each line indented by six; may be empty.
func Source(dir, name, dsn, password, policy string) (string, error) {
	file := filepath.Join(dir, name+".pw")
	if err := os.WriteFile(file, []byte(password+"\n"), 0o600); err != nil {
		return "", err
	}
	text := fmt.Sprintf("  - name: %s\n    engine: postgres\n    dsn: %s\n    password: {file: %s}\n", name, dsn, file)
	if policy != "" {
		text += "    policy:\n" + policy
	}
	return text, nil
}
