-- +goose Up
-- Times are Unix milliseconds, UTC. Ids and names are text. Hashes are SHA-256.

CREATE TABLE organizations (
  id       TEXT PRIMARY KEY,
  name     TEXT NOT NULL UNIQUE,
  created  BIGINT NOT NULL,
  disabled BIGINT
);

CREATE TABLE tokens (
  id           TEXT PRIMARY KEY,
  organization TEXT NOT NULL REFERENCES organizations (id),
  name         TEXT NOT NULL,
  role         TEXT NOT NULL CHECK (role IN ('admin', 'operator', 'analyst', 'viewer')),
  hash         BYTEA NOT NULL CHECK (length(hash) = 32),
  created      BIGINT NOT NULL,
  expires      BIGINT,
  revoked      BIGINT,
  last_used    BIGINT
);
CREATE UNIQUE INDEX tokens_name ON tokens (organization, name) WHERE revoked IS NULL;
CREATE INDEX tokens_organization ON tokens (organization, created);

CREATE TABLE registration_keys (
  id           TEXT PRIMARY KEY,
  organization TEXT NOT NULL REFERENCES organizations (id),
  hash         BYTEA NOT NULL CHECK (length(hash) = 32),
  labels       TEXT NOT NULL,
  max_uses     BIGINT NOT NULL,
  uses         BIGINT NOT NULL DEFAULT 0,
  created      BIGINT NOT NULL,
  expires      BIGINT NOT NULL,
  revoked      BIGINT,
  created_by   TEXT NOT NULL,
  CHECK (uses <= max_uses)
);
CREATE INDEX registration_keys_organization ON registration_keys (organization, created);

CREATE TABLE agents (
  id             TEXT PRIMARY KEY,
  organization   TEXT NOT NULL REFERENCES organizations (id),
  name           TEXT NOT NULL,
  labels         TEXT NOT NULL,
  software       TEXT NOT NULL DEFAULT '',
  hostname       TEXT NOT NULL DEFAULT '',
  os             TEXT NOT NULL DEFAULT '',
  arch           TEXT NOT NULL DEFAULT '',
  kernel         TEXT NOT NULL DEFAULT '',
  remote_address TEXT NOT NULL DEFAULT '',
  registered     BIGINT NOT NULL,
  last_seen      BIGINT,
  revoked        BIGINT,
  key_id         TEXT NOT NULL REFERENCES registration_keys (id),
  -- postern.v1.UpdateInventoryRequest
  inventory      BYTEA
);
CREATE UNIQUE INDEX agents_name ON agents (organization, name) WHERE revoked IS NULL;
CREATE INDEX agents_organization ON agents (organization, registered);
CREATE INDEX agents_revoked ON agents (revoked) WHERE revoked IS NOT NULL;

CREATE TABLE agent_certificates (
  serial     TEXT PRIMARY KEY,
  agent      TEXT NOT NULL REFERENCES agents (id),
  -- Counts an agent's certificates from 1.
  generation BIGINT NOT NULL,
  state      TEXT NOT NULL CHECK (state IN ('pending', 'active', 'retired')),
  not_after  BIGINT NOT NULL,
  created    BIGINT NOT NULL,
  retired    BIGINT,
  -- SHA-256 of the SubjectPublicKeyInfo.
  public_key BYTEA NOT NULL CHECK (length(public_key) = 32),
  UNIQUE (agent, generation)
);
CREATE UNIQUE INDEX agent_certificates_active ON agent_certificates (agent) WHERE state = 'active';

CREATE TABLE authorities (
  -- SHA-256 of the DER, lower-case hex.
  fingerprint TEXT PRIMARY KEY,
  certificate BYTEA NOT NULL,
  -- PKCS #8, sealed with the master key; see package pki.
  sealed_key  BYTEA NOT NULL,
  state       TEXT NOT NULL CHECK (state IN ('active', 'trusted', 'retired')),
  created     BIGINT NOT NULL
);
CREATE UNIQUE INDEX authorities_active ON authorities (state) WHERE state = 'active';

CREATE TABLE link_events (
  agent    TEXT NOT NULL REFERENCES agents (id),
  sequence BIGINT NOT NULL,
  time     BIGINT NOT NULL,
  state    TEXT NOT NULL,
  cause    TEXT NOT NULL,
  PRIMARY KEY (agent, sequence)
);

CREATE TABLE queries (
  id           TEXT PRIMARY KEY,
  organization TEXT NOT NULL REFERENCES organizations (id),
  token        TEXT NOT NULL,
  token_name   TEXT NOT NULL,
  agent        TEXT NOT NULL,
  source       TEXT NOT NULL,
  sql_text     TEXT NOT NULL,
  state        TEXT NOT NULL,
  started      BIGINT NOT NULL,
  -- Microseconds.
  duration     BIGINT NOT NULL DEFAULT 0,
  row_count    BIGINT NOT NULL DEFAULT 0,
  byte_count   BIGINT NOT NULL DEFAULT 0,
  -- postern.v1.ErrorDetail
  error        BYTEA,
  -- The control plane process that runs it.
  replica      TEXT NOT NULL
);
CREATE INDEX queries_started ON queries (organization, started, id);
CREATE INDEX queries_token ON queries (organization, token, started, id);
CREATE INDEX queries_running ON queries (organization, started, id) WHERE state = 'running';
CREATE INDEX queries_age ON queries (started);

CREATE TABLE audit (
  organization TEXT NOT NULL,
  sequence     BIGINT NOT NULL,
  -- One line of canonical JSON; see package auditchain.
  line         BYTEA NOT NULL,
  PRIMARY KEY (organization, sequence)
);

CREATE TABLE audit_heads (
  organization TEXT PRIMARY KEY,
  sequence     BIGINT NOT NULL,
  hash         BYTEA NOT NULL CHECK (length(hash) = 32)
);

CREATE TABLE agent_audit_heads (
  agent    TEXT PRIMARY KEY REFERENCES agents (id),
  sequence BIGINT NOT NULL,
  hash     BYTEA NOT NULL CHECK (length(hash) = 32)
);
