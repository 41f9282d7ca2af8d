-- The nodes that were started on this database, the newest ones, in the order of their numbers. A copy of the database does not
-- have those that were started on the original later.
CREATE TABLE nodes (
    id     bytea NOT NULL PRIMARY KEY,
    number bigint NOT NULL
);
