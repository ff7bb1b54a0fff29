-- +goose Up
-- The first and last rows of queries; they go with their query.

CREATE TABLE kept_rows (
  query        TEXT PRIMARY KEY REFERENCES queries (id) ON DELETE CASCADE,
  organization TEXT NOT NULL,
  created      BIGINT NOT NULL,
  size         BIGINT NOT NULL,
  -- postern.v1.KeptRows, sealed with the master key; see package query.
  sealed       BYTEA NOT NULL
);
CREATE INDEX kept_rows_age ON kept_rows (organization, created, query, size);
