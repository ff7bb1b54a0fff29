-- +goose Up
-- Workspaces: named file trees of an organization. Sizes are bytes; the times of nodes
-- are nanoseconds, all others milliseconds. Contents of more than 4096 bytes are chunks
-- in the object store.

CREATE TABLE workspaces (
  number        BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  id            TEXT NOT NULL UNIQUE,
  organization  TEXT NOT NULL REFERENCES organizations (id),
  name          TEXT NOT NULL,
  created       BIGINT NOT NULL,
  -- When it was deleted; what it held is then removed in steps.
  deleted       BIGINT,
  seq           BIGINT NOT NULL,
  next_id       BIGINT NOT NULL,
  -- The seq of the newest snapshot, or 0: rows that are not newer are copied to the
  -- history before they change.
  snapshot_seq  BIGINT NOT NULL,
  oldest_change BIGINT NOT NULL,
  quota_bytes   BIGINT NOT NULL,
  quota_nodes   BIGINT NOT NULL,
  used_bytes    BIGINT NOT NULL,
  kept_bytes    BIGINT NOT NULL,
  nodes         BIGINT NOT NULL,
  -- JSON list of names.
  agents        TEXT NOT NULL,
  keep_versions BIGINT NOT NULL,
  -- Milliseconds.
  keep_for      BIGINT NOT NULL
);
CREATE UNIQUE INDEX workspaces_name ON workspaces (organization, name) WHERE deleted IS NULL;

CREATE TABLE file_nodes (
  workspace BIGINT NOT NULL,
  id        BIGINT NOT NULL,
  type      BIGINT NOT NULL,
  mode      BIGINT NOT NULL,
  uid       BIGINT NOT NULL,
  gid       BIGINT NOT NULL,
  size      BIGINT NOT NULL,
  stored    BIGINT NOT NULL,
  mtime     BIGINT NOT NULL,
  ctime     BIGINT NOT NULL,
  btime     BIGINT NOT NULL,
  links     BIGINT NOT NULL,
  version   BIGINT NOT NULL,
  seq       BIGINT NOT NULL,
  target    BYTEA,
  xattrs    BYTEA,
  -- One of its names; of a directory the only one.
  parent    BIGINT NOT NULL,
  name      BYTEA NOT NULL,
  PRIMARY KEY (workspace, id)
);

CREATE TABLE file_entries (
  workspace BIGINT NOT NULL,
  parent    BIGINT NOT NULL,
  name      BYTEA NOT NULL,
  node      BIGINT NOT NULL,
  seq       BIGINT NOT NULL,
  PRIMARY KEY (workspace, parent, name)
);
CREATE INDEX file_entries_node ON file_entries (workspace, node);

-- What rows of the two tables above were, from their seq to before until, for as long as
-- a snapshot lies between.
CREATE TABLE file_node_history (
  workspace BIGINT NOT NULL,
  id        BIGINT NOT NULL,
  seq       BIGINT NOT NULL,
  until     BIGINT NOT NULL,
  type      BIGINT NOT NULL,
  mode      BIGINT NOT NULL,
  uid       BIGINT NOT NULL,
  gid       BIGINT NOT NULL,
  size      BIGINT NOT NULL,
  stored    BIGINT NOT NULL,
  mtime     BIGINT NOT NULL,
  ctime     BIGINT NOT NULL,
  btime     BIGINT NOT NULL,
  links     BIGINT NOT NULL,
  version   BIGINT NOT NULL,
  target    BYTEA,
  xattrs    BYTEA,
  parent    BIGINT NOT NULL,
  name      BYTEA NOT NULL,
  PRIMARY KEY (workspace, id, seq)
);
CREATE INDEX file_node_history_until ON file_node_history (workspace, until);

CREATE TABLE file_entry_history (
  workspace BIGINT NOT NULL,
  parent    BIGINT NOT NULL,
  name      BYTEA NOT NULL,
  seq       BIGINT NOT NULL,
  until     BIGINT NOT NULL,
  node      BIGINT NOT NULL,
  PRIMARY KEY (workspace, parent, name, seq)
);
CREATE INDEX file_entry_history_until ON file_entry_history (workspace, until);

CREATE TABLE file_versions (
  workspace BIGINT NOT NULL,
  node      BIGINT NOT NULL,
  version   BIGINT NOT NULL,
  base      BIGINT NOT NULL,
  size      BIGINT NOT NULL,
  stored    BIGINT NOT NULL,
  created   BIGINT NOT NULL,
  author    TEXT NOT NULL,
  etag      BYTEA NOT NULL CHECK (length(etag) = 32),
  -- Hashes of segments, 32 bytes each; or the content itself.
  segments  BYTEA,
  inline    BYTEA,
  PRIMARY KEY (workspace, node, version)
);

-- Up to 1024 hashes of chunks each, 32 bytes each; a hole is all zeros. refs counts
-- versions.
CREATE TABLE file_segments (
  workspace BIGINT NOT NULL,
  hash      BYTEA NOT NULL CHECK (length(hash) = 32),
  chunks    BYTEA NOT NULL,
  refs      BIGINT NOT NULL,
  PRIMARY KEY (workspace, hash)
);

-- The chunks that a workspace holds. refs counts segments; what has none was stored at
-- touched, and waits for a commit that names it.
CREATE TABLE file_chunks (
  workspace BIGINT NOT NULL,
  hash      BYTEA NOT NULL CHECK (length(hash) = 32),
  size      BIGINT NOT NULL,
  refs      BIGINT NOT NULL,
  touched   BIGINT NOT NULL,
  PRIMARY KEY (workspace, hash)
);
CREATE INDEX file_chunks_idle ON file_chunks (workspace, touched) WHERE refs = 0;

-- Chunks in the object store. holders counts workspaces.
CREATE TABLE blob_objects (
  organization TEXT NOT NULL,
  hash         BYTEA NOT NULL CHECK (length(hash) = 32),
  key          TEXT NOT NULL,
  size         BIGINT NOT NULL,
  holders      BIGINT NOT NULL,
  -- It was read and found altered: the next that stores it replaces it.
  damaged      BIGINT NOT NULL,
  PRIMARY KEY (organization, hash)
);
CREATE INDEX blob_objects_idle ON blob_objects (organization) WHERE holders = 0;

-- Objects that are being written, and objects to be removed.
CREATE TABLE blob_uploads (
  key     TEXT PRIMARY KEY,
  started BIGINT NOT NULL
);
CREATE INDEX blob_uploads_started ON blob_uploads (started);
CREATE TABLE blob_garbage (
  key   TEXT PRIMARY KEY,
  since BIGINT NOT NULL
);

CREATE TABLE file_changes (
  workspace BIGINT NOT NULL,
  seq       BIGINT NOT NULL,
  mount     TEXT NOT NULL,
  node      BIGINT NOT NULL,
  names     BYTEA,
  PRIMARY KEY (workspace, seq)
);

CREATE TABLE file_mounts (
  workspace BIGINT NOT NULL,
  agent     TEXT NOT NULL,
  mount     TEXT NOT NULL,
  read_only BIGINT NOT NULL,
  last_op   BIGINT NOT NULL,
  opened    BIGINT NOT NULL,
  -- What the agent said last of what it has not uploaded, and when; an encoded
  -- MountStatus.
  status    BYTEA,
  reported  BIGINT,
  PRIMARY KEY (workspace, agent, mount)
);

-- Answers to a mount's last operations, encoded.
CREATE TABLE file_answers (
  workspace BIGINT NOT NULL,
  agent     TEXT NOT NULL,
  mount     TEXT NOT NULL,
  first     BIGINT NOT NULL,
  last      BIGINT NOT NULL,
  answers   BYTEA NOT NULL,
  PRIMARY KEY (workspace, agent, mount, first)
);

-- Node numbers that were set aside for an agent.
CREATE TABLE file_blocks (
  workspace BIGINT NOT NULL,
  first     BIGINT NOT NULL,
  last      BIGINT NOT NULL,
  agent     TEXT NOT NULL,
  PRIMARY KEY (workspace, first)
);

-- What a mount calls by the one number is kept under the other since a conflict; base is
-- the version of which that mount's content was made.
CREATE TABLE file_redirects (
  workspace BIGINT NOT NULL,
  agent     TEXT NOT NULL,
  node      BIGINT NOT NULL,
  base      BIGINT NOT NULL,
  kept      BIGINT NOT NULL,
  PRIMARY KEY (workspace, agent, node, base)
);

CREATE TABLE file_conflicts (
  workspace BIGINT NOT NULL,
  seq       BIGINT NOT NULL,
  path      BYTEA NOT NULL,
  kept_as   BYTEA NOT NULL,
  kept_id   BIGINT NOT NULL,
  time      BIGINT NOT NULL,
  agent     TEXT NOT NULL,
  PRIMARY KEY (workspace, seq)
);

CREATE TABLE file_trash (
  workspace BIGINT NOT NULL,
  id        BIGINT NOT NULL,
  node      BIGINT NOT NULL,
  path      BYTEA NOT NULL,
  removed   BIGINT NOT NULL,
  author    TEXT NOT NULL,
  files     BIGINT NOT NULL,
  bytes     BIGINT NOT NULL,
  -- It is being removed for good, in steps.
  purging   BIGINT NOT NULL,
  PRIMARY KEY (workspace, id)
);
CREATE INDEX file_trash_removed ON file_trash (workspace, removed);

CREATE TABLE file_snapshots (
  workspace BIGINT NOT NULL,
  id        TEXT NOT NULL,
  name      TEXT NOT NULL,
  seq       BIGINT NOT NULL,
  created   BIGINT NOT NULL,
  author    TEXT NOT NULL,
  nodes     BIGINT NOT NULL,
  bytes     BIGINT NOT NULL,
  PRIMARY KEY (workspace, id),
  UNIQUE (workspace, name)
);
