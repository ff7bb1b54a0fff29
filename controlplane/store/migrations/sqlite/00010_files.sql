-- +goose Up
-- Workspaces: named file trees of an organization. Sizes are bytes; the times of nodes
-- are nanoseconds, all others milliseconds. Contents of more than 4096 bytes are chunks
-- in the object store.

CREATE TABLE workspaces (
  number        INTEGER PRIMARY KEY AUTOINCREMENT,
  id            TEXT NOT NULL UNIQUE,
  organization  TEXT NOT NULL REFERENCES organizations (id),
  name          TEXT NOT NULL,
  created       INTEGER NOT NULL,
  -- When it was deleted; what it held is then removed in steps.
  deleted       INTEGER,
  seq           INTEGER NOT NULL,
  next_id       INTEGER NOT NULL,
  -- The seq of the newest snapshot, or 0: rows that are not newer are copied to the
  -- history before they change.
  snapshot_seq  INTEGER NOT NULL,
  oldest_change INTEGER NOT NULL,
  quota_bytes   INTEGER NOT NULL,
  quota_nodes   INTEGER NOT NULL,
  used_bytes    INTEGER NOT NULL,
  kept_bytes    INTEGER NOT NULL,
  nodes         INTEGER NOT NULL,
  -- JSON list of names.
  agents        TEXT NOT NULL,
  keep_versions INTEGER NOT NULL,
  -- Milliseconds.
  keep_for      INTEGER NOT NULL
) STRICT;
CREATE UNIQUE INDEX workspaces_name ON workspaces (organization, name) WHERE deleted IS NULL;

CREATE TABLE file_nodes (
  workspace INTEGER NOT NULL,
  id        INTEGER NOT NULL,
  type      INTEGER NOT NULL,
  mode      INTEGER NOT NULL,
  uid       INTEGER NOT NULL,
  gid       INTEGER NOT NULL,
  size      INTEGER NOT NULL,
  stored    INTEGER NOT NULL,
  mtime     INTEGER NOT NULL,
  ctime     INTEGER NOT NULL,
  btime     INTEGER NOT NULL,
  links     INTEGER NOT NULL,
  version   INTEGER NOT NULL,
  seq       INTEGER NOT NULL,
  target    BLOB,
  xattrs    BLOB,
  -- One of its names; of a directory the only one.
  parent    INTEGER NOT NULL,
  name      BLOB NOT NULL,
  PRIMARY KEY (workspace, id)
) STRICT, WITHOUT ROWID;

CREATE TABLE file_entries (
  workspace INTEGER NOT NULL,
  parent    INTEGER NOT NULL,
  name      BLOB NOT NULL,
  node      INTEGER NOT NULL,
  seq       INTEGER NOT NULL,
  PRIMARY KEY (workspace, parent, name)
) STRICT, WITHOUT ROWID;
CREATE INDEX file_entries_node ON file_entries (workspace, node);

-- What rows of the two tables above were, from their seq to before until, for as long as
-- a snapshot lies between.
CREATE TABLE file_node_history (
  workspace INTEGER NOT NULL,
  id        INTEGER NOT NULL,
  seq       INTEGER NOT NULL,
  until     INTEGER NOT NULL,
  type      INTEGER NOT NULL,
  mode      INTEGER NOT NULL,
  uid       INTEGER NOT NULL,
  gid       INTEGER NOT NULL,
  size      INTEGER NOT NULL,
  stored    INTEGER NOT NULL,
  mtime     INTEGER NOT NULL,
  ctime     INTEGER NOT NULL,
  btime     INTEGER NOT NULL,
  links     INTEGER NOT NULL,
  version   INTEGER NOT NULL,
  target    BLOB,
  xattrs    BLOB,
  parent    INTEGER NOT NULL,
  name      BLOB NOT NULL,
  PRIMARY KEY (workspace, id, seq)
) STRICT, WITHOUT ROWID;
CREATE INDEX file_node_history_until ON file_node_history (workspace, until);

CREATE TABLE file_entry_history (
  workspace INTEGER NOT NULL,
  parent    INTEGER NOT NULL,
  name      BLOB NOT NULL,
  seq       INTEGER NOT NULL,
  until     INTEGER NOT NULL,
  node      INTEGER NOT NULL,
  PRIMARY KEY (workspace, parent, name, seq)
) STRICT, WITHOUT ROWID;
CREATE INDEX file_entry_history_until ON file_entry_history (workspace, until);

CREATE TABLE file_versions (
  workspace INTEGER NOT NULL,
  node      INTEGER NOT NULL,
  version   INTEGER NOT NULL,
  base      INTEGER NOT NULL,
  size      INTEGER NOT NULL,
  stored    INTEGER NOT NULL,
  created   INTEGER NOT NULL,
  author    TEXT NOT NULL,
  etag      BLOB NOT NULL CHECK (length(etag) = 32),
  -- Hashes of segments, 32 bytes each; or the content itself.
  segments  BLOB,
  inline    BLOB,
  PRIMARY KEY (workspace, node, version)
) STRICT;

-- Up to 1024 hashes of chunks each, 32 bytes each; a hole is all zeros. refs counts
-- versions.
CREATE TABLE file_segments (
  workspace INTEGER NOT NULL,
  hash      BLOB NOT NULL CHECK (length(hash) = 32),
  chunks    BLOB NOT NULL,
  refs      INTEGER NOT NULL,
  PRIMARY KEY (workspace, hash)
) STRICT;

-- The chunks that a workspace holds. refs counts segments; what has none was stored at
-- touched, and waits for a commit that names it.
CREATE TABLE file_chunks (
  workspace INTEGER NOT NULL,
  hash      BLOB NOT NULL CHECK (length(hash) = 32),
  size      INTEGER NOT NULL,
  refs      INTEGER NOT NULL,
  touched   INTEGER NOT NULL,
  PRIMARY KEY (workspace, hash)
) STRICT, WITHOUT ROWID;
CREATE INDEX file_chunks_idle ON file_chunks (workspace, touched) WHERE refs = 0;

-- Chunks in the object store. holders counts workspaces.
CREATE TABLE blob_objects (
  organization TEXT NOT NULL,
  hash         BLOB NOT NULL CHECK (length(hash) = 32),
  key          TEXT NOT NULL,
  size         INTEGER NOT NULL,
  holders      INTEGER NOT NULL,
  -- It was read and found altered: the next that stores it replaces it.
  damaged      INTEGER NOT NULL,
  PRIMARY KEY (organization, hash)
) STRICT, WITHOUT ROWID;
CREATE INDEX blob_objects_idle ON blob_objects (organization) WHERE holders = 0;

-- Objects that are being written, and objects to be removed.
CREATE TABLE blob_uploads (
  key     TEXT PRIMARY KEY,
  started INTEGER NOT NULL
) STRICT;
CREATE INDEX blob_uploads_started ON blob_uploads (started);
CREATE TABLE blob_garbage (
  key   TEXT PRIMARY KEY,
  since INTEGER NOT NULL
) STRICT;

CREATE TABLE file_changes (
  workspace INTEGER NOT NULL,
  seq       INTEGER NOT NULL,
  mount     TEXT NOT NULL,
  node      INTEGER NOT NULL,
  names     BLOB,
  PRIMARY KEY (workspace, seq)
) STRICT, WITHOUT ROWID;

CREATE TABLE file_mounts (
  workspace INTEGER NOT NULL,
  agent     TEXT NOT NULL,
  mount     TEXT NOT NULL,
  read_only INTEGER NOT NULL,
  last_op   INTEGER NOT NULL,
  opened    INTEGER NOT NULL,
  -- What the agent said last of what it has not uploaded, and when; an encoded
  -- MountStatus.
  status    BLOB,
  reported  INTEGER,
  PRIMARY KEY (workspace, agent, mount)
) STRICT;

-- Answers to a mount's last operations, encoded.
CREATE TABLE file_answers (
  workspace INTEGER NOT NULL,
  agent     TEXT NOT NULL,
  mount     TEXT NOT NULL,
  first     INTEGER NOT NULL,
  last      INTEGER NOT NULL,
  answers   BLOB NOT NULL,
  PRIMARY KEY (workspace, agent, mount, first)
) STRICT;

-- Node numbers that were set aside for an agent.
CREATE TABLE file_blocks (
  workspace INTEGER NOT NULL,
  first     INTEGER NOT NULL,
  last      INTEGER NOT NULL,
  agent     TEXT NOT NULL,
  PRIMARY KEY (workspace, first)
) STRICT, WITHOUT ROWID;

-- What a mount calls by the one number is kept under the other since a conflict; base is
-- the version of which that mount's content was made.
CREATE TABLE file_redirects (
  workspace INTEGER NOT NULL,
  agent     TEXT NOT NULL,
  node      INTEGER NOT NULL,
  base      INTEGER NOT NULL,
  kept      INTEGER NOT NULL,
  PRIMARY KEY (workspace, agent, node, base)
) STRICT, WITHOUT ROWID;

CREATE TABLE file_conflicts (
  workspace INTEGER NOT NULL,
  seq       INTEGER NOT NULL,
  path      BLOB NOT NULL,
  kept_as   BLOB NOT NULL,
  kept_id   INTEGER NOT NULL,
  time      INTEGER NOT NULL,
  agent     TEXT NOT NULL,
  PRIMARY KEY (workspace, seq)
) STRICT;

CREATE TABLE file_trash (
  workspace INTEGER NOT NULL,
  id        INTEGER NOT NULL,
  node      INTEGER NOT NULL,
  path      BLOB NOT NULL,
  removed   INTEGER NOT NULL,
  author    TEXT NOT NULL,
  files     INTEGER NOT NULL,
  bytes     INTEGER NOT NULL,
  -- It is being removed for good, in steps.
  purging   INTEGER NOT NULL,
  PRIMARY KEY (workspace, id)
) STRICT;
CREATE INDEX file_trash_removed ON file_trash (workspace, removed);

CREATE TABLE file_snapshots (
  workspace INTEGER NOT NULL,
  id        TEXT NOT NULL,
  name      TEXT NOT NULL,
  seq       INTEGER NOT NULL,
  created   INTEGER NOT NULL,
  author    TEXT NOT NULL,
  nodes     INTEGER NOT NULL,
  bytes     INTEGER NOT NULL,
  PRIMARY KEY (workspace, id),
  UNIQUE (workspace, name)
) STRICT;
