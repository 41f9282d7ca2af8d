-- Several regions: the logs of other regions' origins stand beside this region's own, and documents can be deleted.
-- The same tables, by the same names, exist for Postgres.

-- `chain` is the running hash of the log at `seq`. Only an origin that a node of this region may claim has a slot: other
-- regions' origins have none, nor have own ones that were replaced. The log is emptied below, and nobody has read
-- it, so a chain may begin at any seq.
CREATE TABLE origins_with_chain (
    id              BLOB NOT NULL PRIMARY KEY,
    region          TEXT NOT NULL,
    placement_group TEXT NOT NULL,
    slot            INTEGER,
    incarnation     INTEGER NOT NULL,
    seq             INTEGER NOT NULL,
    chain           BLOB NOT NULL,
    UNIQUE (region, placement_group, slot)
) WITHOUT ROWID;
INSERT INTO origins_with_chain
    SELECT id, region, placement_group, slot, incarnation, seq, zeroblob(16) FROM origins;
DROP TABLE origins;
ALTER TABLE origins_with_chain RENAME TO origins;

-- One row per run of consecutive entries. `body` is packed as protocol/src/log.rs describes, with the changes' bytes;
-- `chain_before` is the running hash before its first entry; `appended_at` is in milliseconds of Unix time. The runs of
-- before held no bytes and are of no use to anybody.
DROP TABLE log;
CREATE TABLE log (
    origin       BLOB NOT NULL,
    last_seq     INTEGER NOT NULL,
    first_seq    INTEGER NOT NULL,
    appended_at  INTEGER NOT NULL,
    chain_before BLOB NOT NULL,
    body         BLOB NOT NULL,
    PRIMARY KEY (origin, last_seq)
) WITHOUT ROWID;

-- What is left of deleted documents. A document that stands here stands in no other table. `deleted_at` is in
-- milliseconds of Unix time.
CREATE TABLE tombstones (
    document_id     BLOB NOT NULL PRIMARY KEY,
    placement_group TEXT NOT NULL,
    deleted_at      INTEGER NOT NULL
) WITHOUT ROWID;

-- How far other regions have stored logs, as they said last.
CREATE TABLE acknowledgements (
    region TEXT NOT NULL,
    origin BLOB NOT NULL,
    seq    INTEGER NOT NULL,
    PRIMARY KEY (region, origin)
) WITHOUT ROWID;
