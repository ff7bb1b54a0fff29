-- +goose Up
-- Control planes that share this database, and which of them has the tunnel of which agent.

CREATE TABLE replicas (
  -- What the file DATA/replica says.
  name     TEXT PRIMARY KEY,
  -- Where the others reach it, https://HOST:PORT.
  url      TEXT NOT NULL,
  -- Counts up while it lives.
  beat     BIGINT NOT NULL,
  -- 1 while it stops.
  draining BIGINT NOT NULL DEFAULT 0,
  started  BIGINT NOT NULL,
  software TEXT NOT NULL DEFAULT ''
);

CREATE TABLE links (
  agent      TEXT PRIMARY KEY REFERENCES agents (id),
  -- Counts the tunnels of the agent from 1: the newest one is right.
  generation BIGINT NOT NULL,
  -- replicas.name; empty: it has no tunnel.
  replica    TEXT NOT NULL,
  -- The tunnel's id, in hex.
  tunnel     TEXT NOT NULL,
  attached   BIGINT NOT NULL
);
CREATE INDEX links_replica ON links (replica);
CREATE INDEX links_tunnel ON links (tunnel);
