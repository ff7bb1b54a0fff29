-- +goose Up
-- How many rows a workspace keeps: nodes but the root, also those in the trash, names of files
-- beyond their first, versions, and what snapshots know of nodes and entries. Counted by the code from here on.

ALTER TABLE workspaces ADD COLUMN kept_rows BIGINT NOT NULL DEFAULT 0;
UPDATE workspaces SET kept_rows =
  (SELECT count(*) FROM file_nodes n WHERE n.workspace = workspaces.number AND n.id <> 1)
  + (SELECT coalesce(sum(n.links - 1), 0) FROM file_nodes n WHERE n.workspace = workspaces.number AND n.type <> 2 AND n.links > 1)
  + (SELECT count(*) FROM file_versions v WHERE v.workspace = workspaces.number)
  + (SELECT count(*) FROM file_node_history h WHERE h.workspace = workspaces.number)
  + (SELECT count(*) FROM file_entry_history h WHERE h.workspace = workspaces.number);

-- What became of conflicts goes with the file that they were kept as.
CREATE INDEX file_redirects_kept ON file_redirects (workspace, kept);
