-- Keeps a notification for later; the worker stores it when due. One that has a key is kept once, so that a
-- repeated request cannot bring back what is cancelled: its id is made of user and key.
INSERT INTO intake AS kept (id, payload, due_at)
SELECT coalesce(md5((p ->> 'user_id') || E'\n' || (p ->> 'idempotency_key'))::uuid, gen_random_uuid()), p,
       %(due_at)s::timestamptz
FROM (SELECT %(payload)s::jsonb) AS asked (p)
ON CONFLICT (id) DO UPDATE SET error = NULL
RETURNING json_build_object('id', kept.id, 'due_at', kept.due_at) AS scheduled
