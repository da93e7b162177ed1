-- Keeps a notification for later; the worker stores it when due. One that has a key is kept once: its id is
-- made of user and key, so a repeated request is told of the first, and is taken anew where that failed.
-- A key made of the resource may be longer than a caller's: such a one is made again when due.
INSERT INTO intake AS kept (id, payload, due_at)
SELECT coalesce(md5(length(p ->> 'user_id') || ' ' || (p ->> 'user_id') || key)::uuid, gen_random_uuid()),
       CASE WHEN length(key) > 255 THEN p - 'idempotency_key' ELSE p END, %(due_at)s::timestamptz
FROM (SELECT %(payload)s::jsonb) AS asked (p)
CROSS JOIN LATERAL (SELECT p ->> 'idempotency_key') AS known (key)
ON CONFLICT (id) DO UPDATE
SET payload = CASE WHEN kept.error IS NULL THEN kept.payload ELSE EXCLUDED.payload END,
    due_at = CASE WHEN kept.error IS NULL THEN kept.due_at ELSE EXCLUDED.due_at END,
    error = NULL
RETURNING json_build_object('id', kept.id, 'due_at', kept.due_at) AS scheduled
