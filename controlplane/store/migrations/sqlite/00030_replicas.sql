-- +goose Up
-- Control planes that share this database, and which of them has the tunnel of which agent.

CREATE TABLE replicas (
  -- What the file DATA/replica says.
  name     TEXT PRIMARY KEY,
  -- Where the others reach it, https://HOST:PORT.
  url      TEXT NOT NULL,
  -- Counts up while it lives.
  beat     INTEGER NOT NULL,
  -- 1 while it stops.
  draining INTEGER NOT NULL DEFAULT 0,
  started  INTEGER NOT NULL,
  software TEXT NOT NULL DEFAULT ''
) STRICT;

CREATE TABLE links (
  agent      TEXT PRIMARY KEY REFERENCES agents (id),
  -- Counts the tunnels of the agent from 1: the newest one is right.
  generation INTEGER NOT NULL,
  -- replicas.name; empty: it has no tunnel.
  replica    TEXT NOT NULL,
  -- The tunnel's id, in hex.
  tunnel     TEXT NOT NULL,
  attached   INTEGER NOT NULL
) STRICT;
CREATE INDEX links_replica ON links (replica);
CREATE INDEX links_tunnel ON links (tunnel);
