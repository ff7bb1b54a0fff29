package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/url"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/postern-dev/postern/client"
	posternv1 "github.com/postern-dev/postern/proto/postern/v1"
)

func (a *app) loginCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "login",
		Short: "Store the URL and the token of a control plane",
		Long: "Checks a URL and an API token and stores them in $XDG_CONFIG_HOME/postern/credentials.json, mode 0600.\n" +
			"On a terminal it asks for what is missing; otherwise the token comes from --token-file or stdin.",
		Example: "  postern login --url https://cp.example.com --token-file token.txt",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.login(cmd.Context()) },
	}
}

func (a *app) login(ctx context.Context) error {
	address := firstOf(a.urlFlag, a.getenv("POSTERN_URL"))
	asks := isTerminal(a.stdin)
	if address == "" {
		if !asks {
			return usagef("no URL of a control plane: set --url or POSTERN_URL")
		}
		var err error
		if address, err = a.ask("URL of the control plane: "); err != nil {
			return err
		}
	}
	base, err := client.ParseURL(address)
	if err != nil {
		return &usageError{err}
	}
	if base.Scheme == "http" && !loopback(base) {
		a.info("postern: warning: %s is not encrypted: whoever sees the traffic can take the token", base)
	}
	token, err := a.loginToken(asks)
	if err != nil {
		return err
	}
	caFile, err := absolute(a.caFile)
	if err != nil {
		return err
	}
	c, err := a.connect(base.String(), token, caFile)
	if err != nil {
		return err
	}
	defer c.Close()
	me, err := c.Identity.WhoAmI(ctx, connect.NewRequest(&posternv1.WhoAmIRequest{}))
	if err != nil {
		return err
	}
	path, err := client.CredentialsPath()
	if err != nil {
		return err
	}
	if err := client.SaveCredentials(path, client.Credentials{URL: base.String(), Token: token, CAFile: caFile}); err != nil {
		return err
	}
	a.info("logged in to %s as %s, %s of organization %s; stored in %s", base, safe(me.Msg.TokenName), safe(me.Msg.Role), safe(me.Msg.Organization), path)
	return nil
}

func (a *app) loginToken(asks bool) (client.Secret, error) {
	switch {
	case a.tokenFile != "":
		return a.readToken(a.tokenFile)
	case !asks:
		return a.readToken("-")
	}
	fmt.Fprint(a.stderr, "API token (not shown): ") //nolint:errcheck // nobody is left to tell
	text, err := term.ReadPassword(int(a.stdin.Fd()))
	fmt.Fprintln(a.stderr) //nolint:errcheck // nobody is left to tell
	if err != nil {
		return client.Secret{}, fmt.Errorf("read the token: %w", err)
	}
	return checkToken(string(text), "the input")
}

// ask reads one line from the terminal, a byte at a time: what follows is for the
// next question.
func (a *app) ask(question string) (string, error) {
	fmt.Fprint(a.stderr, question) //nolint:errcheck // nobody is left to tell
	var line []byte
	var b [1]byte
	for len(line) < 4096 {
		if _, err := a.stdin.Read(b[:]); err != nil {
			return "", fmt.Errorf("read the answer: %w", err)
		}
		if b[0] == '\n' {
			break
		}
		line = append(line, b[0])
	}
	return strings.TrimSpace(string(line)), nil
}

func loopback(u *url.URL) bool {
	ip := net.ParseIP(u.Hostname())
	return u.Hostname() == "localhost" || ip.IsLoopback()
}

func (a *app) statusCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "status",
		Short:   "Show which control plane, who you are there, and the agents",
		Example: "  postern status",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.with(func(c *client.Client) error { return a.status(cmd.Context(), c) })
		},
	}
}

func (a *app) status(ctx context.Context, c *client.Client) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	resp, err := c.Identity.WhoAmI(ctx, connect.NewRequest(&posternv1.WhoAmIRequest{}))
	if err != nil {
		return err
	}
	me := resp.Msg
	agents, err := c.Agents.ListAgents(ctx, connect.NewRequest(&posternv1.ListAgentsRequest{}))
	if err != nil {
		return err
	}
	total, online := 0, 0
	for _, agent := range agents.Msg.Agents {
		if agent.Revoked == nil {
			total++
			if agent.Online {
				online++
			}
		}
	}
	if a.output == "json" {
		raw, err := asJSON(me)
		if err != nil {
			return err
		}
		fields := map[string]any{}
		if err := json.Unmarshal(raw, &fields); err != nil {
			return err
		}
		fields["url"], fields["agents"], fields["agentsOnline"] = c.URL(), total, online
		return a.printJSON(fields)
	}
	return a.printFields(
		[2]string{"control plane", c.URL()},
		[2]string{"version", me.ServerVersion},
		[2]string{"organization", me.Organization},
		[2]string{"token", fmt.Sprintf("%s (%s)", me.TokenName, me.TokenId)},
		[2]string{"role", me.Role},
		[2]string{"expires", timeOr(me.Expires, "never")},
		[2]string{"agents", fmt.Sprintf("%d online of %d", online, total)},
	)
}
