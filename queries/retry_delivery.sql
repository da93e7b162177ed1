-- Puts a failed delivery back in the queue with a fresh attempt budget, and what left with it: they
-- are one message. A conflict unless it failed; no row when there is no such delivery.
WITH asked AS (
    SELECT user_id, message_id, status FROM deliveries WHERE id = %(id)s::uuid
),
again AS (
    UPDATE outbox o
    SET state = 'pending', attempts = 0, faults = 0, crashes = 0, available_at = now(), finished_at = NULL
    FROM asked a
    WHERE a.status = 'failed' AND o.user_id = a.user_id AND o.id = a.message_id AND o.state = 'failed'
    RETURNING o.user_id, o.id
),
queued AS (
    UPDATE deliveries d
    SET status = 'queued', last_error = NULL
    FROM again a WHERE d.user_id = a.user_id AND d.message_id = a.id AND d.status = 'failed'
)
SELECT %(id)s::uuid AS id, CASE WHEN status <> 'failed' THEN 'conflict' END AS problem FROM asked
