-- Quarantined documents, which are few among many, are found and counted without reading the others. The same index, by the
-- same name, exists for Postgres.
CREATE INDEX quarantined_documents ON documents (id) WHERE state = 1;
