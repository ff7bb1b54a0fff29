package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/postern-dev/postern/client"
	"github.com/postern-dev/postern/proto"
	"github.com/postern-dev/postern/proto/clidoc"
)

// app is one run of the command: its streams and the global flags.
type app struct {
	stdin, stdout, stderr *os.File
	getenv                func(string) string

	urlFlag, tokenFile, caFile, output string

	// started is set when a command's own code begins: an error before that is
	// one of usage.
	started bool
	// command is the one that runs, for the advice of a usage error.
	command string
}

func (a *app) run(ctx context.Context, args []string) int {
	root := a.root()
	root.SetArgs(commentLast(args))
	root.SetIn(a.stdin)
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	cmd, err := root.ExecuteContextC(ctx)
	if cmd != nil {
		a.command = cmd.CommandPath()
	}
	if err != nil && !a.started {
		err = &usageError{err}
	}
	return a.report(ctx, err)
}

// commentLast moves a query that begins with a comment ("-- …") behind "--", where
// it is not taken for a flag.
func commentLast(args []string) []string {
	for i, arg := range args {
		if arg == "--" {
			break
		}
		if len(arg) > 2 && arg[:2] == "--" && unicode.IsSpace(rune(arg[2])) && i > 0 && !strings.HasPrefix(args[i-1], "-") {
			return append(slices.Delete(slices.Clone(args), i, i+1), "--", arg)
		}
	}
	return args
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "postern",
		Short: "Work next to the data, on hosts behind a firewall",
		Long: "postern works with a Postern control plane and the hosts that have joined it.\n\n" +
			"Log in once with `postern login`, or set POSTERN_URL and POSTERN_TOKEN.\n" +
			"Exit codes: 0 done, 1 failed, 2 usage, 3 denied by policy or role, 4 not found, 5 agent offline.",
		SilenceUsage:      true,
		SilenceErrors:     true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
		PersistentPreRunE: func(*cobra.Command, []string) error {
			if a.output != "table" && a.output != "json" {
				return fmt.Errorf("unknown output %q: choose table or json", a.output)
			}
			a.started = true
			return nil
		},
	}
	flags := root.PersistentFlags()
	flags.StringVar(&a.urlFlag, "url", "", "URL of the control plane (default: POSTERN_URL, then the stored login)")
	flags.StringVar(&a.tokenFile, "token-file", "", "file with the API token, - for stdin (default: POSTERN_TOKEN, then the stored login)")
	flags.StringVar(&a.caFile, "ca-file", "", "PEM file of CA certificates to trust besides the system's")
	flags.StringVarP(&a.output, "output", "o", "table", "form of listings: table or json")
	root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json"}, cobra.ShellCompDirectiveNoFileComp)) //nolint:errcheck // fails on unknown flags alone
	root.AddCommand(
		a.loginCommand(), a.statusCommand(), a.tokenCommand(), a.keyCommand(), a.agentCommand(), a.sourceCommand(),
		a.sqlCommand(), a.queryCommand(), a.sessionCommand(), a.kernelCommand(), a.secretCommand(), a.notebookCommand(), a.fileCommand(), a.workspaceCommand(), a.auditCommand(), a.caCommand(), a.masterKeyCommand(), a.orgCommand(), a.versionCommand(), a.completionCommand(), clidoc.ManCommand(root, "1", proto.Software()),
	)
	return root
}

// group is a command that only holds others.
func group(use, short string, commands ...*cobra.Command) *cobra.Command {
	names := make([]string, len(commands))
	for i, c := range commands {
		names[i] = c.Name()
	}
	g := &cobra.Command{
		Use: use, Short: short, Args: cobra.ArbitraryArgs,
		RunE: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usagef("unknown command %q of postern %s: choose one of %s", args[0], use, strings.Join(names, ", "))
			}
			return usagef("postern %s needs one of %s", use, strings.Join(names, ", "))
		},
	}
	g.AddCommand(commands...)
	return g
}

func isTerminal(f *os.File) bool { return term.IsTerminal(int(f.Fd())) }

// info prints a line for people on stderr.
func (a *app) info(format string, args ...any) {
	fmt.Fprintf(a.stderr, format+"\n", args...) //nolint:errcheck // nobody is left to tell
}

// stored is the login of `postern login`; zero if there is none.
func (a *app) stored() (client.Credentials, error) {
	path, err := client.CredentialsPath()
	if err != nil { // no home: then there is no login either
		return client.Credentials{}, nil //nolint:nilerr // see above
	}
	c, err := client.LoadCredentials(path)
	if errors.Is(err, client.ErrNoLogin) {
		return client.Credentials{}, nil
	}
	return c, err
}

// client connects as the flags, the environment and the stored login say, in this
// order.
func (a *app) client() (*client.Client, error) {
	address := firstOf(a.urlFlag, a.getenv("POSTERN_URL"))
	var token client.Secret
	switch {
	case a.tokenFile != "":
		var err error
		if token, err = a.readToken(a.tokenFile); err != nil {
			return nil, err
		}
	case a.getenv("POSTERN_TOKEN") != "":
		var err error
		if token, err = checkToken(a.getenv("POSTERN_TOKEN"), "POSTERN_TOKEN"); err != nil {
			return nil, err
		}
	}
	caFile := a.caFile
	if address == "" || token.IsZero() {
		login, err := a.stored()
		if err != nil {
			return nil, err
		}
		if address == "" {
			address = login.URL
		}
		// A token is never sent to another place than it was stored for.
		if same(address, login.URL) {
			if token.IsZero() {
				token = login.Token
			}
			caFile = firstOf(caFile, login.CAFile)
		}
	}
	base, err := client.ParseURL(address)
	if err != nil {
		return nil, &usageError{err}
	}
	if token.IsZero() {
		return nil, proto.Errorf(proto.CodeUnauthenticated, "no API token for %s: run `postern login`, or set --token-file or POSTERN_TOKEN", base)
	}
	return a.connect(address, token, caFile)
}

func (a *app) connect(address string, token client.Secret, caFile string) (*client.Client, error) {
	return client.New(client.Config{
		URL: address, Token: client.StaticToken(token), CAFile: caFile, UserAgent: "postern/" + proto.Software(),
	})
}

// with runs f with a client.
func (a *app) with(f func(*client.Client) error) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	defer c.Close()
	return f(c)
}

func firstOf(values ...string) string {
	for _, v := range values {
		if v != "" {
			return v
		}
	}
	return ""
}

func same(a, b string) bool {
	ua, erra := client.ParseURL(a)
	ub, errb := client.ParseURL(b)
	return erra == nil && errb == nil && ua.String() == ub.String()
}

// maxToken bounds a token's text, in bytes.
const maxToken = 4096

// readToken reads a token from a file, or stdin for "-".
func (a *app) readToken(name string) (client.Secret, error) {
	var r io.Reader = a.stdin
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return client.Secret{}, fmt.Errorf("read the token: %w", err)
		}
		defer f.Close() //nolint:errcheck // it was only read
		r = f
	}
	text, err := io.ReadAll(io.LimitReader(r, maxToken+1))
	if err != nil {
		return client.Secret{}, fmt.Errorf("read the token: %w", err)
	}
	where := name
	if name == "-" {
		where = "stdin"
	}
	return checkToken(string(text), where)
}

func checkToken(text, where string) (client.Secret, error) {
	text = strings.TrimSpace(text)
	switch {
	case text == "":
		return client.Secret{}, fmt.Errorf("read the token: %s is empty", where)
	case len(text) > maxToken || strings.ContainsFunc(text, func(r rune) bool { return r <= ' ' || r >= 0x7f }):
		return client.Secret{}, fmt.Errorf("read the token: %s holds something else than one API token", where)
	}
	return client.NewSecret(text), nil
}

// absolute is a path that still means the same file from another directory.
func absolute(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	return filepath.Abs(path)
}
