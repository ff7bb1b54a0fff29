-- +goose Up
-- The cache of what data sources hold; it can be made again from the hosts. An
-- object counts if its generation is its schema's: a refresh adds a generation and
-- then switches the schemas over, all at once.

CREATE TABLE catalogs (
  agent     TEXT NOT NULL REFERENCES agents (id),
  source    TEXT NOT NULL,
  refreshed BIGINT NOT NULL,
  -- 1: it was too large, and some of it is missing.
  truncated BIGINT NOT NULL,
  PRIMARY KEY (agent, source)
);

CREATE TABLE catalog_schemas (
  agent       TEXT NOT NULL REFERENCES agents (id),
  source      TEXT NOT NULL,
  name        TEXT COLLATE "C" NOT NULL,
  generation  TEXT NOT NULL,
  fingerprint BYTEA NOT NULL,
  comment     TEXT NOT NULL,
  -- What it takes of the bounds.
  column_count BIGINT NOT NULL,
  byte_count   BIGINT NOT NULL,
  PRIMARY KEY (agent, source, name)
);

CREATE TABLE catalog_objects (
  agent      TEXT NOT NULL REFERENCES agents (id),
  source     TEXT NOT NULL,
  schema     TEXT COLLATE "C" NOT NULL,
  generation TEXT NOT NULL,
  -- 0: postern.v1.CatalogTable, 1: CatalogFunction, 2: CatalogType, 3: CatalogSequence, which is what data is.
  kind       BIGINT NOT NULL,
  name       TEXT COLLATE "C" NOT NULL,
  -- Counts functions of one name.
  position   BIGINT NOT NULL,
  data       BYTEA NOT NULL,
  PRIMARY KEY (agent, source, schema, generation, kind, name, position)
);
