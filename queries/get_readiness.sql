-- Answers when the database does.
SELECT max(version) AS version FROM schema_version
