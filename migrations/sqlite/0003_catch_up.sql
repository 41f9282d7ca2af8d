-- Which regions are waited for before log entries are given up, and what snapshots did not bring. The same tables, by the
-- same names, exist for Postgres.

-- The other regions that were ever linked. `linked_at` is when each was last, in milliseconds of Unix time; with
-- `needs_snapshot` it has been away for so long that entries were given up without it. Those of before count from now on.
CREATE TABLE members (
    region         TEXT NOT NULL PRIMARY KEY,
    linked_at      INTEGER NOT NULL,
    needs_snapshot BOOLEAN NOT NULL
) WITHOUT ROWID;
INSERT INTO members (region, linked_at, needs_snapshot)
    SELECT DISTINCT region, CAST(strftime('%s', 'now') AS INTEGER) * 1000, FALSE FROM acknowledgements;

-- Documents of which the origins' counters claim entries that are not here: a snapshot lacked them.
CREATE TABLE missing_documents (
    document_id     BLOB NOT NULL PRIMARY KEY,
    placement_group TEXT NOT NULL
) WITHOUT ROWID;
