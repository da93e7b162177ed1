-- Keeps a notification for later; the worker stores it when due. One that has a key is kept once: its id is
-- made of user and key, so a repeated request is told of the first, and is taken anew where that failed.
INSERT INTO intake AS kept (id, payload, due_at)
SELECT coalesce(md5(length(user_id) || ' ' || user_id || key)::uuid, gen_random_uuid()), p, %(due_at)s::timestamptz
FROM (SELECT %(payload)s::jsonb) AS asked (p)
CROSS JOIN LATERAL (
    SELECT p ->> 'user_id' AS user_id, coalesce(
        p ->> 'idempotency_key', (p ->> 'user_id') || ':' || (p ->> 'event_name') || ':' || (p ->> 'resource_id')) AS key
) AS named
ON CONFLICT (id) DO UPDATE
SET payload = CASE WHEN kept.error IS NULL THEN kept.payload ELSE EXCLUDED.payload END,
    due_at = CASE WHEN kept.error IS NULL THEN kept.due_at ELSE EXCLUDED.due_at END,
    error = NULL
RETURNING json_build_object('id', kept.id, 'due_at', kept.due_at) AS scheduled
