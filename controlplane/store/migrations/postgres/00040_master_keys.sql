-- +goose Up
-- Which master key sealed what. Master keys themselves are not in the database; '1' is the one that an
-- installation was made with, and what was sealed before this.

CREATE TABLE master_keys (
  id    TEXT PRIMARY KEY,
  state TEXT NOT NULL CHECK (state IN ('announced', 'active', 'old', 'closed', 'retired')),
  made  BIGINT NOT NULL,
  -- When it came into its state.
  since BIGINT NOT NULL
);
CREATE UNIQUE INDEX master_keys_active ON master_keys (state) WHERE state = 'active';

ALTER TABLE authorities ADD COLUMN master TEXT NOT NULL DEFAULT '1';
ALTER TABLE secrets ADD COLUMN master TEXT NOT NULL DEFAULT '1';
ALTER TABLE kept_rows ADD COLUMN master TEXT NOT NULL DEFAULT '1';
CREATE INDEX secrets_master ON secrets (master);
CREATE INDEX kept_rows_master ON kept_rows (master);

-- The master keys that a replica has on its disk, with spaces between them, and the one with which it seals.
ALTER TABLE replicas ADD COLUMN master_keys TEXT NOT NULL DEFAULT '';
ALTER TABLE replicas ADD COLUMN master_active TEXT NOT NULL DEFAULT '';
