-- +goose Up
-- The keys that seal the contents of files in the object store: each organization has its own, in generations.

CREATE TABLE file_keys (
  organization TEXT NOT NULL REFERENCES organizations (id),
  -- From 1; the highest one seals.
  generation   INTEGER NOT NULL,
  -- Sealed with a master key; see package filekey.
  sealed       BLOB NOT NULL,
  master       TEXT NOT NULL,
  made         INTEGER NOT NULL,
  PRIMARY KEY (organization, generation)
) STRICT;

-- What was stored before this is of generation 1.
ALTER TABLE blob_objects ADD COLUMN generation INTEGER NOT NULL DEFAULT 1;
CREATE INDEX blob_objects_generation ON blob_objects (organization, generation);
