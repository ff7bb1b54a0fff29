package vault

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/postern-dev/postern/agentd/secret"
)

// Credential is a database user of Vault's database engine.
type Credential struct {
	User     string
	Password secret.Secret
	// Expiring is closed when the user will end soon: take another for what is
	// new, and end what is idle.
	Expiring <-chan struct{}
	// Release says that the user is not needed any more. Call it once.
	Release func()
}

// lease is one dynamic user.
type lease struct {
	c     *Client
	login *login
	role  string // mount/creds/name
	id    string
	user  string
	pass  secret.Secret

	expiring chan struct{} // closed under Client.mu, once

	// Under Client.mu.
	users   int
	retired bool
	unused  time.Time // since when users is 0
	gone    bool      // revoked, or about to be
}

// Dynamic returns a user of the role at path (MOUNT/creds/ROLE): one that others
// use already if it lasts, else a new one. The error is one line.
func (c *Client) Dynamic(ctx context.Context, path string) (Credential, error) {
	if l := c.current(path); l != nil {
		return l.credential(), nil
	}
	ctx, done := context.WithTimeout(ctx, requestTimeout)
	defer done()
	var made *lease
	err := c.ask(ctx, "make a database user", path, func(in *login) error {
		answer, err := in.client.Logical().ReadWithContext(ctx, path)
		if err != nil {
			return err
		}
		if answer == nil {
			return &api.ResponseError{StatusCode: 404}
		}
		user, _ := answer.Data["username"].(string)
		password, _ := answer.Data["password"].(string)
		if user == "" || password == "" {
			return errors.New("the answer has no username and password: is it the path of a database role, such as database/creds/ROLE?")
		}
		made = &lease{c: c, login: in, role: path, id: answer.LeaseID, user: user, pass: secret.New(password), expiring: make(chan struct{}), users: 1}
		life := time.Duration(answer.LeaseDuration) * time.Second
		c.mu.Lock()
		refused := c.closed || len(c.leases) >= maxLeases
		if !refused {
			c.leases[made] = struct{}{}
			c.wg.Go(func() { made.keep(life, answer.Renewable) })
		}
		c.mu.Unlock()
		if refused {
			err := made.revoke(ctx)
			return errors.Join(fmt.Errorf("more than %d leases are held, or the agent is going away", maxLeases), err)
		}
		return nil
	})
	if err != nil {
		return Credential{}, err
	}
	return made.credential(), nil
}

// current is a lease of the role that lasts, with one user more; nil if there is none.
func (c *Client) current(role string) *lease {
	c.mu.Lock()
	defer c.mu.Unlock()
	for l := range c.leases {
		if l.role == role && !l.retired && !l.gone && !c.closed {
			l.users++
			return l
		}
	}
	return nil
}

func (l *lease) credential() Credential {
	return Credential{User: l.user, Password: l.pass, Expiring: l.expiring, Release: l.release}
}

func (l *lease) release() {
	l.c.mu.Lock()
	defer l.c.mu.Unlock()
	l.users--
	l.unused = time.Now()
}

// tick is how often a lease looks whether anybody needs it, at most.
const tick = 5 * time.Second

// keep renews the lease while it is used, retires it when that goes no longer,
// and revokes it when nobody needs it any more.
func (l *lease) keep(life time.Duration, renewable bool) {
	first := life
	renewAt, ends := time.Now().Add(life*2/3), time.Now().Add(life)
	pause := min(tick, max(l.c.cfg.Grace/4, 50*time.Millisecond), max(life/10, 50*time.Millisecond))
	for l.c.sleep(pause, nil) {
		now := time.Now()
		if l.login.isOver() && l.c.cfg.Token == nil {
			l.retire() // what a token made ends with it
		}
		switch l.state(now) {
		case unneeded:
			ctx, done := context.WithTimeout(l.c.ctx, requestTimeout)
			if err := l.revoke(ctx); err != nil {
				l.c.log.Warn("vault lease not revoked: it ends by itself", "err", err)
			}
			done()
			return
		case ending:
			if life > 0 && now.After(ends) {
				l.forget() // Vault has ended it
				return
			}
			continue
		}
		if life <= 0 || now.Before(renewAt) {
			continue
		}
		if !renewable {
			l.retire()
			continue
		}
		ctx, done := context.WithTimeout(l.c.ctx, requestTimeout)
		answer, err := l.renew(ctx, first)
		done()
		switch {
		case err == nil && answer != nil && time.Duration(answer.LeaseDuration)*time.Second >= first/3:
			life, renewable = time.Duration(answer.LeaseDuration)*time.Second, answer.Renewable
			renewAt, ends = time.Now().Add(life*2/3), time.Now().Add(life)
		case err == nil:
			// Its longest life is near.
			if answer != nil {
				ends = time.Now().Add(time.Duration(answer.LeaseDuration) * time.Second)
			}
			l.retire()
		default:
			var refused *api.ResponseError
			if errors.As(err, &refused) || time.Until(ends) < first/6 {
				l.c.log.Warn("vault lease not renewed", "err", l.c.failure("renew the lease", "sys/leases/renew", err))
				l.retire()
			}
		}
	}
}

// state is what a lease is good for.
type state uint8

const (
	inUse    state = iota
	ending         // used, but not for anything new
	unneeded       // by nobody
)

// state says what the lease is good for. An unneeded one is never handed out again.
func (l *lease) state(now time.Time) state {
	l.c.mu.Lock()
	defer l.c.mu.Unlock()
	switch {
	case l.users == 0 && (l.retired || now.Sub(l.unused) >= l.c.cfg.Grace):
		l.gone = true
		return unneeded
	case l.retired:
		return ending
	}
	return inUse
}

func (l *lease) retire() {
	l.c.mu.Lock()
	defer l.c.mu.Unlock()
	if !l.retired {
		l.retired = true
		close(l.expiring)
	}
}

func (l *lease) forget() {
	l.c.mu.Lock()
	defer l.c.mu.Unlock()
	delete(l.c.leases, l)
}

func (l *lease) revoke(ctx context.Context) error {
	l.forget()
	if l.id == "" {
		return nil
	}
	if err := l.via(ctx).Sys().RevokeWithContext(ctx, l.id); err != nil {
		return l.c.failure("revoke a lease", "sys/leases/revoke", err)
	}
	return nil
}

func (l *lease) renew(ctx context.Context, life time.Duration) (*api.Secret, error) {
	return l.via(ctx).Sys().RenewWithContext(ctx, l.id, int(life/time.Second))
}

// via is the login to use for the lease: its own, or where the token is
// somebody else's and may have been replaced, the newest.
func (l *lease) via(ctx context.Context) *api.Client {
	if l.c.cfg.Token != nil {
		if newest, err := l.c.session(ctx); err == nil {
			return newest.client
		}
	}
	return l.login.client
}
