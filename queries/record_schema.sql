-- Notes which schema file was applied.
UPDATE schema_version
SET digest = %(digest)s::text, applied_at = now()
WHERE version = (SELECT max(newest.version) FROM schema_version newest)
