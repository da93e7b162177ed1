-- The live key with this hash; notes its use at most once a minute.
WITH found AS (
    SELECT id, scope, last_used_at FROM api_keys WHERE hash = %(hash)s::bytea AND revoked_at IS NULL
),
used AS (
    UPDATE api_keys k
    SET last_used_at = now()
    FROM found f
    WHERE k.id = f.id AND coalesce(f.last_used_at < now() - interval '1 minute', true)
)
SELECT scope FROM found
