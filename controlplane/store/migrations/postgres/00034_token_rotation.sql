-- +goose Up
-- The SHA-256 of the secret that a token had before its last rotation, and until when it is good.

ALTER TABLE tokens ADD COLUMN former_hash BYTEA;
ALTER TABLE tokens ADD COLUMN former_until BIGINT;
