-- Adds an API key; with only_first, only while there has never been one.
INSERT INTO api_keys (name, scope, hash)
SELECT %(name)s::text, %(scope)s::text, %(hash)s::bytea
WHERE NOT (%(only_first)s::boolean AND EXISTS (SELECT FROM api_keys))
RETURNING json_build_object('id', id, 'name', name, 'scope', scope, 'created_at', created_at,
                            'last_used_at', last_used_at) AS key
