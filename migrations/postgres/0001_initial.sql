-- The storage of one region. The same tables, by the same names, exist for SQLite.

-- Whose database this is: one row, written at the first start and never changed.
CREATE TABLE region (
    only_row   integer NOT NULL PRIMARY KEY CHECK (only_row = 1),
    name       text NOT NULL,
    storage_id text NOT NULL
);

-- Log writers. `seq` is the counter: it is raised in the transaction that inserts the log entries it counts, and its
-- row lock makes the order of seqs the order of commits. `incarnation` counts the claims; only the latest may append.
-- Every append updates a row here: mostly empty pages let that happen in place, without touching an index.
CREATE TABLE origins (
    id              bytea NOT NULL PRIMARY KEY,
    region          text NOT NULL,
    placement_group text NOT NULL,
    slot            bigint NOT NULL,
    incarnation     bigint NOT NULL,
    seq             bigint NOT NULL,
    UNIQUE (region, placement_group, slot)
) WITH (fillfactor = 10);

-- One row per run of consecutive entries; one append writes one run. `entries` is packed as
-- server/src/storage/log_run.rs describes. The key is the run's last seq, so that a reader seeks to its cursor.
CREATE TABLE log (
    origin    bytea NOT NULL,
    last_seq  bigint NOT NULL,
    first_seq bigint NOT NULL,
    entries   bytea NOT NULL,
    PRIMARY KEY (origin, last_seq)
);

-- `state`: 0 is live, 1 is quarantined. `created_at` is in milliseconds of Unix time.
CREATE TABLE documents (
    id              bytea NOT NULL PRIMARY KEY,
    placement_group text NOT NULL,
    state           integer NOT NULL,
    state_reason    text,
    created_at      bigint NOT NULL
);

-- The changes of each document: what its base does not cover, and until it is pruned what the base covers. One row
-- per document and append, packed as server/src/storage/bundle.rs describes; `first_seq` is the log entry of
-- its first change.
CREATE TABLE changes (
    document_id bytea NOT NULL,
    origin      bytea NOT NULL,
    first_seq   bigint NOT NULL,
    hashes      bytea NOT NULL,
    changes     bytea NOT NULL,
    PRIMARY KEY (document_id, origin, first_seq)
);

-- What is read whenever a document is loaded. The large parts stand in a table of their own, so that neither a
-- load nor the update of `pruned` touches them.
CREATE TABLE bases (
    document_id bytea NOT NULL PRIMARY KEY,
    generation  bigint NOT NULL,
    pruned      boolean NOT NULL,
    chunk_bytes bigint NOT NULL,
    summary     bytea NOT NULL
);

CREATE TABLE base_contents (
    document_id bytea NOT NULL PRIMARY KEY,
    generation  bigint NOT NULL,
    index_bytes bytea NOT NULL,
    chunk       bytea NOT NULL
);

-- Hashes do not compress, and Automerge has compressed changes and chunks that are worth it.
ALTER TABLE log ALTER COLUMN entries SET STORAGE EXTERNAL;
ALTER TABLE changes ALTER COLUMN hashes SET STORAGE EXTERNAL, ALTER COLUMN changes SET STORAGE EXTERNAL;
ALTER TABLE base_contents ALTER COLUMN chunk SET STORAGE EXTERNAL;

-- Rows up to a page stay in the page: moving a column out costs an index entry for each 2 KiB of it.
ALTER TABLE log SET (toast_tuple_target = 8160);
ALTER TABLE changes SET (toast_tuple_target = 8160);
