-- The storage of one region. The same tables, by the same names, exist for Postgres.

-- Whose database this is: one row, written at the first start and never changed.
CREATE TABLE region (
    only_row   INTEGER NOT NULL PRIMARY KEY CHECK (only_row = 1),
    name       TEXT NOT NULL,
    storage_id TEXT NOT NULL
);

-- Log writers. `seq` is the counter: it is raised in the transaction that inserts the log entries it counts.
-- `incarnation` counts the claims; only the latest may append.
CREATE TABLE origins (
    id              BLOB NOT NULL PRIMARY KEY,
    region          TEXT NOT NULL,
    placement_group TEXT NOT NULL,
    slot            INTEGER NOT NULL,
    incarnation     INTEGER NOT NULL,
    seq             INTEGER NOT NULL,
    UNIQUE (region, placement_group, slot)
) WITHOUT ROWID;

-- One row per run of consecutive entries; one append writes one run. `entries` is packed as
-- server/src/storage/log_run.rs describes. The key is the run's last seq, so that a reader seeks to its cursor.
CREATE TABLE log (
    origin    BLOB NOT NULL,
    last_seq  INTEGER NOT NULL,
    first_seq INTEGER NOT NULL,
    entries   BLOB NOT NULL,
    PRIMARY KEY (origin, last_seq)
) WITHOUT ROWID;

-- `state`: 0 is live, 1 is quarantined. `created_at` is in milliseconds of Unix time.
CREATE TABLE documents (
    id              BLOB NOT NULL PRIMARY KEY,
    placement_group TEXT NOT NULL,
    state           INTEGER NOT NULL,
    state_reason    TEXT,
    created_at      INTEGER NOT NULL
) WITHOUT ROWID;

-- The changes of each document: what its base does not cover, and until it is pruned what the base covers. One row
-- per document and append, packed as server/src/storage/bundle.rs describes; `first_seq` is the log entry of
-- its first change.
CREATE TABLE changes (
    document_id BLOB NOT NULL,
    origin      BLOB NOT NULL,
    first_seq   INTEGER NOT NULL,
    hashes      BLOB NOT NULL,
    changes     BLOB NOT NULL,
    PRIMARY KEY (document_id, origin, first_seq)
) WITHOUT ROWID;

-- What is read whenever a document is loaded. The large parts stand in a table of their own, so that neither a
-- load nor the update of `pruned` touches them.
CREATE TABLE bases (
    document_id BLOB NOT NULL PRIMARY KEY,
    generation  INTEGER NOT NULL,
    pruned      INTEGER NOT NULL,
    chunk_bytes INTEGER NOT NULL,
    summary     BLOB NOT NULL
) WITHOUT ROWID;

-- A rowid table: its rows are far larger than a page.
CREATE TABLE base_contents (
    document_id BLOB NOT NULL PRIMARY KEY,
    generation  INTEGER NOT NULL,
    index_bytes BLOB NOT NULL,
    chunk       BLOB NOT NULL
);
