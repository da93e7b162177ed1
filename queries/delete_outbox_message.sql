-- Skips a waiting message for ever: its items become cancelled; no row when it has left already.
WITH skipped AS (
    UPDATE outbox
    SET state = 'void', finished_at = now()
    WHERE user_id = %(user_id)s::text AND id = %(id)s::uuid AND state IN ('open', 'pending')
    RETURNING id
),
cancelled AS (
    UPDATE deliveries d
    SET status = 'cancelled'
    FROM skipped
    WHERE d.user_id = %(user_id)s::text AND d.message_id = skipped.id AND d.status = 'queued'
)
SELECT id FROM skipped
