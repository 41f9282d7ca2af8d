-- Deleted documents' changes leave the log some time after the deletion, step by step. The same columns and tables, by the same
-- names, exist for Postgres.

-- `erasure`: 0 says that the log holds no changes of the document that came before the deletion, 1 that the pass over the log
-- which is under way erases them, 2 that the next one will. Until it is 0, whoever reads the log leaves them out. The deletions
-- of before had them erased at once.
ALTER TABLE tombstones ADD COLUMN erasure INTEGER NOT NULL DEFAULT 0;
CREATE INDEX tombstones_unerased ON tombstones (document_id) WHERE erasure > 0;

-- How far the pass over the log has come, in each origin that it has come to. Without a row, no pass is under way.
CREATE TABLE erasure_cursors (
    origin   BLOB NOT NULL PRIMARY KEY,
    last_seq INTEGER NOT NULL
) WITHOUT ROWID;
