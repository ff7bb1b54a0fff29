// Package vault reads the credentials of data sources from HashiCorp Vault:
// passwords from the KV v2 engine ([Client.KV], read afresh each time, so a
// rotated one needs no restart), and users that Vault's database engine makes
// for us ([Client.Dynamic]).
//
// A dynamic user is a lease. It is shared by the SQL sessions of a source,
// renewed at two thirds of its life while any of them needs it, replaced when
// it can't be renewed any more, and revoked when the last of them has ended
// and nobody wanted one for a while, and at the end of agentd. After a crash
// of agentd it ends by itself, at the end of its time to live.
//
// agentd proves itself to Vault by a token from a file, a variable or a systemd
// credential (read afresh at each login, so Vault Agent may rotate it), or by
// AppRole. Neither goes through a proxy, and VAULT_* variables have no effect.
//
// A Client is safe for concurrent use. No error text holds a secret.
package vault
