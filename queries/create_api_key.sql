-- A new API key; the secret is told this once.
WITH made AS MATERIALIZED (
    -- 244 random bits in base64url; only their hash is kept.
    SELECT 'bh_' || translate(encode(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()), 'base64'),
                              '+/=', '-_') AS secret
)
INSERT INTO api_keys (name, scope, hash)
SELECT %(name)s::text, %(scope)s::text, sha256(convert_to(made.secret, 'UTF8')) FROM made
-- The very first start makes one only while there has never been one.
WHERE NOT (%(only_first)s::boolean AND EXISTS (SELECT FROM api_keys))
RETURNING json_build_object('id', id, 'name', name, 'scope', scope, 'created_at', created_at,
                            'last_used_at', last_used_at) AS key,
          (SELECT made.secret FROM made) AS secret
