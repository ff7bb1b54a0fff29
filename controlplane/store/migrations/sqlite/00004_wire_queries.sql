-- +goose Up
-- Statements of PostgreSQL clients, apart from the others: they come by the thousand a
-- second and must neither cost much nor push the others out of the history. Ids sort by
-- time, so the key is the order of the list.

CREATE TABLE wire_queries (
  organization TEXT NOT NULL REFERENCES organizations (id),
  id           TEXT NOT NULL,
  token        TEXT NOT NULL,
  token_name   TEXT NOT NULL,
  agent        TEXT NOT NULL,
  source       TEXT NOT NULL,
  sql_text     TEXT NOT NULL,
  state        TEXT NOT NULL,
  -- Microseconds, both.
  started      INTEGER NOT NULL,
  duration     INTEGER NOT NULL DEFAULT 0,
  row_count    INTEGER NOT NULL DEFAULT 0,
  byte_count   INTEGER NOT NULL DEFAULT 0,
  -- postern.v1.ErrorDetail
  error        BLOB,
  -- The control plane process that runs it.
  replica      TEXT NOT NULL,
  PRIMARY KEY (organization, id)
) STRICT, WITHOUT ROWID;
CREATE INDEX wire_queries_running ON wire_queries (replica, organization, id) WHERE state = 'running';

-- Sessions of revoked tokens are cut on every replica.
CREATE INDEX tokens_revoked ON tokens (revoked) WHERE revoked IS NOT NULL;
