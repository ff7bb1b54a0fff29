-- +goose Up
-- Which authority issued a certificate: its fingerprint. All that were issued before have
-- the only one that there was.

ALTER TABLE agent_certificates ADD COLUMN authority TEXT;
UPDATE agent_certificates SET authority = (SELECT fingerprint FROM authorities WHERE state = 'active');
CREATE INDEX agent_certificates_authority ON agent_certificates (authority);
