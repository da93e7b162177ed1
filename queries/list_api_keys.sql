-- All keys that were not revoked, the oldest first; never the secret.
SELECT coalesce(json_agg(json_build_object('id', id, 'name', name, 'scope', scope, 'created_at', created_at,
                                           'last_used_at', last_used_at)
                         ORDER BY created_at, id), '[]'::json) AS keys
FROM api_keys
WHERE revoked_at IS NULL
