-- +goose Up
-- The kernel that asked for a statement; '' is none. And up to where each agent has
-- reported its kernels' statements: an entry of its own log.

ALTER TABLE queries ADD COLUMN kernel TEXT NOT NULL DEFAULT '';
ALTER TABLE wire_queries ADD COLUMN kernel TEXT NOT NULL DEFAULT '';

CREATE TABLE agent_reports (
  agent    TEXT PRIMARY KEY REFERENCES agents (id),
  sequence INTEGER NOT NULL,
  hash     BLOB NOT NULL
) STRICT;
