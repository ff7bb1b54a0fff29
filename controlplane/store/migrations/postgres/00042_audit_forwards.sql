-- +goose Up
-- Up to which entry each syslog server has each organization's audit chain.

CREATE TABLE audit_forwards (
  destination  TEXT NOT NULL,
  organization TEXT NOT NULL,
  sequence     BIGINT NOT NULL,
  hash         BYTEA NOT NULL,
  PRIMARY KEY (destination, organization)
);
