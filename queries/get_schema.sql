-- Whether the schema file with this digest was the last one applied.
SELECT version FROM schema_version
WHERE digest = %(digest)s::text AND version = (SELECT max(newest.version) FROM schema_version newest)
