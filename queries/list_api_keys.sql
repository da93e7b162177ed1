-- All keys that were not revoked, the oldest first; never the secret.
SELECT id, name, scope, created_at, last_used_at
FROM api_keys
WHERE revoked_at IS NULL
ORDER BY created_at, id
