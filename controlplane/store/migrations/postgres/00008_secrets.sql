-- +goose Up
-- Secrets for kernels. Values are sealed with a key that is not in the database.

CREATE TABLE secrets (
  id           TEXT PRIMARY KEY,
  organization TEXT NOT NULL REFERENCES organizations (id),
  -- own: a token's, whose id is in owner; workspace: owner is its name; organization.
  scope        TEXT NOT NULL CHECK (scope IN ('own', 'workspace', 'organization')),
  owner        TEXT NOT NULL,
  owner_name   TEXT NOT NULL,
  name         TEXT NOT NULL,
  sealed       BYTEA NOT NULL,
  -- Milliseconds.
  created      BIGINT NOT NULL,
  changed      BIGINT NOT NULL,
  changed_by   TEXT NOT NULL,
  UNIQUE (organization, scope, owner, name)
);

-- Who has a secret: a kernel, or all kernels of a token. Without a secret it is one that
-- hosts read themselves.
CREATE TABLE secret_grants (
  organization TEXT NOT NULL REFERENCES organizations (id),
  secret       TEXT REFERENCES secrets (id) ON DELETE CASCADE,
  name         TEXT NOT NULL,
  kernel       TEXT REFERENCES kernels (id) ON DELETE CASCADE,
  token        TEXT NOT NULL,
  token_name   TEXT NOT NULL,
  created      BIGINT NOT NULL
);
CREATE UNIQUE INDEX secret_grants_one ON secret_grants (organization, name, coalesce(secret, ''), coalesce(kernel, ''), token);
CREATE INDEX secret_grants_secret ON secret_grants (secret);
CREATE INDEX secret_grants_kernel ON secret_grants (kernel);

-- The workspaces that a kernel was started with; '' says that it was given secrets once.
CREATE TABLE kernel_workspaces (
  kernel    TEXT NOT NULL REFERENCES kernels (id) ON DELETE CASCADE,
  workspace TEXT NOT NULL,
  PRIMARY KEY (kernel, workspace)
);
CREATE INDEX kernel_workspaces_name ON kernel_workspaces (workspace);
