-- Keeps a notification for later; the worker stores it when due. One that has a key is kept once: its id is
-- made of user and key, so a repeated request is told of the first, and is taken anew where that failed.
INSERT INTO intake AS kept (id, payload, due_at)
SELECT coalesce(md5(length(user_id) || ' ' || user_id || coalesce(key, resource_key))::uuid, gen_random_uuid()),
       asked - 'deliver_at' || jsonb_strip_nulls(jsonb_build_object('user_id', user_id, 'idempotency_key', key)),
       -- In UTC a time at the ends of the calendar may have a year that no client reads.
       least(greatest((asked ->> 'deliver_at')::timestamptz, '0001-01-01 00:00:00+00'), '9999-12-31 23:59:59+00')
FROM jsonb_to_record(%(item)s::jsonb) AS item (user_id text, key text, asked jsonb)
CROSS JOIN LATERAL (
    SELECT user_id || ':' || (asked ->> 'event_name') || ':' || (asked ->> 'resource_id') AS resource_key
) AS named
ON CONFLICT (id) DO UPDATE
SET payload = CASE WHEN kept.error IS NULL THEN kept.payload ELSE EXCLUDED.payload END,
    due_at = CASE WHEN kept.error IS NULL THEN kept.due_at ELSE EXCLUDED.due_at END,
    error = NULL
RETURNING json_build_object('id', kept.id, 'due_at', kept.due_at) AS scheduled
