-- +goose Up
-- The session that a statement ran in: one that stays open, or a PostgreSQL client's; '' is none.

ALTER TABLE queries ADD COLUMN session TEXT NOT NULL DEFAULT '';
ALTER TABLE wire_queries ADD COLUMN session TEXT NOT NULL DEFAULT '';
