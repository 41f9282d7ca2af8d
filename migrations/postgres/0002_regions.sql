-- Several regions: the logs of other regions' origins stand beside this region's own, and documents can be deleted.
-- The same tables, by the same names, exist for SQLite.

-- `chain` is the running hash of the log at `seq`. Only an origin that a node of this region may claim has a slot: other
-- regions' origins have none, nor have own ones that were replaced. The log is emptied below, and nobody has read
-- it, so a chain may begin at any seq.
ALTER TABLE origins ADD COLUMN chain bytea NOT NULL DEFAULT '\x00000000000000000000000000000000';
ALTER TABLE origins ALTER COLUMN chain DROP DEFAULT;
ALTER TABLE origins ALTER COLUMN slot DROP NOT NULL;

-- One row per run of consecutive entries. `body` is packed as protocol/src/log.rs describes, with the changes' bytes;
-- `chain_before` is the running hash before its first entry; `appended_at` is in milliseconds of Unix time. The runs of
-- before held no bytes and are of no use to anybody.
TRUNCATE log;
ALTER TABLE log RENAME COLUMN entries TO body;
ALTER TABLE log ADD COLUMN appended_at bigint NOT NULL, ADD COLUMN chain_before bytea NOT NULL;

-- What is left of deleted documents. A document that stands here stands in no other table. `deleted_at` is in
-- milliseconds of Unix time.
CREATE TABLE tombstones (
    document_id     bytea NOT NULL PRIMARY KEY,
    placement_group text NOT NULL,
    deleted_at      bigint NOT NULL
);

-- How far other regions have stored logs, as they said last.
CREATE TABLE acknowledgements (
    region text NOT NULL,
    origin bytea NOT NULL,
    seq    bigint NOT NULL,
    PRIMARY KEY (region, origin)
);
