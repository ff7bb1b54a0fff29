-- +goose Up
-- Which agent has which kernel, and what Jupyter's clients call sessions: a notebook's
-- path and its kernel. The kernels themselves are on their hosts.

CREATE TABLE kernels (
  id           TEXT PRIMARY KEY,
  organization TEXT NOT NULL REFERENCES organizations (id),
  agent        TEXT NOT NULL REFERENCES agents (id),
  -- Whose it is.
  token        TEXT NOT NULL,
  token_name   TEXT NOT NULL,
  spec         TEXT NOT NULL,
  language     TEXT NOT NULL,
  -- Milliseconds.
  started      INTEGER NOT NULL
) STRICT;
CREATE INDEX kernels_organization ON kernels (organization, agent, id);

CREATE TABLE kernel_sessions (
  id           TEXT PRIMARY KEY,
  organization TEXT NOT NULL REFERENCES organizations (id),
  agent        TEXT NOT NULL REFERENCES agents (id),
  token        TEXT NOT NULL,
  kernel       TEXT NOT NULL REFERENCES kernels (id) ON DELETE CASCADE,
  path         TEXT NOT NULL,
  name         TEXT NOT NULL,
  kind         TEXT NOT NULL,
  created      INTEGER NOT NULL
) STRICT;
CREATE INDEX kernel_sessions_owner ON kernel_sessions (organization, agent, token, path);
CREATE INDEX kernel_sessions_kernel ON kernel_sessions (kernel);
