-- +goose Up
-- The cache of what data sources hold; it can be made again from the hosts. An
-- object counts if its generation is its schema's: a refresh adds a generation and
-- then switches the schemas over, all at once.

CREATE TABLE catalogs (
  agent     TEXT NOT NULL REFERENCES agents (id),
  source    TEXT NOT NULL,
  refreshed INTEGER NOT NULL,
  -- 1: it was too large, and some of it is missing.
  truncated INTEGER NOT NULL,
  PRIMARY KEY (agent, source)
) STRICT, WITHOUT ROWID;

CREATE TABLE catalog_schemas (
  agent       TEXT NOT NULL REFERENCES agents (id),
  source      TEXT NOT NULL,
  name        TEXT NOT NULL,
  generation  TEXT NOT NULL,
  fingerprint BLOB NOT NULL,
  comment     TEXT NOT NULL,
  -- What it takes of the bounds.
  column_count INTEGER NOT NULL,
  byte_count   INTEGER NOT NULL,
  PRIMARY KEY (agent, source, name)
) STRICT, WITHOUT ROWID;

CREATE TABLE catalog_objects (
  agent      TEXT NOT NULL REFERENCES agents (id),
  source     TEXT NOT NULL,
  schema     TEXT NOT NULL,
  generation TEXT NOT NULL,
  -- 0: postern.v1.CatalogTable, 1: CatalogFunction, 2: CatalogType, 3: CatalogSequence, which is what data is.
  kind       INTEGER NOT NULL,
  name       TEXT NOT NULL,
  -- Counts functions of one name.
  position   INTEGER NOT NULL,
  data       BLOB NOT NULL,
  PRIMARY KEY (agent, source, schema, generation, kind, name, position)
) STRICT, WITHOUT ROWID;
