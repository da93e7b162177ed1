-- Puts all failed deliveries (of a channel) back in the queue, spread out: ten messages a second.
WITH failed AS MATERIALIZED (
    SELECT DISTINCT user_id, message_id FROM deliveries
    WHERE status = 'failed' AND message_id IS NOT NULL
      AND (%(channel)s::text IS NULL OR channel = %(channel)s::text)
),
again AS (
    UPDATE outbox o
    SET state = 'pending', attempts = 0, faults = 0, crashes = 0, finished_at = NULL,
        available_at = now() + random() * (SELECT count(*) FROM failed) * interval '0.1 seconds'
    FROM failed f WHERE o.user_id = f.user_id AND o.id = f.message_id AND o.state = 'failed'
    RETURNING o.user_id, o.id
),
queued AS (
    UPDATE deliveries d
    SET status = 'queued', last_error = NULL
    FROM again a WHERE d.user_id = a.user_id AND d.message_id = a.id AND d.status = 'failed'
    RETURNING d.id
)
SELECT count(*) AS retried FROM queued
