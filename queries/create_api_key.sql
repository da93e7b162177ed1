-- Adds an API key; the secret is told this once, only its hash is kept.
WITH made AS MATERIALIZED (
    SELECT 'bh_' || replace(gen_random_uuid()::text || gen_random_uuid()::text, '-', '') AS secret
)
INSERT INTO api_keys (name, scope, hash)
SELECT %(name)s::text, %(scope)s::text, sha256(convert_to(made.secret, 'UTF8')) FROM made
-- With only_first, only while there has never been a key.
WHERE NOT (%(only_first)s::boolean AND EXISTS (SELECT FROM api_keys))
RETURNING json_build_object('id', id, 'name', name, 'scope', scope, 'created_at', created_at,
                            'last_used_at', last_used_at) AS key, (SELECT made.secret FROM made) AS secret
